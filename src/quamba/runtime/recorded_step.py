"""The step of one token as one program of the compiled CPU kernels (``kernels/cpu/recording.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quamba.kernels.cpu.library import Program
from quamba.kernels.cpu.recording import NotRecordableError, record
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM


@dataclass(frozen=True)
class RecordedStep:
    """One call for a token of every sequence.

    network  whose weights the program reads: kept as long as it is
    ids      (B,) int64, read by the program
    logits   (B, padded_vocab), overwritten by every step
    """

    network: MambaLM
    program: Program
    ids: Tensor
    logits: Tensor

    @property
    def description(self) -> str:
        return f"one call of {len(self.program)} ops"

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (B,) int64 -> logits; the cache it was made for is advanced."""
        self.ids.copy_(ids)
        self.program()
        return self.logits


def recorded_step(network: MambaLM, cache: MambaCache) -> RecordedStep | str:
    """The step of a model that advances ``cache``, or one sentence that says why there is none."""
    ids = torch.zeros(cache.batch_size, dtype=torch.int64, device=network.device)
    states = [t for layer in cache.layers for t in (layer.conv_state, layer.ssm_state)]
    try:
        program, logits = record(
            lambda: network(ids[:, None], cache, last_only=True)[:, 0], inputs=[ids, *states]
        )
    except NotRecordableError as reason:
        return f"there is no program for it: {reason}."
    return RecordedStep(network, program, ids, logits)
