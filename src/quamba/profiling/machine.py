"""What the machine has and does: its name, memory bandwidth, peak memory, energy."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

#: Bytes of the buffer that is copied, unless the caches ask for more or the memory for less.
COPY_BYTES = 1 << 28
_LARGEST_COPY_BYTES = 1 << 30
_COPIES = 5
# Rows and columns of the matrices that are multiplied: long enough to fill a machine, short on a slow one.
_MATRIX_SIDE = {"cuda": 4096, "cpu": 512}
_PRODUCTS = 5
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class PeakMemory:
    """size_bytes, and what it is the peak of."""

    size_bytes: int
    covers: str


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def copy_bandwidth_gb_per_s(device: torch.device, size_bytes: int | None = None) -> float:
    """10^9 bytes a second, read and written, of copying a buffer of size_bytes: the median of five copies.

    size_bytes  None: one larger than the caches
    """
    size = copy_bytes(device) if size_bytes is None else size_bytes
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)  # the first touch maps the pages
    seconds = [_timed(device, lambda: target.copy_(source)) for _ in range(_COPIES)]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def matmul_gflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """10^9 additions and multiplications a second of a product of square matrices: the median of five."""
    side = _MATRIX_SIDE[device.type]
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = left @ right  # the first product chooses kernels
    seconds = [_timed(device, lambda: torch.matmul(left, right, out=out)) for _ in range(_PRODUCTS)]
    return 2 * side**3 / statistics.median(seconds) / 1e9


def copy_bytes(device: torch.device) -> int:
    """Four times the last cache of a CPU at least, and a quarter of a GPU's free memory at most."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(_LARGEST_COPY_BYTES, free // 4)
    return min(max(COPY_BYTES, 4 * _largest_cache_bytes()), _LARGEST_COPY_BYTES)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory | None:
    """Of tensors on a GPU since ``reset_peak``; on a CPU of the whole process; None on Windows."""
    if device.type == "cuda":
        return PeakMemory(torch.cuda.max_memory_allocated(device), "tensors on the GPU while it was timed")
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(size, "the whole process since its start")


class EnergyMeter:
    """Energy of an NVIDIA GPU between entering and leaving, by its own counter (nvidia-ml-py).

    spent_mj  millijoules, idle power included; None on a CPU, without the package, for a GPU without the
              counter, and where the time was too short for the counter to move
    """

    spent_mj: float | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> EnergyMeter:
        self._before = total_energy_mj(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = None if self._before is None else total_energy_mj(self._device)
        if self._before is not None and after is not None and after > self._before:
            self.spent_mj = float(after - self._before)


def total_energy_mj(device: torch.device) -> int | None:
    """What a GPU has used since its driver was loaded; None where that cannot be read."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(_nvml_handle(pynvml, device)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _nvml_handle(pynvml: Any, device: torch.device) -> Any:
    """By UUID: NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _largest_cache_bytes() -> int:
    """Of the first core; 0 where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
