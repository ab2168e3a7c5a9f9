"""Packed weights written out once, for products with so many rows that this costs little."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.words import round_code

#: Rows and bytes of a row that a program writes out.
_ROWS, _BYTES = 8, 256


def unpack(weight: QuantizedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of ``weight.dequantize(dtype)``, every bit; of ``weight.integers()[0]`` where dtype is int8.

    dtype    int8, float16, bfloat16 or float32
    returns  (stop - start, K), contiguous
    """
    rows, inputs = weight.shape
    stop = rows if stop is None else stop
    data, bits = weight.data[start:stop], weight.format.bits
    out = torch.empty(stop - start, inputs, dtype=dtype, device=data.device)
    if out.numel() == 0:
        return out
    one, two = weight.channel_scale is None, weight.channel_scale is not None
    to_codes = dtype == torch.int8
    pitch, group = data.shape[1], inputs // weight.scale.shape[1] * bits  # bits of what shares a scale
    _unpack[(triton.cdiv(pitch, _BYTES), triton.cdiv(stop - start, _ROWS))](
        data,
        None if one and to_codes else _rows(weight.scale, start, stop),
        _rows(weight.channel_scale, start, stop) if two and not to_codes else None,
        out,
        stop - start,
        PITCH=pitch,
        GROUPS=weight.scale.shape[1],
        # Groups are blocks of the tile, where they fit it, and need one scale each; else one a code.
        PER_SCALE=min(group // 8, _BYTES) if 8 * _BYTES % group == 0 or group % (8 * _BYTES) == 0 else 1,
        ONE_ROW_SCALE=weight.scale.shape[0] == 1,
        BITS=bits,
        TWO_LEVEL=two,
        ROWS=_ROWS,
        BYTES=_BYTES,
        num_warps=4,
    )
    return out


def _rows(scale: Tensor | None, start: int, stop: int) -> Tensor | None:
    return scale if scale is None or scale.shape[0] == 1 else scale[start:stop]


@triton.jit
def _unpack(
    data, scale, row_scale, out, rows,
    PITCH: tl.constexpr, GROUPS: tl.constexpr, PER_SCALE: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    BITS: tl.constexpr, TWO_LEVEL: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Program (bytes of rows, rows). PER_SCALE neighbours of a tile's bytes have one scale."""
    first_row, first = tl.program_id(1).to(tl.int64) * ROWS, tl.program_id(0) * BYTES
    row, byte = tl.arange(0, ROWS), first + tl.arange(0, BYTES)
    inside = (row < rows - first_row)[:, None] & (byte < PITCH)[None, :]
    w = tl.load(data + first_row * PITCH + (row[:, None] * PITCH + byte[None, :]), mask=inside, other=0)
    w = tl.reshape(w, [ROWS, BYTES // PER_SCALE, PER_SCALE])
    in_row = (row < rows - first_row)[:, None]
    top = None
    if row_scale is not None:
        top = tl.load(row_scale + first_row + row[:, None], mask=in_row, other=0.0)[:, :, None]
    code = (first + tl.arange(0, BYTES // PER_SCALE) * PER_SCALE) * (8 // BITS)
    if scale is not None:
        scale += 0 if ONE_ROW_SCALE else first_row * GROUPS
        scale += (row * 0 if ONE_ROW_SCALE else row * GROUPS)[:, None]
    level = _level(scale, code, in_row, PITCH * 8 // BITS, GROUPS)
    if BITS == 4:
        low = (w << 4).to(tl.int8, bitcast=True) >> 4
        high = w.to(tl.int8, bitcast=True) >> 4
        other = level
        if PER_SCALE == 1:  # a group may end within a byte
            other = _level(scale, code + 1, in_row, PITCH * 8 // BITS, GROUPS)
        y = tl.interleave(_real(low, level, top, out, TWO_LEVEL), _real(high, other, top, out, TWO_LEVEL))
        y = tl.reshape(y, [ROWS, 2 * BYTES])
        column = 2 * first + tl.arange(0, 2 * BYTES)
        at = out + first_row * (2 * PITCH) + (row[:, None] * (2 * PITCH) + column[None, :])
        tl.store(at, y, mask=in_row & (column < 2 * PITCH)[None, :])
    else:
        y = tl.reshape(_real(w, level, top, out, TWO_LEVEL), [ROWS, BYTES])
        tl.store(out + first_row * PITCH + (row[:, None] * PITCH + byte[None, :]), y, mask=inside)


@triton.jit
def _level(scale, code, in_row, INPUTS: tl.constexpr, GROUPS: tl.constexpr):
    """The scales of the groups of codes, for every row, as (rows, codes, 1); None where there are none."""
    if scale is None:
        level = None
    else:
        group = code // (INPUTS // GROUPS)
        level = tl.load(scale + group[None, :], mask=in_row & (group < GROUPS)[None, :], other=0.0)[
            :, :, None
        ]
    return level


@triton.jit
def _real(code, level, top, out, TWO_LEVEL: tl.constexpr):
    """In out's dtype. A product of a code and a scale of 16 bits is exact in float32: it is rounded once."""
    dtype: tl.constexpr = out.dtype.element_ty
    value = code
    if level is not None:
        if TWO_LEVEL:
            value = round_code(code.to(tl.float32) * level.to(tl.float32))
            if top is not None:
                value = value.to(tl.float32) * top.to(dtype).to(tl.float32)
        else:
            value = code.to(tl.float32) * level.to(dtype).to(tl.float32)
    return value.to(dtype)
