"""The calibration set on its way through a model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from quamba.calibration.collect import Batch, Watch, watching
from quamba.calibration.observers import StateObserver
from quamba.formats.activation import Activation
from quamba.models.lm import Block
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm
from quamba.quantization.states import HiddenStates, Shelf


class _ReachedError(Exception):
    """Stops a forward pass at the projection whose input is wanted."""


class Stream:
    """Every calibration batch at the entrance of the current block, as residual plus hidden.

    batches  (ids (B, L), mask (B, L) or None)
    embed    ids (B, L) -> what the first block reads, (B, L, width) float32
    shelf    where the states lie
    name     of their file
    keeps    whether there is room for what out_proj reads, which saves a walk through each block
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        embed: Callable[[Tensor], Tensor],
        width: int,
        shelf: Shelf,
        name: str,
        *,
        keeps: bool = True,
    ) -> None:
        self.width = width
        self.states = HiddenStates(shapes_of(batches), width, shelf, name)
        self.masks = [None if mask is None else mask.to(shelf.device) for _, mask in batches]
        self._batches, self._embed = batches, embed
        self._keeps = keeps
        self._kept: list[Activation] = []

    def begin(self) -> None:
        """Look up every token."""
        for b, (ids, _) in enumerate(self._batches):
            self.states[b] = self._embed(ids)

    def inputs(self, block: Block, name: str) -> Iterator[Activation]:
        """What projection ``name`` of the current block reads, batch by batch.

        Those of out_proj are kept, where there is room, until ``advance``, which then need not walk through
        the block again.
        """
        linear: Linear = getattr(block.mixer, name)
        self._kept = []
        for b, mask in enumerate(self.masks):
            seen: list[Activation] = []
            handle = linear.register_forward_pre_hook(_stop(seen))
            try:
                block(self.states[b], None, None, mask)
            except _ReachedError:
                pass
            finally:
                handle.remove()
            if name == "out_proj" and self._keeps:
                self._kept.append(seen[0])
            yield seen[0]

    def normed(self, norm_f: AddNorm) -> Iterator[Activation]:
        """What the head reads, batch by batch; all blocks are behind."""
        for b in range(len(self.masks)):
            yield norm_f(self.states[b], None)[0]

    def advance(
        self,
        block: Block,
        watches: Sequence[Watch] = (),
        state: StateObserver | None = None,
        *,
        with_state: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Go through the block, and let observers watch.

        watches     paths are those inside of the block
        state       sees the SSM states after the last token
        with_state  keep one in any case
        on_batch    told how many sequences went by
        """
        with watching(block, watches) as current:
            for b, mask in enumerate(self.masks):
                stream, current.mask = self.states[b], mask
                cache = None
                if with_state or state is not None:
                    cache = block.mixer.new_cache(len(stream), stream.device)
                if self._kept:
                    self.states[b] = stream + block.mixer.out_proj(self._kept[b])
                else:
                    hidden, residual = block(stream, None, cache, mask)
                    self.states[b] = residual + hidden
                if state is not None and cache is not None:
                    state.update(cache.ssm_state)
                if on_batch is not None:
                    on_batch(len(stream))
        self._kept = []

    def close(self) -> None:
        self._kept = []
        self.states.close()


def shapes_of(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    return [(ids.shape[0], ids.shape[1]) for ids, _ in batches]


def first_sequences(batches: Iterable[Batch], count: int | None) -> list[Batch]:
    """The first ``count`` sequences of the batches, or all for None."""
    taken: list[Batch] = []
    for ids, mask in batches:
        if count is not None and count <= 0:
            break
        taken.append((ids[:count], None if mask is None else mask[:count]))
        count = None if count is None else count - ids.shape[0]
    return taken


def _stop(seen: list[Activation]) -> Any:
    def stop(module: nn.Module, args: tuple[Activation, ...]) -> None:
        seen.append(args[0])
        raise _ReachedError

    return stop
