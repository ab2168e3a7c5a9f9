"""The RMSNorm of a short residual, with quantization, by every program of the projection that reads it.

A launch of its own takes longer than to norm a thousand channels again in every program. What results are
words in registers, as ``rows.py`` reads them from a vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quamba.kernels.triton.decode.rows import LANE, chunk_size
from quamba.kernels.triton.decode.vectors import wide_step
from quamba.kernels.triton.words import reciprocal, saturated_bytes, wide_bytes


@triton.jit
def read_factors(
    weight: tl.tensor, scale: tl.tensor, ROW: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr
):
    """Tuple of float32 blocks (chunk of words, inputs a word): the weight of the norm over the scale of its
    codes."""
    EACH: tl.constexpr = 32 // BITS
    factors = ()
    step = tl.full((), 1.0, tl.float32)
    if scale is not None:
        step = tl.div_rn(step, tl.load(scale).to(tl.float32))
    for first in tl.static_range(0, ROW, CHUNK):
        word = first + tl.arange(0, chunk_size(ROW - first, CHUNK))[:, None]
        if weight is not None:
            at = weight + word * EACH + tl.arange(0, EACH)[None, :]
            factor = tl.load(at, mask=word < ROW, other=0).to(tl.float32) * step
        else:
            factor = tl.full([word.shape[0], EACH], 1.0, tl.float32) * step
        factors = factors + (factor,)
    return factors


@triton.jit
def _normed(
    residual: tl.tensor,
    factors,
    eps: tl.tensor,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    """x / sqrt(mean(x^2) + eps) * factor, blocks as those of the factors."""
    EACH: tl.constexpr = 32 // BITS
    values = ()
    power = 0.0
    for first in tl.static_range(0, ROW, CHUNK):
        word = first + tl.arange(0, chunk_size(ROW - first, CHUNK))[:, None]
        at = residual + word * EACH + tl.arange(0, EACH)[None, :]
        value = tl.load(at, mask=word < ROW, other=0).to(tl.float32)
        power += tl.sum(tl.sum(value * value, 1), 0)
        values = values + (value,)
    inverse = tl.rsqrt(power / (ROW * EACH) + eps)
    results = ()
    for i in tl.static_range(0, (ROW + CHUNK - 1) // CHUNK):
        results = results + (values[i] * inverse * factors[i],)
    return results


@triton.jit
def _fours(v: tl.tensor):
    """(words, 4) as four (words,)."""
    a, b = tl.split(tl.reshape(v, [v.shape[0], 2, 2]))
    first, third = tl.split(a)
    second, fourth = tl.split(b)
    return first, second, third, fourth


@triton.jit
def _by_words(v: tl.tensor):
    """(words, 4 or 8) as the even and the odd ones of eight, or all, twice."""
    if v.shape[1] == 8:
        even, odd = tl.split(tl.reshape(v, [v.shape[0], 4, 2]))
    else:
        even, odd = v, v
    return even, odd


@triton.jit
def _wide(v: tl.tensor):
    a, b, c, d = _fours(v)
    return wide_bytes(a, b, c, d)


@triton.jit
def _saturated(v: tl.tensor) -> tl.tensor:
    a, b, c, d = _fours(v)
    return saturated_bytes(a, b, c, d)


@triton.jit
def normed_words(
    residual: tl.tensor,
    factors,
    eps: tl.tensor,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    """``rows.read_words`` of the codes."""
    values = _normed(residual, factors, eps, ROW, CHUNK, BITS)
    even, odd = (), ()
    for i in tl.static_range(0, (ROW + CHUNK - 1) // CHUNK):
        a, b = _by_words(values[i])
        even, odd = even + (_saturated(a),), odd + (_saturated(b),)
    return even, odd


@triton.jit
def normed_wide_words(
    residual: tl.tensor,
    factors,
    eps: tl.tensor,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    """``rows.read_wide_words`` of the wide codes."""
    EACH: tl.constexpr = 32 // BITS
    PER: tl.constexpr = BITS // 4
    values = _normed(residual, factors, eps, ROW, CHUNK, BITS)
    he, ho, le, lo, steps = (), (), (), (), ()
    for i in tl.static_range(0, (ROW + CHUNK - 1) // CHUNK):
        largest = tl.max(tl.abs(values[i]), axis=1)
        largest = tl.max(tl.reshape(largest, [largest.shape[0] * EACH // 32, 32 // EACH]), axis=1)
        step = wide_step(largest)
        inverse = reciprocal(step)[:, None].broadcast_to(step.shape[0], 32 // EACH)
        a, b = _by_words(values[i] * tl.reshape(inverse, [values[i].shape[0]])[:, None])
        even, odd = _wide(a), _wide(b)
        he, ho, le, lo = he + (even[0],), ho + (odd[0],), le + (even[1],), lo + (odd[1],)
        spread = step[:, None].broadcast_to(step.shape[0], PER)
        steps = steps + (tl.reshape(spread, [values[i].shape[0] // LANE]),)
    return (he, ho), (le, lo), steps
