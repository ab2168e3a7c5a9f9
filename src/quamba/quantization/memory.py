"""How much memory a quantization may use: what of it is taken at once, and where the rest goes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from quamba.calibration.collect import Batch
from quamba.errors import QuambaError
from quamba.models.config import ModelConfig
from quamba.recipes.plan import projections

Place = Literal["device", "memory", "file"]

# For the activations of one forward pass: a sixteenth of the GPU's memory, and what is more saves no time.
_SHARE = 16
_MOST_BYTES = 1 << 32
# Float32 copies of a projection's output that are there at the same time.
_COPIES = 4
# What hidden states of the calibration set may take, of a GPU's memory and of the machine's.
_STATES_OF_GPU, _STATES_OF_MEMORY = 8, 4
_MEMINFO = Path("/proc/meminfo")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Budget:
    """What a quantization may take. Where hidden states lie and how many sequences go at once follow from it.

    device        that computes
    gpu_bytes     of a GPU; None: all of it
    memory_bytes  of the machine; None: what is free

    The places change no number; other batches do, as far as sums in another order are other sums.
    """

    device: torch.device
    gpu_bytes: int | None = None
    memory_bytes: int | None = None

    def device_bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        whole = torch.cuda.get_device_properties(self.device).total_memory
        return whole if self.gpu_bytes is None else min(whole, self.gpu_bytes)

    def place(self, states_bytes: int) -> Place:
        """Where hidden states of so many bytes go."""
        if self.device.type == "cuda" and states_bytes <= self.device_bytes() // _STATES_OF_GPU:
            return "device"
        memory = free_bytes() if self.memory_bytes is None else self.memory_bytes
        return "file" if memory is not None and states_bytes > memory // _STATES_OF_MEMORY else "memory"


def parse_size(text: str) -> int:
    """Bytes of "8G", "500M" or a plain number; 1K is 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise QuambaError(f"The memory size is '{text}', expected a number of bytes such as 8G or 500M.")
    return size


def free_bytes() -> int | None:
    """Memory that programs could still have; None where the system does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


class Batches(Protocol):
    """A calibration set: the same batches each time it is iterated (``calibration/data.py``)."""

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]: ...


class LargerBatches:
    """A calibration set in batches of ``size`` sequences."""

    def __init__(self, calibration: Batches, size: int) -> None:
        self._calibration, self.size = calibration, size

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        return self._calibration.batches(batch_size or self.size)


def in_large_batches(calibration: Batches, config: ModelConfig, budget: Budget) -> Batches:
    """On a GPU as many sequences at once as fit, if these are more than the set's own; else as it is.

    Under a limit that the set's own batches do not fit, as many as do. The batches hold the same sequences in
    the same order.
    """
    if budget.device.type != "cuda":
        return calibration
    ids, _ = next(iter(calibration.batches()))  # the longest sequences come first
    fits = sequences_at_once(config, ids.shape[1], budget.device_bytes())
    limited = budget.gpu_bytes is not None
    return LargerBatches(calibration, fits) if fits > ids.shape[0] or limited else calibration


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
    """The most that tensors took on a GPU since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
