"""Rows of a weight matrix times one vector: the weights into registers first, then the sums.

A row is read in chunks of words (32 bits: four int8 or eight int4 codes) or of floats; a program holds all
chunks of its rows, for it reads them before it waits for the vector. With 128 words a chunk, a lane has the
same four words of vector and row, and nothing moves between lanes before the last sum. The last chunk
of a row is shorter where less is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quamba.kernels.triton.words import (
    HIGH_NIBBLES,
    dot4,
    even_bytes,
    high_halves,
    int4_times_half,
    low_halves,
    odd_bytes,
)

#: Words next to each other that one lane sums before scales of groups are applied; groups are multiples.
LANE = tl.constexpr(4)


@triton.constexpr_function
def chunk_size(left, chunk):
    """Of a chunk with ``left`` elements of the row to go: a power of two."""
    return chunk if left >= chunk else max(4, 1 << (left - 1).bit_length())


@triton.jit
def read_rows(w: tl.tensor, n: tl.tensor, inside: tl.tensor, ROW: tl.constexpr, CHUNK: tl.constexpr):
    """Tuple of blocks (rows of n, chunk): the rows of w, ROW elements long."""
    chunks = ()
    for first in tl.static_range(0, ROW, CHUNK):
        j = first + tl.arange(0, chunk_size(ROW - first, CHUNK))
        if ROW - first >= chunk_size(ROW - first, CHUNK):
            mask = inside[:, None]
        else:
            mask = inside[:, None] & (j < ROW)[None, :]
        chunks = chunks + (tl.load(w + n[:, None] * ROW + j[None, :], mask=mask, other=0),)
    return chunks


@triton.jit
def read_group_scales(
    scale: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Tuple of float blocks (rows of n, chunk / LANE): the scale of every LANE words."""
    chunks = ()
    per: tl.constexpr = ROW // GROUPS
    for first in tl.static_range(0, ROW, CHUNK):
        g = (first + LANE * tl.arange(0, chunk_size(ROW - first, CHUNK) // LANE)) // per
        mask = inside[:, None] & (g < GROUPS)[None, :]
        chunks = chunks + (tl.load(scale + n[:, None] * GROUPS + g[None, :], mask=mask, other=0),)
    return chunks


@triton.jit
def _read_vector(x: tl.tensor, ROW: tl.constexpr, CHUNK: tl.constexpr, EACH: tl.constexpr, AT: tl.constexpr):
    """Tuple of blocks (chunk,): every EACH-th element of x from AT on."""
    chunks = ()
    for first in tl.static_range(0, ROW, CHUNK):
        j = first + tl.arange(0, chunk_size(ROW - first, CHUNK))
        if ROW - first >= chunk_size(ROW - first, CHUNK):
            chunks = chunks + (tl.load(x + j * EACH + AT),)
        else:
            chunks = chunks + (tl.load(x + j * EACH + AT, mask=j < ROW, other=0),)
    return chunks


@triton.jit
def read_words(x: tl.tensor, ROW: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr):
    """Two tuples of int32 blocks: for 4 bits even and odd ones of every eight int8, else all, twice."""
    words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    if BITS == 8:
        even = _read_vector(words, ROW, CHUNK, 1, 0)
        odd = even
    elif SPLIT:
        even, odd = _read_vector(words, ROW, CHUNK, 1, 0), _read_vector(words + ROW, ROW, CHUNK, 1, 0)
    else:
        both = _read_vector(x.to(tl.pointer_type(tl.int64), bitcast=True), ROW, CHUNK, 1, 0)
        even, odd = (), ()
        for i in tl.static_range(0, (ROW + CHUNK - 1) // CHUNK):
            low, high = both[i].to(tl.int32), (both[i] >> 32).to(tl.int32)
            even, odd = even + (even_bytes(low, high),), odd + (odd_bytes(low, high),)
    return even, odd


@triton.jit
def _products(word: tl.tensor, even: tl.tensor, odd: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int32 (rows, chunk): of each word the sum of its products; of int4, 16 times that."""
    zero = tl.zeros(word.shape, tl.int32)
    if BITS == 4:
        part = dot4((word << 4) & HIGH_NIBBLES, zero + even[None, :], zero)
        part = dot4(word & HIGH_NIBBLES, zero + odd[None, :], part)
    else:
        part = dot4(word, zero + even[None, :], zero)
    return part


@triton.jit
def _lane_sums(part: tl.tensor) -> tl.tensor:
    """(rows, chunk / LANE)."""
    return tl.sum(tl.reshape(part, [part.shape[0], part.shape[1] // LANE, LANE]), axis=2)


@triton.jit
def read_wide_words(
    x: tl.tensor,
    x_scale: tl.tensor,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Of wide codes (``vectors.py``): the words of the high and of the low halves, and the scale of every
    LANE words."""
    COLUMNS: tl.constexpr = ROW * 32 // BITS
    PER: tl.constexpr = BITS // 4  # lanes' words that share a scale of x: 32 inputs are 4 words, or 8
    high, low = read_words(x, ROW, CHUNK, BITS, SPLIT), read_words(x + COLUMNS, ROW, CHUNK, BITS, SPLIT)
    steps = ()
    for first in tl.static_range(0, ROW, CHUNK):
        lane = first // LANE + tl.arange(0, chunk_size(ROW - first, CHUNK) // LANE)
        steps = steps + (tl.load(x_scale + lane // PER, mask=lane < ROW // LANE, other=0),)
    return high, low, steps


@triton.jit
def sums_of_codes(
    words,
    weights,
    scales,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """float32 (rows,): sums of int8 (``read_words``) times codes; for 4 bits 16 times as large."""
    even, odd = words
    sums = _lane_sums(_products(weights[0], even[0], odd[0], BITS))
    total = sums.to(tl.float32) * scales[0].to(tl.float32) if GROUPS > 1 else sums
    for i in tl.static_range(1, ROW // CHUNK):
        sums = _lane_sums(_products(weights[i], even[i], odd[i], BITS))
        total += sums.to(tl.float32) * scales[i].to(tl.float32) if GROUPS > 1 else sums
    y = tl.sum(total, axis=1)
    if ROW > CHUNK and ROW % CHUNK > 0:
        last: tl.constexpr = ROW // CHUNK
        sums = _lane_sums(_products(weights[last], even[last], odd[last], BITS))
        rest = sums.to(tl.float32) * scales[last].to(tl.float32) if GROUPS > 1 else sums
        y += tl.sum(rest, axis=1)
    return y.to(tl.float32)


@triton.jit
def _wide_part(word, high_even, high_odd, low_even, low_odd, step, BITS: tl.constexpr) -> tl.tensor:
    both = _products(word, high_even, high_odd, BITS) * 256 + _products(word, low_even, low_odd, BITS)
    return _lane_sums(both).to(tl.float32) * step[None, :]


@triton.jit
def sums_of_wide_codes(
    high,
    low,
    steps,
    weights,
    scales,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """float32 (rows,): sums of wide codes (``read_wide_words``) times codes; for 4 bits 16 times as large."""
    he, ho = high
    le, lo = low
    total = _wide_part(weights[0], he[0], ho[0], le[0], lo[0], steps[0], BITS)
    if GROUPS > 1:
        total *= scales[0].to(tl.float32)
    for i in tl.static_range(1, ROW // CHUNK):
        part = _wide_part(weights[i], he[i], ho[i], le[i], lo[i], steps[i], BITS)
        total += part * scales[i].to(tl.float32) if GROUPS > 1 else part
    y = tl.sum(total, axis=1)
    if ROW > CHUNK and ROW % CHUNK > 0:
        last: tl.constexpr = ROW // CHUNK
        part = _wide_part(weights[last], he[last], ho[last], le[last], lo[last], steps[last], BITS)
        y += tl.sum(part * scales[last].to(tl.float32) if GROUPS > 1 else part, axis=1)
    return y


@triton.jit
def sums_of_halves(
    x: tl.tensor,
    weights,
    scales,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """float32 (ROWS,): sums of float16 x times int4 codes."""
    y = tl.zeros([ROWS], tl.float32)
    pairs = x.to(tl.pointer_type(tl.int64), bitcast=True)
    first_four, last_four = _read_vector(pairs, ROW, CHUNK, 2, 0), _read_vector(pairs, ROW, CHUNK, 2, 1)
    for i in tl.static_range(0, (ROW + CHUNK - 1) // CHUNK):
        a, b = first_four[i], last_four[i]
        a0, a1, b0, b1 = a.to(tl.int32), (a >> 32).to(tl.int32), b.to(tl.int32), (b >> 32).to(tl.int32)
        zero = tl.zeros(weights[i].shape, tl.int32)
        part = int4_times_half(
            weights[i],
            zero + low_halves(a0, b0)[None, :],
            zero + high_halves(a0, b0)[None, :],
            zero + low_halves(a1, b1)[None, :],
            zero + high_halves(a1, b1)[None, :],
        )
        sums = _lane_sums(part)
        y += tl.sum(sums * scales[i].to(tl.float32) if GROUPS > 1 else sums, axis=1)
    return y


@triton.jit
def sums_of_floats(
    x: tl.tensor, weights, ROWS: tl.constexpr, ROW: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """float32 (ROWS,): float x times float weights."""
    vector = _read_vector(x, ROW, CHUNK, 1, 0)
    total = weights[0].to(tl.float32) * vector[0].to(tl.float32)[None, :]
    for i in tl.static_range(1, ROW // CHUNK):
        total += weights[i].to(tl.float32) * vector[i].to(tl.float32)[None, :]
    y = tl.sum(total, axis=1)
    if ROW > CHUNK and ROW % CHUNK > 0:
        last: tl.constexpr = ROW // CHUNK
        y += tl.sum(weights[last].to(tl.float32) * vector[last].to(tl.float32)[None, :], axis=1)
    return y
