"""How much of a GPU a quantization may use at once, and how much it used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from quamba.calibration.collect import Batch
from quamba.models.config import ModelConfig
from quamba.recipes.plan import projections

# For the activations of one forward pass: a sixteenth of the GPU's memory, and what is more saves no time.
_SHARE = 16
_MOST_BYTES = 1 << 32
# Float32 copies of a projection's output that are there at the same time.
_COPIES = 4


class Batches(Protocol):
    """A calibration set: the same batches each time it is iterated (``calibration/data.py``)."""

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]: ...


class LargerBatches:
    """A calibration set in batches of ``size`` sequences."""

    def __init__(self, calibration: Batches, size: int) -> None:
        self._calibration, self.size = calibration, size

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        return self._calibration.batches(batch_size or self.size)


def in_large_batches(calibration: Batches, config: ModelConfig, device: torch.device) -> Batches:
    """On a GPU as many sequences at once as fit, if these are more than the set's own; else as it is.

    Speed only: the batches hold the same sequences in the same order.
    """
    if device.type != "cuda":
        return calibration
    ids, _ = next(iter(calibration.batches()))  # the longest sequences come first
    fits = sequences_at_once(config, ids.shape[1], torch.cuda.get_device_properties(device).total_memory)
    return LargerBatches(calibration, fits) if fits > ids.shape[0] else calibration


def sequences_at_once(config: ModelConfig, length: int, memory_bytes: int) -> int:
    """Sequences of ``length`` tokens whose forward pass fits a GPU with so much memory: a power of two."""
    outputs = sum(out_features for out_features, _ in projections(config).values())
    each = _COPIES * torch.float32.itemsize * outputs * length
    fits = min(_MOST_BYTES, memory_bytes // _SHARE) // each
    return 1 << max(1, fits).bit_length() - 1


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that tensors took on a GPU since the last reset, models included; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
