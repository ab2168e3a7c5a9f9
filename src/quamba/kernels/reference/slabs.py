"""Rows worked on at a time, so that what one step writes the next still finds in the caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CPU_ROWS = 512


def slabs(n_rows: int, device: torch.device, *, cpu_rows: int = CPU_ROWS) -> Iterator[tuple[int, int]]:
    """(start, stop) of each slab; on anything but a CPU all rows are one."""
    step = cpu_rows if device.type == "cpu" else max(n_rows, 1)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)
