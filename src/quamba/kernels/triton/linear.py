"""Products with quantized weights: a few rows word by word, more of them on tensor cores (``gemm.py``, and
``gemm_wide.py`` for prompts)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.reference import linear as reference
from quamba.kernels.reference.quantize import quantize_or_cast
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.gemm import Operand, Product, Target, finish, fits, multiply, product_key
from quamba.kernels.triton.gemm_wide import WIDE_ROWS, WIDE_TILES, multiply_wide, wide_fits, wide_tiles
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.planes import level_words
from quamba.kernels.triton.recurrence import PROCESSORS
from quamba.kernels.triton.unpack import has_whole_rows, unpack, unpack_whole
from quamba.kernels.triton.words import (
    HIGH_NIBBLES,
    dot4,
    even_bytes,
    high_halves,
    int4_times_half,
    low_halves,
    odd_bytes,
)

#: Rows of x up to which weights are multiplied word by word; a tensor core would idle on most of its tile.
FEW_ROWS = 4
#: Rows of float16 up to which our kernel multiplies with integer weights as they are.
HALF_ROWS = 256
#: Rows of int8 up to which packed weights are taken apart by every tile that needs them; else once, before.
#: Those with scales of groups always are: int8 with such scales would take as long.
PACKED_ROWS = 1024
#: Unless the scales of a row are multiples of one number: then it is int8 with a scale a row. From timings on
#: an H200 (docs/notes/gpu-kernels.md); sooner where tiles are so few that each waits for itself.
WHOLE_ROWS = 768
WHOLE_TILES = 2 * PROCESSORS
#: Weights of one product that are unpacked at a time.
_MOST_UNPACKED = 1 << 25
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class WordLaunch:
    """Weight rows a program, 32-bit words of a row at a time, warps."""

    rows: int
    words: int
    warps: int


def word_candidates(product: Product) -> list[WordLaunch]:
    words = triton.next_power_of_2(product.inputs * product.bits // 32)
    least = product.group * product.bits // 32 if product.scales == "group" else 1
    shapes = [(rows, size, 1) for size in (64, 128) for rows in (1, 2, 4, 8)]
    shapes += [(4, 32, 1), (1, 256, 1), (2, 256, 1), (4, 128, 2), (8, 256, 4)]
    found = {WordLaunch(rows, min(size, words), warps): None for rows, size, warps in shapes}
    return [launch for launch in found if launch.words >= least]


@launch_choice("linear.words", key=product_key, candidates=word_candidates)
def word_launch(product: Product) -> WordLaunch:
    """From timings of one row on an H200 (docs/notes/gpu-kernels.md): programs of one warp need no barrier to
    sum, and short matrices want many of them in flight."""
    words = product.inputs * product.bits // 32
    most = 128 if product.bits == 8 else 64
    rows = 2 if product.features * words < 1 << 21 else 4
    return WordLaunch(rows, min(most, triton.next_power_of_2(words)), 1)


def linear(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    input_scale_folded: bool = False,
) -> Tensor:
    """As ``kernels/reference/linear.py``: sums of integers are exact, scales of groups meet in another order.

    Float activations with float weights, or with many rows, are left to the library behind torch.
    """
    if not isinstance(weight, QuantizedWeight) or (isinstance(x, Tensor) and x.dtype not in _FLOATS):
        return reference.linear(
            x, weight, bias, out_scale=out_scale, out_dtype=out_dtype, input_scale_folded=input_scale_folded
        )
    values = x.codes if isinstance(x, Quantized) else x
    if isinstance(x, Quantized) and not input_scale_folded and x.scale.ndim:
        raise ValueError("a per-channel input scale must be folded into the weight's columns")
    x_scale = x.scale if isinstance(x, Quantized) and not input_scale_folded else None
    rows = _rows(values)
    dtype = out_dtype if out_scale is None else torch.int8
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=rows.device)
    target = Target(out, x_scale, bias, out_scale)
    if out.numel() == 0:
        pass
    elif rows.dtype == torch.int8:
        _multiply_codes(rows, weight, target)
    elif rows.dtype == torch.float16 and rows.shape[0] <= HALF_ROWS and fits(_operand(weight), True):
        _multiply_halves(rows, weight, target)
    else:
        _multiply_floats(rows, weight, target)
    return out.view(*values.shape[:-1], weight.shape[0])


def _rows(values: Tensor) -> Tensor:
    """(tokens, inputs), a row's elements next to each other; not copied where tiles can read it as it is."""
    rows = values.reshape(-1, values.shape[-1])
    pitch = rows.stride(0) * rows.element_size() if rows.numel() else 0
    readable = rows.shape[0] > FEW_ROWS and rows.stride(1) == 1 and pitch % 16 == rows.data_ptr() % 16 == 0
    if readable:
        return rows
    copied = rows.contiguous()
    return copied if copied.data_ptr() % 16 == 0 else copied.clone()


def _multiply_codes(rows: Tensor, weight: QuantizedWeight, target: Target) -> None:
    tokens, inputs = rows.shape
    operand = _operand(weight)
    bits = operand.bits
    whole_words = inputs % 8 == 0 and (operand.groups == 1 or inputs // operand.groups == 128)
    if tokens <= FEW_ROWS and whole_words:
        launch = word_launch(operand.product(rows))
        _int_words[(triton.cdiv(weight.shape[0], launch.rows),)](
            **_word_arguments(rows, operand, target, launch), BITS=bits, TWO_LEVEL=operand.levels is not None
        )
    elif _is_whole(rows, weight):
        unit = weight.row_unit()
        for start, stop in _slabs(weight):
            codes = unpack_whole(weight, unit, start, stop)
            _multiply_tiles(rows, Operand(codes, 8, row_scale=unit[start:stop]), target.columns(start, stop))
    elif bits == 8 or (fits(operand, False) and (tokens <= PACKED_ROWS or operand.group_scale is not None)):
        _multiply_tiles(rows, operand, target)
    else:
        for start, stop in _slabs(weight):
            part = operand.rows(start, stop)
            part = Operand(unpack(weight, torch.int8, start, stop), 8, part.group_scale, None, part.row_scale)
            _multiply_tiles(rows, part, target.columns(start, stop))


def _is_whole(rows: Tensor, weight: QuantizedWeight) -> bool:
    """Whether a product is one of integers of whole rows, unpacked for it."""
    if rows.shape[0] < WIDE_ROWS or not has_whole_rows(weight):
        return False
    tiles = wide_tiles(rows.shape[0], weight.shape[0])
    return tiles >= WIDE_TILES and (rows.shape[0] >= WHOLE_ROWS or tiles <= WHOLE_TILES)


def _multiply_tiles(rows: Tensor, operand: Operand, target: Target) -> None:
    if wide_fits(rows, operand):
        multiply_wide(rows, operand, target)
    else:
        multiply(rows, operand, target)


def _multiply_halves(rows: Tensor, weight: QuantizedWeight, target: Target) -> None:
    tokens, inputs = rows.shape
    operand = _operand(weight)
    whole_words = inputs % 128 == 0 and (operand.groups == 1 or inputs // operand.groups == 128)
    if tokens <= FEW_ROWS and whole_words and operand.bits == 4 and operand.levels is None:
        launch = word_launch(operand.product(rows))
        grid = (triton.cdiv(weight.shape[0], launch.rows),)
        _half_words[grid](**_word_arguments(rows, operand, target, launch))
    else:
        multiply(rows, operand, target)


@torch.no_grad()
def _multiply_floats(rows: Tensor, weight: QuantizedWeight, target: Target) -> None:
    """The reference's own arithmetic; weights become floats in a memory of bounded size."""
    for start, stop in _slabs(weight):
        part = target.columns(start, stop)
        dense = unpack(weight, rows.dtype, start, stop).t()
        in_place = part.out_scale is None and part.out.dtype == rows.dtype
        y = part.out if in_place else part.out.new_empty(part.out.shape, dtype=rows.dtype)
        if part.bias is None:
            torch.mm(rows, dense, out=y)
        else:
            torch.addmm(part.bias.to(rows.dtype), rows, dense, out=y)
        if not in_place:
            part.out.copy_(quantize_or_cast(y, part.out_scale, part.out.dtype))


def _slabs(weight: QuantizedWeight) -> Iterator[tuple[int, int]]:
    features, inputs = weight.shape
    at_once = max(1, _MOST_UNPACKED // max(1, inputs))
    for start in range(0, features, at_once):
        yield start, min(features, start + at_once)


def _operand(weight: QuantizedWeight) -> Operand:
    bits = weight.format.bits
    if weight.channel_scale is not None:
        return Operand(weight.data, bits, levels=weight.scale, row_scale=weight.channel_scale)
    if weight.scale.shape[1] > 1:
        return Operand(weight.data, bits, group_scale=weight.scale)
    return Operand(weight.data, bits, row_scale=weight.scale)


def _word_arguments(rows: Tensor, operand: Operand, target: Target, launch: WordLaunch) -> dict[str, Any]:
    scale = operand.group_scale if operand.group_scale is not None else operand.row_scale
    assert scale is not None
    return {
        "x": rows,
        "w": operand.data,
        "scale": scale,
        "levels": operand.levels,
        "x_scale": target.x_scale,
        "bias": target.bias,
        "out_scale": target.out_scale,
        "out": target.out,
        "tokens": rows.shape[0],
        "features": operand.data.shape[0],
        "INPUTS": rows.shape[1],
        "GROUPS": operand.groups,
        "ONE_ROW_SCALE": scale.shape[0] == 1,
        "CHANNEL_OUT_SCALE": target.out_scale is not None and target.out_scale.ndim == 1,
        "TOKENS": rows.shape[0],
        "ROWS": launch.rows,
        "WORDS": launch.words,
        "num_warps": launch.warps,
        **dependent_launch(rows.device),
    }


@triton.jit
def _group_scales(
    scale,
    n,
    valid,
    first,
    WORDS: tl.constexpr,
    PER: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_ROW_SCALE: tl.constexpr,
):
    """float32 (rows, WORDS / PER): the scales of the groups that begin at word ``first``."""
    g = first // PER + tl.arange(0, WORDS // PER)
    row = n[:, None] * 0 if ONE_ROW_SCALE else n[:, None]
    return tl.load(
        scale + row * GROUPS + g[None, :], mask=valid[:, None] & (g < GROUPS)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _int_words(
    x, w, scale, levels, x_scale, bias, out_scale, out, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, TWO_LEVEL: tl.constexpr,
    ONE_ROW_SCALE: tl.constexpr, CHANNEL_OUT_SCALE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] for a few tokens m. Of int4 words, the high nibbles as signed bytes are codes times 16.

    scale   of rows, or of groups
    levels  TWO_LEVEL: what codes are multiplied by before the sum, and rounded; then scale is that of the row
    """
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    KW: tl.constexpr = INPUTS * BITS // 32
    PER: tl.constexpr = 128 * BITS // 32  # words of a group
    GROUPED: tl.constexpr = GROUPS > 1 and not TWO_LEVEL
    FACTOR: tl.constexpr = 0.0625 if BITS == 4 and not TWO_LEVEL else 1.0
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = n < features
    words = w.to(tl.pointer_type(tl.int32), bitcast=True) + n[:, None] * KW
    for m in tl.static_range(TOKENS):
        # The weights of further tokens come from the caches: every token has its own sums in registers.
        whole = tl.zeros([ROWS, WORDS], tl.int32)
        grouped = tl.zeros([ROWS, WORDS // PER if GROUPED else 1], tl.float32)
        for first in tl.static_range(0, KW, WORDS):
            j = first + tl.arange(0, WORDS)
            inside = j < KW
            word = tl.load(words + j[None, :], mask=valid[:, None] & inside[None, :], other=0)
            zero = tl.zeros([ROWS, WORDS], tl.int32)
            if BITS == 4:
                eight = tl.load(
                    x.to(tl.pointer_type(tl.int64), bitcast=True) + m * KW + j, mask=inside, other=0
                )
                low, high = eight.to(tl.int32), (eight >> 32).to(tl.int32)
                if TWO_LEVEL:
                    group = (j // PER if GROUPS > 1 else j * 0)[None, :]
                    level = tl.load(
                        levels + n[:, None] * GROUPS + group, mask=valid[:, None] & inside[None, :], other=0
                    )
                    even_codes, odd_codes = level_words(word, level)
                else:
                    even_codes, odd_codes = (word << 4) & HIGH_NIBBLES, word & HIGH_NIBBLES
                part = dot4(even_codes, zero + even_bytes(low, high)[None, :], zero)
                part = dot4(odd_codes, zero + odd_bytes(low, high)[None, :], part)
            else:
                four = tl.load(
                    x.to(tl.pointer_type(tl.int32), bitcast=True) + m * KW + j, mask=inside, other=0
                )
                part = dot4(word, zero + four[None, :], zero)
            if GROUPED:
                sums = tl.sum(tl.reshape(part, [ROWS, WORDS // PER, PER]), axis=2)
                scales = _group_scales(scale, n, valid, first, WORDS, PER, GROUPS, ONE_ROW_SCALE)
                grouped += sums.to(tl.float32) * scales
            else:
                whole += part
        code = finish(
            tl.sum(grouped if GROUPED else whole, axis=1), n, valid, None if GROUPED else scale, x_scale,
            bias, out_scale, ONE_ROW_SCALE, CHANNEL_OUT_SCALE, FACTOR,
        )  # fmt: skip
        tl.store(out + m * features + n, code, mask=valid)


@triton.jit
def _half_words(
    x, w, scale, levels, x_scale, bias, out_scale, out, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] for a few tokens of float16 and int4 weights."""
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    KW: tl.constexpr = INPUTS // 8
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = n < features
    words = w.to(tl.pointer_type(tl.int32), bitcast=True) + n[:, None] * KW
    pairs = x.to(tl.pointer_type(tl.int64), bitcast=True)
    for m in tl.static_range(TOKENS):
        total = tl.zeros([ROWS, WORDS // 16 if GROUPS > 1 else WORDS], tl.float32)
        for first in tl.static_range(0, KW, WORDS):
            j = first + tl.arange(0, WORDS)
            inside = j < KW
            word = tl.load(words + j[None, :], mask=valid[:, None] & inside[None, :], other=0)
            a = tl.load(pairs + (m * KW + j) * 2, mask=inside, other=0)
            b = tl.load(pairs + (m * KW + j) * 2 + 1, mask=inside, other=0)
            a0, a1, b0, b1 = a.to(tl.int32), (a >> 32).to(tl.int32), b.to(tl.int32), (b >> 32).to(tl.int32)
            zero = tl.zeros([ROWS, WORDS], tl.int32)
            part = int4_times_half(
                word,
                zero + low_halves(a0, b0)[None, :],
                zero + high_halves(a0, b0)[None, :],
                zero + low_halves(a1, b1)[None, :],
                zero + high_halves(a1, b1)[None, :],
            )
            if GROUPS > 1:
                sums = tl.sum(tl.reshape(part, [ROWS, WORDS // 16, 16]), axis=2)
                total += sums * _group_scales(scale, n, valid, first, WORDS, 16, GROUPS, ONE_ROW_SCALE)
            else:
                total += part
        code = finish(
            tl.sum(total, axis=1), n, valid, None if GROUPS > 1 else scale, x_scale, bias, out_scale,
            ONE_ROW_SCALE, CHANNEL_OUT_SCALE,
        )  # fmt: skip
        tl.store(out + m * features + n, code, mask=valid)
