"""Packed weights written out once, for products with so many rows that this costs little."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.words import NATIVE, round_code

#: Rows and bytes of a row that a program writes out; of integers of whole rows words of eight codes.
_ROWS, _BYTES, _WORDS = 8, 256, 128
#: The bytes of $2 and $3 in turn: the low nibbles of a word were the even codes.
_IN_TURN = tl.constexpr("prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;")


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


def unpack_whole(weight: QuantizedWeight, unit: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of a weight whose format has ``multiples``, as integers of one scale a row.

    weight   (N, K), ``has_whole_rows``
    unit     float32 (N, 1), ``weight.row_unit()``
    returns  int8 (stop - start, K): codes times scale / unit, exactly
    """
    rows, inputs = weight.shape
    stop = rows if stop is None else stop
    data, scale = weight.data[start:stop], weight.scale[start:stop]
    out = torch.empty(stop - start, inputs, dtype=torch.int8, device=data.device)
    if out.numel() == 0:
        return out
    words, groups = inputs // 8, scale.shape[1]
    of_group = words // groups
    together = min(max(1, _WORDS // of_group), triton.next_power_of_2(groups))
    _unpack_whole[(triton.cdiv(groups, together), triton.cdiv(stop - start, _ROWS))](
        data, scale, unit[start:stop], out, stop - start,
        WORDS=words, GROUPS=groups, OF_GROUP=of_group, ROWS=_ROWS, TOGETHER=together,
        num_warps=4, **dependent_launch(data.device),
    )  # fmt: skip
    return out


def has_whole_rows(weight: QuantizedWeight) -> bool:
    """Whether ``unpack_whole`` takes the weight: multiples, and groups of 8, 16, 32, ... codes."""
    if weight.format.multiples is None:
        return False
    width = weight.shape[1] // weight.scale.shape[1]
    return width >= 8 and width & (width - 1) == 0


@triton.jit
def _unpack_whole(
    data, scale, unit, out, rows,
    WORDS: tl.constexpr, GROUPS: tl.constexpr, OF_GROUP: tl.constexpr, ROWS: tl.constexpr,
    TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (groups of rows, rows).

    A code plus 8, times a multiple m, is at most 240: four of them are multiplied in one word, and 128 - 8 m
    for each makes them codes times m plus 128. Codes are read, but not written out, while the kernel before
    this one runs: that one may read what was in their place.
    """
    let_next_start(EARLY)
    first_row = tl.program_id(1).to(tl.int64) * ROWS
    row, group = tl.arange(0, ROWS), tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    word = group[:, None] * OF_GROUP + tl.arange(0, OF_GROUP)[None, :]
    in_groups = (row < rows - first_row)[:, None] & (group < GROUPS)[None, :]
    inside = in_groups[:, :, None] & (word < WORDS)[None, :, :]
    at = row[:, None, None] * WORDS + word[None, :, :]
    codes = tl.load(
        data.to(tl.pointer_type(tl.int32), bitcast=True) + first_row * WORDS + at, mask=inside, other=0
    )
    codes ^= -0x77777778  # 0x88888888: each nibble plus 8
    wait_for_inputs(EARLY)
    step = tl.load(unit + first_row + row, mask=row < rows - first_row, other=1.0)
    scales = tl.load(
        scale + first_row * GROUPS + (row[:, None] * GROUPS + group[None, :]), mask=in_groups, other=0.0
    )
    m = (scales.to(tl.float32) / step[:, None] + 0.5).to(tl.int32)[:, :, None]
    up = (128 - 8 * m) * 0x01010101
    even = ((codes & 0x0F0F0F0F) * m + up) ^ -0x7F7F7F80  # 0x80808080: minus 128
    odd = (((codes >> 4) & 0x0F0F0F0F) * m + up) ^ -0x7F7F7F80
    if NATIVE:
        first, second = tl.inline_asm_elementwise(
            _IN_TURN, "=&r,=&r,r,r", [even, odd], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        first = (even & 0xFF) | ((odd & 0xFF) << 8) | ((even & 0xFF00) << 8) | ((odd & 0xFF00) << 16)
        even, odd = even >> 16, odd >> 16
        second = (even & 0xFF) | ((odd & 0xFF) << 8) | ((even & 0xFF00) << 8) | ((odd & 0xFF00) << 16)
    word = 2 * group[:, None] * OF_GROUP + tl.arange(0, 2 * OF_GROUP)[None, :]
    inside = in_groups[:, :, None] & (word < 2 * WORDS)[None, :, :]
    at = row[:, None, None] * (2 * WORDS) + word[None, :, :]
    to = out.to(tl.pointer_type(tl.int32), bitcast=True) + 2 * first_row * WORDS + at
    tl.store(to, tl.interleave(first, second), mask=inside)


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
