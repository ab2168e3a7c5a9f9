"""Packed weights written out once, for products with so many rows that this costs little."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.words import round_code

_BLOCK = 2048


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
    elements = data.numel()
    _unpack[(triton.cdiv(elements, _BLOCK),)](
        data,
        None if one and to_codes else _rows(weight.scale, start, stop),
        _rows(weight.channel_scale, start, stop) if two and not to_codes else None,
        out,
        elements,
        INPUTS=inputs,
        GROUPS=weight.scale.shape[1],
        ONE_ROW_SCALE=weight.scale.shape[0] == 1,
        BITS=bits,
        TWO_LEVEL=two,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out


def _rows(scale: Tensor | None, start: int, stop: int) -> Tensor | None:
    return scale if scale is None or scale.shape[0] == 1 else scale[start:stop]


@triton.jit
def _unpack(
    data, scale, row_scale, out, elements,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr, BITS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    j = start + tl.arange(0, BLOCK)
    valid = j < elements
    row, column = j // (INPUTS // P), j % (INPUTS // P) * P
    w = tl.load(data + j, mask=valid, other=0)
    if BITS == 4:
        low = (w << 4).to(tl.int8, bitcast=True) >> 4
        high = w.to(tl.int8, bitcast=True) >> 4
        a = _real(low, row, column, valid, scale, row_scale, out, INPUTS, GROUPS, ONE_ROW_SCALE, TWO_LEVEL)
        b = _real(
            high, row, column + 1, valid, scale, row_scale, out, INPUTS, GROUPS, ONE_ROW_SCALE, TWO_LEVEL
        )
        y = tl.interleave(a, b)
        at = start * 2 + tl.arange(0, 2 * BLOCK)
        tl.store(out + at, y, mask=at < elements * 2)
    else:
        y = _real(w, row, column, valid, scale, row_scale, out, INPUTS, GROUPS, ONE_ROW_SCALE, TWO_LEVEL)
        tl.store(out + j, y, mask=valid)


@triton.jit
def _real(
    code, row, column, valid, scale, row_scale, out,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr, TWO_LEVEL: tl.constexpr,
):  # fmt: skip
    """In out's dtype. A product of a code and a scale of 16 bits is exact in float32: it is rounded once."""
    dtype: tl.constexpr = out.dtype.element_ty
    value = code
    if scale is not None:
        row = row * 0 if ONE_ROW_SCALE else row
        group = tl.load(scale + row * GROUPS + column // (INPUTS // GROUPS), mask=valid, other=0.0)
        if TWO_LEVEL:
            value = round_code(code.to(tl.float32) * group.to(tl.float32))
            if row_scale is not None:
                top = tl.load(row_scale + row, mask=valid, other=0.0)
                value = value.to(tl.float32) * top.to(dtype).to(tl.float32)
        else:
            value = code.to(tl.float32) * group.to(dtype).to(tl.float32)
    return value.to(dtype)
