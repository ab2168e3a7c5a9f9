"""What the machine has and does: its name, memory bandwidth, peak memory, energy."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Bytes of the buffer that is copied, unless the caches ask for more or the memory for less.
COPY_BYTES = 1 << 28
_LARGEST_COPY_BYTES = 1 << 30
_COPIES = 5
# Rows and columns of the matrices that are multiplied: long enough to fill a machine, short on a slow one.
_MATRIX_SIDE = {"cuda": 4096, "cpu": 512}
_PRODUCTS = 5
# Of the counter of energy: time between readings, and without a move after which it is taken to stand still.
_READ_SECONDS = 0.02
_STANDS_STILL = 0.5
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


def energy_of_run_mj(
    device: torch.device, run: Callable[[], object], run_seconds: float, seconds: float
) -> float | None:
    """Millijoules of one run by the counter of an NVIDIA GPU (nvidia-ml-py), idle power included.

    The counter moves some ten times a second. So runs follow one another for at least ``seconds``, from one
    move of it to another. None on a CPU, without the package, and without a counter that moves.

    run          may leave work to the device
    run_seconds  about what it takes
    """
    if device.type != "cuda":
        return None
    several = math.ceil(_READ_SECONDS / max(run_seconds, 1e-6))  # reading takes as long as short runs do
    with _energy_counter(device) as read:
        first = begun = read()
        start = time.perf_counter()
        while begun is not None and begun == first and time.perf_counter() - start < _STANDS_STILL:
            _runs(device, run, several)
            begun = read()
        if begun is None or begun == first:
            return None
        runs, before, now = 0, begun, begun
        start = time.perf_counter()
        while (waited := time.perf_counter() - start) < seconds or now == before:
            if waited > seconds + _STANDS_STILL:
                return None
            _runs(device, run, several)
            runs += several
            before, found = now, read()
            if found is None:
                return None
            now = found
        return (now - begun) / runs


def _runs(device: torch.device, run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()
    torch.cuda.synchronize(device)


@contextmanager
def _energy_counter(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Reads the millijoules that a GPU has used since its driver was loaded; None where it cannot."""
    try:
        import pynvml
    except ImportError:
        yield lambda: None
        return

    def read() -> int | None:
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(_nvml_handle(pynvml, device)))
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield lambda: None
        return
    try:
        yield read
    finally:
        pynvml.nvmlShutdown()


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
