"""The calibration set on its way through a model, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from quamba.calibration.collect import Batch
from quamba.formats.activation import Activation
from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear


class _ReachedError(Exception):
    """Stops a forward pass at the projection whose input is wanted."""


class Stream:
    """Every calibration batch at the entrance of the current block, as residual plus hidden.

    model        whose blocks the batches go through; its weights may change between calls
    calibration  anything with ``batches()`` (``calibration/data.py``)
    samples      sequences to take; None means all
    """

    def __init__(self, model: MambaLM, calibration: Any, samples: int | None) -> None:
        self.model = model
        self.masks: list[Tensor | None] = []
        self._sums: list[Tensor] = []
        self._kept: list[Activation] = []
        for ids, mask in first_sequences(calibration.batches(), samples):
            self.masks.append(None if mask is None else mask.to(model.device))
            self._sums.append(model.backbone.embedding(ids.to(model.device)))

    def inputs(self, layer: int, name: str) -> Iterator[Activation]:
        """What projection ``name`` of block ``layer`` reads, batch by batch.

        Those of out_proj are kept until ``advance``, which then need not walk through the block again.
        """
        block = self.model.blocks[layer]
        linear: Linear = getattr(block.mixer, name)
        self._kept = []
        for stream, mask in zip(self._sums, self.masks, strict=True):
            seen: list[Activation] = []
            handle = linear.register_forward_pre_hook(_stop(seen))
            try:
                block(stream, None, None, mask)
            except _ReachedError:
                pass
            finally:
                handle.remove()
            if name == "out_proj":
                self._kept.append(seen[0])
            yield seen[0]

    def head_inputs(self) -> Iterator[Activation]:
        """What the head reads, batch by batch; all blocks are behind."""
        for stream in self._sums:
            yield self.model.backbone.norm_f(stream, None)[0]

    def advance(self, layer: int) -> None:
        """Go through block ``layer``, whose weights are all in place."""
        block = self.model.blocks[layer]
        for b, (stream, mask) in enumerate(zip(self._sums, self.masks, strict=True)):
            if self._kept:
                self._sums[b] = stream + block.mixer.out_proj(self._kept[b])
            else:
                hidden, residual = block(stream, None, None, mask)
                self._sums[b] = residual + hidden
        self._kept = []


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
