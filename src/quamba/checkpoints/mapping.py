"""Memory that is mapped from files: who has it, and giving its pages back."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED of Linux


def drop_pages(tensors: Iterable[Tensor]) -> None:
    """Let the system take back the pages of tensors that are mapped from files and were not written to.

    They are read from the file again when they are looked at. Tensors in other memory are left alone, and so
    is everything where the system is not Linux.
    """
    found = [t for t in tensors if t.device.type == "cpu" and t.numel()]
    if not found or not sys.platform.startswith("linux"):
        return
    ranges = _file_ranges()
    starts = [start for start, _ in ranges]
    for tensor in found:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect_right(starts, first) - 1
        if at < 0 or last > ranges[at][1] or not tensor.is_contiguous():
            continue
        page = mmap.PAGESIZE
        start, stop = -(-first // page) * page, last // page * page  # pages that hold nothing else
        if stop > start:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONT_NEED)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _file_ranges() -> list[tuple[int, int]]:
    """[start, stop) of the memory that is mapped from files, ascending; neighbours are not joined."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and fields[4] != "0":
            start, _, stop = fields[0].partition("-")
            ranges.append((int(start, 16), int(stop, 16)))
    return ranges
