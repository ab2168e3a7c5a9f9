"""Matrix products with quantized weights: a few rows word by word, many rows on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.reference import linear as reference
from quamba.kernels.triton.words import (
    HIGH_NIBBLES,
    dot4,
    even_bytes,
    high_halves,
    int4_times_half,
    low_halves,
    odd_bytes,
    round_code,
)

#: Where a weight with two levels of scales keeps its int8 numbers.
_INT8 = "_int8_operand"
#: Rows of x up to which weights are multiplied word by word; a tensor core would idle on most of its tile.
FEW_ROWS = 4
#: Rows of float16 up to which our kernel multiplies with integer weights as they are.
HALF_ROWS = 256


@dataclass(frozen=True)
class WordLaunch:
    """Weight rows a program, 32-bit words of a row at a time, warps."""

    rows: int
    words: int
    warps: int


@dataclass(frozen=True)
class TileLaunch:
    """Output features, tokens and inputs of a tile, warps, stages of the pipeline."""

    features: int
    tokens: int
    inputs: int
    warps: int
    stages: int


def word_launch(features: int, words: int, bits: int) -> WordLaunch:
    """From timings of one row on an H200 (docs/notes/gpu-kernels.md): programs of one warp need no barrier to
    sum, and short matrices want many of them in flight."""
    few = features * words < 1 << 21
    if bits == 8:
        return WordLaunch(rows=2 if few else 4, words=min(128, triton.next_power_of_2(words)), warps=1)
    return WordLaunch(rows=2 if few else 4, words=min(64, triton.next_power_of_2(words)), warps=1)


def tile_launch(tokens: int) -> TileLaunch:
    if tokens <= 16:
        return TileLaunch(features=32, tokens=16, inputs=128, warps=4, stages=3)
    if tokens <= 64:
        return TileLaunch(features=64, tokens=triton.next_power_of_2(tokens), inputs=128, warps=4, stages=3)
    return TileLaunch(features=128, tokens=128, inputs=128, warps=8, stages=3)


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
    if isinstance(weight, QuantizedWeight) and (isinstance(x, Quantized) or _takes_halves(x, weight)):
        values = x.codes if isinstance(x, Quantized) else x
        if isinstance(x, Quantized) and not input_scale_folded and x.scale.ndim:
            raise ValueError("a per-channel input scale must be folded into the weight's columns")
        x_scale = x.scale if isinstance(x, Quantized) and not input_scale_folded else None
        rows = values.reshape(-1, values.shape[-1]).contiguous()
        out = _empty(rows, weight, out_scale, out_dtype)
        _multiply(rows, weight, x_scale, bias, out_scale, out)
        return out.view(*values.shape[:-1], weight.shape[0])
    return reference.linear(
        x, weight, bias, out_scale=out_scale, out_dtype=out_dtype, input_scale_folded=input_scale_folded
    )


def _takes_halves(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether float activations go to our kernels: float16, integer codes with one level of scales, and no
    more rows than the library needs to be faster on weights that were made float16 before."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    one_level = weight.channel_scale is None
    return x.dtype == torch.float16 and one_level and weight.shape[1] % 2 == 0 and tokens <= HALF_ROWS


def _empty(rows: Tensor, weight: QuantizedWeight, out_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    dtype = dtype if out_scale is None else torch.int8
    return torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=rows.device)


def _multiply(
    rows: Tensor,
    weight: QuantizedWeight,
    x_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Fill ``out`` (tokens, features) from rows (tokens, inputs), int8 or float16, both contiguous."""
    if out.numel() == 0:
        return
    tokens, features = out.shape
    data, scale, bits = _integer_operand(weight)
    inputs, groups = weight.shape[1], scale.shape[1]
    arguments = (rows, data, scale, x_scale, bias, out_scale, out, tokens, features)
    flags = {
        "INPUTS": inputs,
        "GROUPS": groups,
        "ONE_ROW_SCALE": scale.shape[0] == 1,
        "CHANNEL_OUT_SCALE": out_scale is not None and out_scale.ndim == 1,
    }
    is_float = rows.dtype == torch.float16
    whole_words = inputs % (128 if is_float else 8) == 0 and (groups == 1 or inputs // groups == 128)
    if tokens <= FEW_ROWS and whole_words and not (is_float and bits == 8):
        launch = word_launch(features, inputs * bits // 32, bits)
        grid: tuple[int, ...] = (triton.cdiv(features, launch.rows),)
        sizes = {"TOKENS": tokens, "ROWS": launch.rows, "WORDS": launch.words, "num_warps": launch.warps}
        if is_float:
            _half_words[grid](*arguments, **flags, **sizes)
        else:
            _int_words[grid](*arguments, **flags, **sizes, BITS=bits)
        return
    tile = tile_launch(tokens)
    if bits == 4:  # the even inputs of a row, then the odd ones: as the nibbles of a byte belong to them
        rows = rows.view(tokens, inputs // 2, 2).transpose(1, 2).contiguous()
    width = inputs // groups if groups > 1 else min(tile.inputs, triton.next_power_of_2(inputs))
    grid = (triton.cdiv(features, tile.features), triton.cdiv(tokens, tile.tokens))
    _tiles[grid](
        rows,
        *arguments[1:],
        **flags,
        BITS=bits,
        FLOAT=is_float,
        FEATURES=tile.features,
        TILE_TOKENS=tile.tokens,
        WIDTH=width,
        BLOCK=max(32, triton.next_power_of_2(width * bits // 8)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _integer_operand(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Codes as the kernels read them, their scales and bits. With two levels of scales, the int8 numbers."""
    if weight.channel_scale is None:
        return weight.data, weight.scale, weight.format.bits
    kept: tuple[Tensor, Tensor] | None = vars(weight).get(_INT8)
    if kept is None or kept[0].device != weight.data.device:
        kept = weight.integers()
        object.__setattr__(weight, _INT8, kept)  # beside the buffers: it is saved nowhere
    return kept[0], kept[1], 8


@triton.jit
def _finish(y, n, valid, x_scale, bias, out_scale, CHANNEL_OUT_SCALE: tl.constexpr):
    """Scale of x, bias, and rounding to codes where the output has a scale; y (..., features of n)."""
    if x_scale is not None:
        y = y * tl.load(x_scale)
    if bias is not None:
        y = y + tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
    if out_scale is not None:
        if CHANNEL_OUT_SCALE:
            y = tl.div_rn(y, tl.load(out_scale + n, mask=valid, other=1.0))
        else:
            y = tl.div_rn(y, tl.zeros_like(y) + tl.load(out_scale))
        y = round_code(y)  # one return: the compiler reads what follows a return, too
    return y


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
    x, w, scale, x_scale, bias, out_scale, out, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out[m, n] for a few tokens m. Of int4 words, the high nibbles as signed bytes are codes times 16."""
    KW: tl.constexpr = INPUTS * BITS // 32
    PER: tl.constexpr = 128 * BITS // 32  # words of a group
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = n < features
    words = w.to(tl.pointer_type(tl.int32), bitcast=True) + n[:, None] * KW
    for m in tl.static_range(TOKENS):
        # The weights of further tokens come from the caches: every token has its own sums in registers.
        whole = tl.zeros([ROWS, WORDS], tl.int32)
        grouped = tl.zeros([ROWS, WORDS // PER if GROUPS > 1 else 1], tl.float32)
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
                part = dot4((word << 4) & HIGH_NIBBLES, zero + even_bytes(low, high)[None, :], zero)
                part = dot4(word & HIGH_NIBBLES, zero + odd_bytes(low, high)[None, :], part)
            else:
                four = tl.load(
                    x.to(tl.pointer_type(tl.int32), bitcast=True) + m * KW + j, mask=inside, other=0
                )
                part = dot4(word, zero + four[None, :], zero)
            if GROUPS > 1:
                sums = tl.sum(tl.reshape(part, [ROWS, WORDS // PER, PER]), axis=2)
                scales = _group_scales(scale, n, valid, first, WORDS, PER, GROUPS, ONE_ROW_SCALE)
                grouped += sums.to(tl.float32) * scales
            else:
                whole += part
        if GROUPS > 1:
            y = tl.sum(grouped, axis=1)
        else:
            row = n * 0 if ONE_ROW_SCALE else n
            y = tl.sum(whole, axis=1).to(tl.float32) * tl.load(scale + row, mask=valid, other=0.0).to(
                tl.float32
            )
        y = y * 0.0625 if BITS == 4 else y
        code = _finish(y, n, valid, x_scale, bias, out_scale, CHANNEL_OUT_SCALE)
        tl.store(out + m * features + n, code, mask=valid)


@triton.jit
def _half_words(
    x, w, scale, x_scale, bias, out_scale, out, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out[m, n] for a few tokens of float16 and int4 weights."""
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
        y = tl.sum(total, axis=1)
        if GROUPS == 1:
            row = n * 0 if ONE_ROW_SCALE else n
            y = y * tl.load(scale + row, mask=valid, other=0.0).to(tl.float32)
        code = _finish(y, n, valid, x_scale, bias, out_scale, CHANNEL_OUT_SCALE)
        tl.store(out + m * features + n, code, mask=valid)


@triton.jit
def _tiles(
    x, w, scale, x_scale, bias, out_scale, out, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, FLOAT: tl.constexpr, FEATURES: tl.constexpr,
    TILE_TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of out on tensor cores. FLOAT: x is float16 and so become the codes, exactly; else all is int8.

    int4: x holds the even inputs of a row, then the odd ones, and a group is two products, so that the
    nibbles of a byte never have to change places.
    """
    n = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    m = tl.program_id(1) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    in_n, in_m = n < features, m < tokens
    k = tl.arange(0, BLOCK)
    x_at = x + m[:, None].to(tl.int64) * INPUTS + k[None, :]
    column = n[None, :].to(tl.int64) * (INPUTS * BITS // 8) + k[:, None]
    if FLOAT:
        whole = tl.zeros([TILE_TOKENS, FEATURES], tl.float32)
    else:
        whole = tl.zeros([TILE_TOKENS, FEATURES], tl.int32)
    total = tl.zeros([TILE_TOKENS, FEATURES], tl.float32)
    for g in range(0, tl.cdiv(INPUTS, WIDTH)):
        per_row: tl.constexpr = WIDTH * BITS // 8  # bytes of a group of a row
        inside = k < tl.minimum(INPUTS * BITS // 8 - g * per_row, per_row)
        byte = tl.load(w + column + g * per_row, mask=inside[:, None] & in_n[None, :], other=0)
        first = tl.load(x_at + g * per_row, mask=in_m[:, None] & inside[None, :], other=0)
        if BITS == 4:
            second = tl.load(x_at + INPUTS // 2 + g * per_row, mask=in_m[:, None] & inside[None, :], other=0)
            low, high = (byte << 4).to(tl.int8, bitcast=True), (byte & 0xF0).to(tl.int8, bitcast=True)
            sums = _product(first, low, FLOAT) + _product(second, high, FLOAT)
        else:
            sums = _product(first, byte, FLOAT)
        if GROUPS > 1:
            scale_row = n * 0 if ONE_ROW_SCALE else n
            group = tl.load(scale + scale_row * GROUPS + g, mask=in_n, other=0.0).to(tl.float32)
            total += sums.to(tl.float32) * group[None, :]
        else:
            whole += sums
    if GROUPS == 1:
        scale_row = n * 0 if ONE_ROW_SCALE else n
        row_scale = tl.load(scale + scale_row, mask=in_n, other=0.0).to(tl.float32)
        total = whole.to(tl.float32) * row_scale[None, :]
    y = total * 0.0625 if BITS == 4 else total  # a nibble in the upper half of a byte is 16 times its code
    code = _finish(y, n[None, :], in_n[None, :], x_scale, bias, out_scale, CHANNEL_OUT_SCALE)
    tl.store(out + m[:, None].to(tl.int64) * features + n[None, :], code, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _product(a, b, FLOAT: tl.constexpr):
    if FLOAT:
        total = tl.dot(a, b.to(tl.float16), out_dtype=tl.float32)
    else:
        total = tl.dot(a, b, out_dtype=tl.int32)
    return total
