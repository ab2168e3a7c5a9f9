"""Few programs, for the interpreter's time is theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def use_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets how many rows a program of a projection has, and how many elements of one it takes at a time."""
    from quamba.kernels.triton.decode import project

    def use(rows: int, chunk: int) -> None:
        launch = project.RowLaunch(rows=rows, chunk=chunk, warps=1 if rows <= 16 else 4)
        monkeypatch.setattr(project, "row_launch", lambda *sizes, **named: launch)

    return use


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch, use_rows: Callable[[int, int], None]) -> None:
    """For whole steps in the interpreter; a GPU has the launches that it always has."""
    from quamba.kernels.triton.decode import scan, ssd

    if not torch.cuda.is_available():
        use_rows(256, 64)
        monkeypatch.setattr(ssd, "ssd_launch", lambda *sizes, **named: ssd.SsdLaunch(channels=64, warps=4))
        monkeypatch.setattr(
            scan, "scan_launch", lambda *sizes, **named: scan.ScanLaunch(channels=64, warps=4)
        )
