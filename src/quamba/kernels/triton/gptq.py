"""The weight solver's loops over columns, each as one launch: rows have nothing to do with each other.

A program owns some rows and keeps what its columns so far have passed on in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.launches import launch_choice


@dataclass(frozen=True)
class Strip:
    """Rows that one program owns, and its warps."""

    rows: int
    num_warps: int


@launch_choice("gptq.strip")
def strip(columns: int) -> Strip:
    """One warp where 64 numbers a thread hold all columns: its sums then need no barrier."""
    return Strip(16, max(1, min(16, triton.next_power_of_2(columns) // 128)))


@triton.jit
def _columns_kernel(
    wanted: tl.tensor,
    target: tl.tensor,
    matrix: tl.tensor,
    steps: tl.tensor,
    codes: tl.tensor,
    passed: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    wanted_stride: tl.tensor,
    target_stride: tl.tensor,
    matrix_stride: tl.tensor,
    step_column_stride: tl.tensor,
    step_row_stride: tl.tensor,
    qmin: tl.tensor,
    qmax: tl.tensor,
    DESCEND: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Both loops: ``wanted`` is the slope and ``target`` the codes of a descent."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK_COLUMNS)
    wanted += row
    target += row
    steps += row * step_row_stride
    codes += row
    passed += row
    carried = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], dtype=tl.float32)
    for i in range(columns):
        value = tl.load(wanted, mask=inside, other=0.0)
        before = tl.load(target, mask=inside, other=0.0)
        step = tl.load(steps, mask=inside, other=1.0)
        weights = tl.load(matrix + column, mask=column < i, other=0.0)
        value += tl.sum(weights[:, None] * carried, axis=0)
        if DESCEND:
            value = before + tl.div_rn(value, tl.load(matrix + i) * step)
        else:
            value = tl.div_rn(value, step)
        # Adding 1.5 * 2^23 and taking it away rounds to an integer, half to even.
        code = (tl.minimum(tl.maximum(value, qmin), qmax) + 12582912.0) - 12582912.0
        if DESCEND:
            change = (before - code) * step
        else:
            change = before - code * step
        tl.store(codes, code, mask=inside)
        tl.store(passed, change, mask=inside)
        carried = tl.where(column[:, None] == i, change[None, :], carried)
        wanted += wanted_stride
        target += target_stride
        matrix += matrix_stride
        steps += step_column_stride
        codes += rows
        passed += rows


def round_columns(
    wanted: Tensor, target: Tensor, feedback: Tensor, steps: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """``reference.gptq.round_columns`` of float32."""
    _check("target", target, wanted)
    return _columns(wanted, target, feedback, steps, qmin, qmax, descend=False)


def descend_columns(
    slope: Tensor, codes: Tensor, curvature: Tensor, steps: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """``reference.gptq.descend_columns`` of float32."""
    _check("codes", codes, slope)
    return _columns(slope, codes, curvature, steps, qmin, qmax, descend=True)


def _columns(
    wanted: Tensor, target: Tensor, matrix: Tensor, steps: Tensor, qmin: int, qmax: int, *, descend: bool
) -> tuple[Tensor, Tensor]:
    columns, rows = wanted.shape
    codes = torch.empty(columns, rows, dtype=torch.float32, device=wanted.device)
    passed = torch.empty_like(codes)
    _check("slope" if descend else "wanted", wanted, wanted)
    _check("curvature" if descend else "feedback", matrix, wanted)
    if wanted.numel() == 0:
        return codes, passed
    by_row = steps.to(torch.float32).expand(columns, rows)
    launch = strip(columns)
    with torch.cuda.device_of(wanted):  # Triton launches on the current GPU, not on that of its tensors
        _columns_kernel[(triton.cdiv(rows, launch.rows),)](
            wanted,
            target,
            matrix,
            by_row,
            codes,
            passed,
            columns,
            rows,
            wanted.stride(0),
            target.stride(0),
            matrix.stride(0),
            by_row.stride(0),
            by_row.stride(1),
            float(qmin),
            float(qmax),
            DESCEND=descend,
            BLOCK_COLUMNS=triton.next_power_of_2(columns),
            BLOCK_ROWS=launch.rows,
            num_warps=launch.num_warps,
        )
    return codes, passed


def _check(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"{name} is {x.dtype}, expected float32; the reference kernels take float64.")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} has stride {x.stride(1)} in its last dimension, expected 1.")
    if x.shape[0] != like.shape[0]:
        raise ValueError(f"{name} has {x.shape[0]} columns, expected {like.shape[0]}.")
