"""Embedding lookup from a float or quantized table."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.dependency import (
    ORDINARY_LAUNCH,
    dependent_launch,
    let_next_start,
    wait_for_inputs,
)
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import Tile, check_dtype, check_last_stride

_ROUNDED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@launch_choice("embedding.tile")
def embedding_tile(columns: int) -> Tile:
    """One token and up to 1024 columns a program: a row is a few KiB at most, and rows are far apart."""
    width = min(1024, triton.next_power_of_2(columns))
    return Tile(1, width, max(1, min(4, width // 256)))


@triton.jit
def _embedding_kernel(
    ids: tl.tensor,
    table: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    vocabulary: tl.tensor,
    columns: tl.tensor,
    table_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    group_width: tl.tensor,
    column_blocks: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    THROUGH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """THROUGH: a type to which values are rounded before that of y, or None."""
    let_next_start(EARLY)
    program = tl.program_id(0).to(tl.int64)
    token = program // column_blocks
    column = (program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int32)
    inside = column < columns
    wait_for_inputs(EARLY)
    row = tl.load(ids + token).to(tl.int64)
    known = (row >= 0) & (row < vocabulary)
    row = tl.where(known, row, 0)
    if BITS == 4:
        byte = tl.load(table + row * table_stride + column // 2, mask=inside, other=0).to(tl.int32)
        nibble = (byte >> (column % 2 * 4)) & 15
        value = ((nibble ^ 8) - 8).to(tl.float32)
    else:
        value = tl.load(table + row * table_stride + column, mask=inside, other=0).to(tl.float32)
    if scale is not None:
        place = scale + row * scale_row_stride + column // group_width
        value *= tl.load(place, mask=inside, other=0).to(tl.float32)
    value = tl.where(known, value, float("nan"))
    if THROUGH is not None:
        value = value.to(THROUGH)
    tl.store(y + token * columns + column, value.to(y.dtype.element_ty), mask=inside)


def embedding(
    ids: Tensor, weight: Tensor | QuantizedWeight, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``reference.embedding.embedding``. An id outside the table gives a row of NaN: raising would need to
    wait for the device."""
    y = torch.empty(*ids.shape, weight.shape[1], dtype=out_dtype, device=ids.device)
    _look_up(ids, weight, y, None, dependent_launch(y.device))
    return y


def embed(ids: Tensor, weight: Tensor | QuantizedWeight, out: Tensor, rounds_to: torch.dtype) -> None:
    """out (tokens, columns), contiguous, becomes what ``embedding`` gives as ``rounds_to``.

    An ordinary launch: it begins after the end of all before it.
    """
    assert out.is_contiguous()
    _look_up(ids, weight, out, _ROUNDED.get(rounds_to), ORDINARY_LAUNCH)


def _look_up(
    ids: Tensor, weight: Tensor | QuantizedWeight, y: Tensor, through: Any, how: dict[str, Any]
) -> None:
    quantized = weight if isinstance(weight, QuantizedWeight) else None
    if quantized is not None and quantized.channel_scale is not None:
        raise ValueError("weight is of granularity 'two_level', expected one level of scales.")
    table = weight.data if quantized is None else quantized.data
    vocabulary, columns = weight.shape
    check_dtype("weight", table)
    check_last_stride("weight", table)
    check_dtype("out_dtype", y)
    if y.numel() == 0:
        return
    tile = embedding_tile(columns)
    column_blocks = triton.cdiv(columns, tile.columns)
    _embedding_kernel[(ids.numel() * column_blocks,)](
        ids.contiguous(),
        table,
        None if quantized is None else quantized.scale,
        y,
        vocabulary,
        columns,
        table.stride(0),
        0 if quantized is None or quantized.scale.shape[0] == 1 else quantized.scale.stride(0),
        columns if quantized is None else columns // quantized.scale.shape[1],
        column_blocks,
        BITS=8 if quantized is None else quantized.format.bits,
        BLOCK_COLUMNS=tile.columns,
        THROUGH=through,
        num_warps=tile.num_warps,
        **how,
    )
