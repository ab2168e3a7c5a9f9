"""Static symmetric int8 quantization, and what the other kernels share: rounding, SiLU, tiles, checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Overflow, Rounding
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.words import reciprocal


@dataclass(frozen=True)
class Tile:
    """What one program works on, and with how many warps."""

    rows: int
    columns: int
    num_warps: int


@launch_choice("rows.tile")
def whole_row_tile(rows: int, columns: int) -> Tile:
    """For kernels that need a row at once: several short rows a program once there are rows for all SMs."""
    width = triton.next_power_of_2(columns)
    together = max(1, min(4096 // width, triton.next_power_of_2(triton.cdiv(rows, 512))))
    return Tile(together, width, max(1, min(16, together * width // 256)))


@launch_choice("elements.tile")
def flat_tile(rows: int, columns: int) -> Tile:
    """For elementwise kernels: 2048 elements a program, fewer where that would leave SMs idle."""
    elements = 2048 if rows * columns >= 2048 * 512 else 512
    width = min(elements, triton.next_power_of_2(columns))
    together = min(elements // width, triton.next_power_of_2(rows))
    return Tile(together, width, max(1, together * width // 512))


@triton.jit
def to_codes(quotient: tl.tensor, HALF_AWAY: tl.constexpr, WRAP: tl.constexpr) -> tl.tensor:
    """int8 of a float32 quotient: rounded, then saturated or the low 8 bits (``Rounding``, ``Overflow``)."""
    if WRAP:
        size = tl.abs(quotient)
        whole = tl.floor(size)
        rest = size - whole
        if HALF_AWAY:
            up = rest >= 0.5
        else:
            up = (rest > 0.5) | ((rest == 0.5) & (whole != 2 * tl.floor(whole * 0.5)))
        whole += up.to(tl.float32)
        signed = tl.where(quotient < 0, -whole, whole)
        # 2147483520 is the largest float32 below 2^31. Above it counts as 2^31 - 1, whose low byte is -1.
        inside = tl.minimum(tl.maximum(signed, -2147483648.0), 2147483520.0).to(tl.int32)
        return tl.where(signed >= 2147483648.0, -1, inside).to(tl.int8)
    value = tl.minimum(tl.maximum(quotient, -128.0), 127.0)
    if HALF_AWAY:
        whole = value.to(tl.int32)
        rest = value - whole.to(tl.float32)
        return (whole + (rest >= 0.5).to(tl.int32) - (rest <= -0.5).to(tl.int32)).to(tl.int8)
    # Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
    return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    return x * reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _quantize_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_column_stride: tl.tensor,
    column_blocks: tl.tensor,
    ONE_SCALE: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    let_next_start(EARLY)
    wait_for_inputs(EARLY)  # the scale, too, may have been made just before
    program = tl.program_id(0).to(tl.int64)
    row = (program // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if ONE_SCALE:
        step = tl.load(scale).to(tl.float32)
    else:
        place = row * scale_row_stride + column * scale_column_stride
        step = tl.load(scale + place, mask=inside, other=1).to(tl.float32)
    codes = to_codes(tl.div_rn(value, step), HALF_AWAY, WRAP)
    tl.store(y + row * columns + column, codes, mask=inside)


def quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> Tensor:
    """``reference.quantize.quantize`` of float16, bfloat16 or float32; the quotient is always float32."""
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return y
    flat, scales = as_rows("x", x), scale.expand(x.shape).reshape(-1, x.shape[-1] if x.ndim else 1)
    one_scale = scale.numel() == 1
    if one_scale and flat.is_contiguous():
        flat = flat.view(1, -1)
    rows, columns = flat.shape
    tile = flat_tile(rows, columns)
    column_blocks = triton.cdiv(columns, tile.columns)
    _quantize_kernel[(triton.cdiv(rows, tile.rows) * column_blocks,)](
        flat,
        scales,
        y,
        rows,
        columns,
        flat.stride(0),
        0 if one_scale else scales.stride(0),
        0 if one_scale else scales.stride(1),
        column_blocks,
        ONE_SCALE=one_scale,
        HALF_AWAY=rounding == "half_away",
        WRAP=overflow == "wrap",
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        **dependent_launch(y.device),
    )
    return y


def as_rows(name: str, x: Tensor) -> Tensor:
    """(..., C) -> (tokens, C), a view wherever the rows are evenly spaced; ValueError if C is strided."""
    check_dtype(name, x)
    if x.ndim == 0:
        return x.view(1, 1)
    check_last_stride(name, x)
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def check_last_stride(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension, expected 1.")


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError(f"{name} is float64, expected at most 32 bits; the reference kernels take float64.")


def check_scale(name: str, scale: Tensor, channels: int) -> bool:
    """Whether the scale is one a channel (rather than a scalar); ValueError for any other shape."""
    if scale.numel() == 1:
        return False
    if tuple(scale.shape) != (channels,) or scale.stride(0) != 1:
        raise ValueError(
            f"{name} has shape {list(scale.shape)} and stride {scale.stride()}, expected () or [{channels}]."
        )
    return True
