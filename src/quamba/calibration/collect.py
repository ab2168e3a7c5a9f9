"""Run the float model over the calibration set and let observers watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quamba.calibration.observers import Observer, StateObserver
from quamba.models.lm import MambaLM

Batch = tuple[Tensor, Tensor | None]


@dataclass
class Watch:
    """An observer on some channels of a leaf's output.

    path      of the leaf, e.g. ``backbone.layers.3.mixer.in_proj``
    channels  of the last dimension
    """

    path: str
    channels: slice
    observer: Observer


@dataclass
class StateWatch:
    """An observer on the SSM state of a layer after the last token of each sequence."""

    layer: int
    observer: StateObserver


@torch.inference_mode()
def collect(
    model: MambaLM,
    batches: Iterable[Batch],
    watches: Iterable[Watch],
    states: Iterable[StateWatch] = (),
    *,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Update every observer with every batch, in order; on_batch is told how many sequences went by.

    batches  (ids (B, L) int64, mask (B, L) bool or None for no padding)
    Only a float model can be watched: scales are made from real values.
    """
    states = list(states)
    with watching(model, list(watches)) as current:
        for ids, mask in batches:
            ids = ids.to(model.device)
            current.mask = None if mask is None else mask.to(model.device)
            cache = model.new_cache(ids.shape[0]) if states else None
            model.backbone(ids, cache, current.mask)
            for watch in states:
                assert cache is not None
                watch.observer.update(cache.layers[watch.layer].ssm_state)
            if on_batch is not None:
                on_batch(ids.shape[0])


class Current:
    """The mask of the batch that is going by; to be set before each."""

    mask: Tensor | None = None


@contextmanager
def watching(module: nn.Module, watches: Iterable[Watch]) -> Iterator[Current]:
    """Let observers see what a float model, or a part of one, gives; paths are those inside of it."""
    current = Current()

    def watcher(watches: list[Watch]) -> Callable[[object], None]:
        def watch_all(output: object) -> None:
            x = output[0] if isinstance(output, tuple) else output
            assert isinstance(x, Tensor), "observers watch float models"
            for watch in watches:
                watch.observer.update(x[..., watch.channels], current.mask)

        return watch_all

    by_path: dict[str, list[Watch]] = {}
    for watch in watches:
        by_path.setdefault(watch.path, []).append(watch)
    with listening(module, {path: watcher(group) for path, group in by_path.items()}):
        yield current


@contextmanager
def listening(model: nn.Module, listeners: Mapping[str, Callable[[object], None]]) -> Iterator[None]:
    """Tell each listener every output of the leaf at its path, in any precision, as the leaf gives it."""

    def hook(listener: Callable[[object], None]) -> Callable[..., None]:
        return lambda module, args, output: listener(output)

    handles = [
        model.get_submodule(path).register_forward_hook(hook(listener))
        for path, listener in listeners.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
