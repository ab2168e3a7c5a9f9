"""Mamba2's prompts as matrix products over chunks of tokens (Mamba2 paper, section 6), in three launches.

prepare  the decays of every head, and B and C as operands of products
states   one program a head walks over the chunks and keeps the state that enters each of them
outputs  all chunks at once: from the state that entered, and from the tokens of the chunk itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.recurrence import (
    LARGEST_DECAY,
    LOG2E,
    ONE_SCALE,
    PROCESSORS,
    ROUNDER,
    as_floats,
    as_halves,
    limited_softplus,
    read_scale,
    read_scales,
    read_state_scale,
    write_state,
)

#: How matrix products are computed. "half": one pass on float16 units; codes are exact there, what is
#: computed is rounded to 11 bits after a power of two has brought it in range. "split": on bfloat16 units; a
#: float operand is cut into two halves of 8 bits, so a product errs by 2^-16 of itself at most. "tf32": one
#: pass, 2^-11. "tf32x3": three, about float32. "ieee": float32 without matrix units.
Precision = Literal["half", "split", "tf32", "tf32x3", "ieee"]

# Below this a largest number counts as this, so that scales have an inverse.
SMALLEST = tl.constexpr(2.0**-60)
# Above this, as this: what it bounds is below.
LARGEST = tl.constexpr(2.0**126)


@dataclass(frozen=True, kw_only=True)
class ScanLaunch:
    """How a prompt is cut up."""

    chunk: int  # tokens from one kept state to the next
    rows: int  # tokens of a chunk whose outputs a program computes
    heads: int  # that a program of outputs takes in turn, with the same product of C and B
    channels: int  # of a head, in one product
    prepare_heads: int  # per program
    state_warps: int
    state_stages: int  # of loads ahead of their use
    output_warps: int
    output_stages: int


@launch_choice("ssd_scan.launch")
def scan_launch(
    batch: int, length: int, nheads: int, headdim: int, d_state: int, ngroups: int, half: bool
) -> ScanLaunch:
    """From timings on an H200 (docs/notes/gpu-kernels.md): long chunks keep fewer states, and pay where a
    prompt is long; heads share operands as far as programs remain for the GPU."""
    channels = min(64, max(16, triton.next_power_of_2(headdim)))
    long = half and batch * length > 1024 and d_state <= 128
    # Of Triton 3.6 for sm_90, products of 64 bfloat16 rows with 16 or 32 columns are wrong (they go to wgmma;
    # seen on an H200: noise, or an illegal address). Of 32 rows, or with two warps, they go to mma.sync and
    # are right.
    narrow = not half and channels < 64
    chunk = 128 if long else 32 if narrow else 64
    items = nheads // ngroups * triton.cdiv(headdim, channels)
    rows = min(chunk, 64)
    others = batch * ngroups * triton.cdiv(length, chunk) * (chunk // rows)
    return ScanLaunch(
        chunk=chunk,
        rows=rows,
        heads=_heads_in_turn(items, others),
        channels=channels,
        prepare_heads=8,
        state_warps=2 if narrow else 8 if half else 4,
        state_stages=3 if half else 2,
        output_warps=4,
        output_stages=2,
    )


def _heads_in_turn(items: int, others: int) -> int:
    """For how many of its items a program reads B and C once: the number that takes the least time.

    Reading them takes as long as an item; programs run in rounds of two a processor.
    """

    def time(heads: int) -> int:
        return triton.cdiv(others * triton.cdiv(items, heads), 2 * PROCESSORS) * (heads + 1)

    return min(range(1, min(items, 16) + 1), key=time)


@triton.jit
def _upper_half(v: tl.tensor) -> tl.tensor:
    """v rounded to the 8 significant bits that bfloat16 has; what is left is exact in float32.

    By integers: conversions to bfloat16 and back, where both are used, are several times slower.
    """
    return ((v.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(v: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """v rounded to bfloat16. The interpreter cannot multiply those; it takes the same values as float32."""
    return _upper_half(v) if INTERPRETED else v.to(tl.bfloat16)


@triton.jit
def _factor(
    v: tl.tensor, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
) -> tl.tensor:
    """v as ``_product`` takes it: what the units hold exactly is narrowed once, however often it is used."""
    if PRECISION == "half":
        factor = as_halves(v)
    elif EXACT and PRECISION == "split":
        factor = _narrow(v.to(tl.float32), INTERPRETED)
    else:
        factor = v.to(tl.float32)
    return factor


@triton.jit
def _product(
    a: tl.tensor,
    b: tl.tensor,
    added: tl.tensor,
    A_EXACT: tl.constexpr,
    B_EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """a @ b + added (or None) in float32 (see ``Precision``); a and b are factors (``_factor``)."""
    if PRECISION == "half":
        total = tl.dot(a, b, added)
    elif PRECISION == "split":
        a_high = a if A_EXACT else _upper_half(a)
        b_high = b if B_EXACT else _upper_half(b)
        a_wide = a if A_EXACT else _narrow(a_high, INTERPRETED)
        b_wide = b if B_EXACT else _narrow(b_high, INTERPRETED)
        total = tl.dot(a_wide, b_wide, added, input_precision="ieee")
        if not A_EXACT:
            a_rest = _narrow(a - a_high, INTERPRETED)
            total = tl.dot(a_rest, b_wide, total, input_precision="ieee")
        if not B_EXACT:
            b_rest = _narrow(b - b_high, INTERPRETED)
            total = tl.dot(a_wide, b_rest, total, input_precision="ieee")
    else:
        total = tl.dot(a, b, added, input_precision=PRECISION)
    return total


@triton.jit
def _power_above(v: tl.tensor) -> tl.tensor:
    """The smallest power of two above v, for v from ``SMALLEST`` to 2^126."""
    near = tl.maximum(v, SMALLEST).to(tl.int32, bitcast=True)
    return ((near & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_power(power: tl.tensor) -> tl.tensor:
    """1 / power, exact."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _decays(log2_decay: tl.tensor) -> tl.tensor:
    """log2 of the tokens' decays as (multiples of 2^-9, rest), of which running sums are taken.

    Differences of large float32 sums would lose digits. The multiples stay exact, because a chunk sums to
    less than 2^14 once single tokens are limited (``LARGEST_DECAY``), and the rests are small.
    """
    limited = tl.maximum(log2_decay, LARGEST_DECAY)
    coarse = ((limited * 512.0 + ROUNDER) - ROUNDER) * (1.0 / 512.0)
    return coarse, limited - coarse


@triton.jit
def _prepare_operand(
    data: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    unit_at: tl.tensor,
    row_stride: tl.tensor,
    rows_left: tl.tensor,
    first: tl.tensor,
    MODE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """B or C of one group and chunk: out * unit is the real value, out at most 128 in size, zeros beyond."""
    q, n = tl.arange(0, CHUNK)[:, None], tl.arange(0, BLOCK_N)
    inside = (q < rows_left) & (n < N)[None, :]
    value = tl.load(data + q * row_stride + n[None, :], mask=inside, other=0).to(tl.float32)
    if MODE == 0:
        peak = _power_above(tl.max(tl.max(tl.abs(value), 1), 0))
        unit = peak * (1.0 / 128.0)
        value *= _inverse_power(peak) * 128.0
    elif MODE == 1:
        unit = tl.load(scale).to(tl.float32)
    else:  # codes stay codes where the scales are the same
        steps = tl.load(scale + first + n, mask=n < N, other=0.0)
        unit = tl.maximum(tl.max(steps, 0), SMALLEST)
        value *= tl.div_rn(steps, tl.zeros((BLOCK_N,), tl.float32) + unit)[None, :]
    tl.store(out + q * BLOCK_N + n[None, :], value.to(out.dtype.element_ty))
    tl.store(unit_at, unit)


@triton.jit
def _prepare_decays(
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    dt_bias: tl.tensor,
    mask: tl.tensor,
    decays: tl.tensor,
    totals: tl.tensor,
    dt_l: tl.tensor,
    mask_l: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    rows_left: tl.tensor,
    first: tl.tensor,
    chunks: tl.tensor,
    DT_MODE: tl.constexpr,
    LIMITED: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Of some heads and one chunk; pointers are those of the chunk's first token."""
    q, h = tl.arange(0, CHUNK), first + tl.arange(0, BLOCK_H)
    t_in, h_in = q < rows_left, h < H
    inside = t_in[:, None] & h_in[None, :]
    raw = tl.load(dt + (q[:, None] * dt_l + h[None, :]), mask=inside, other=0).to(tl.float32)
    raw *= read_scales(dt_scale, h, h_in, DT_MODE)[None, :]
    if dt_bias is not None:
        raw += tl.load(dt_bias + h, mask=h_in, other=0).to(tl.float32)[None, :]
    delta = tl.where(inside, limited_softplus(raw, low, high, LIMITED), 0.0)
    if mask is not None:
        kept = tl.load(mask + q * mask_l, mask=t_in, other=0)
        delta = tl.where(kept[:, None] != 0, delta, 0.0)
    A_h = tl.load(A + h, mask=h_in, other=0).to(tl.float32) * LOG2E
    coarse_t, rest_t = _decays(delta * A_h[None, :])
    coarse, rest = tl.cumsum(coarse_t, 0), tl.cumsum(rest_t, 0)
    coarse_end, rest_end = tl.sum(coarse_t, 0), tl.sum(rest_t, 0)
    driven = delta * tl.exp2(-rest)
    weight = driven * tl.exp2(coarse_end[None, :] - coarse) * tl.exp2(rest_end)[None, :]
    # Products of C and B are at most 2^14 BLOCK_N, so that times ``driven`` they stay below 2^15.
    largest = _power_above(tl.max(driven, 0)) * (BLOCK_N * 0.5)
    heaviest = _power_above(tl.max(weight, 0))

    plane = tl.full((), H * CHUNK, tl.int64) * chunks
    at = decays + h[None, :] * (tl.full((), CHUNK, tl.int64) * chunks) + q[:, None]
    tl.store(at, coarse, mask=h_in[None, :])
    tl.store(at + plane, rest, mask=h_in[None, :])
    driven *= _inverse_power(largest)[None, :]
    if HALF:
        driven = coarse - tl.log2(tl.maximum(driven, 2.0**-126))
    tl.store(at + 2 * plane, driven, mask=h_in[None, :])
    tl.store(at + 3 * plane, weight * _inverse_power(heaviest)[None, :], mask=h_in[None, :])
    tl.store(totals + h * chunks, largest, mask=h_in)
    tl.store(totals + (H + h) * chunks, heaviest, mask=h_in)
    tl.store(totals + (2 * H + h) * chunks, tl.exp2(coarse_end + rest_end), mask=h_in)


# One compilation for prompts of all lengths.
@triton.jit(do_not_specialize=["length", "chunks", "mask_b"])
def _prepare_kernel(
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    dt_bias: tl.tensor,
    mask: tl.tensor,
    B: tl.tensor,
    B_scale: tl.tensor,
    C: tl.tensor,
    C_scale: tl.tensor,
    decays: tl.tensor,
    totals: tl.tensor,
    B_out: tl.tensor,
    C_out: tl.tensor,
    units: tl.tensor,
    dt_b: tl.tensor,
    dt_l: tl.tensor,
    B_b: tl.tensor,
    B_l: tl.tensor,
    C_b: tl.tensor,
    C_l: tl.tensor,
    mask_b: tl.tensor,
    mask_l: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    DT_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    LIMITED: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (chunk; some heads, or B or C of one group; sequence). What is written has no ragged edges.

    decays[:, 0 and 1]  running sums within the chunk of log2 of decays: multiples of 2^-9, and what is left
    decays[:, 2]        a token's weight in the outputs of its chunk, in units of totals[:, 0], at most
                        2 / BLOCK_N; HALF: [:, 0] minus log2 of it, so that one exp2 gives decay and weight
    decays[:, 3]        its weight in the state after the chunk, at most 1, in units of totals[:, 1]
    totals[:, 2]        the decay of a chunk
    units[:, 0 and 1]   of B_out and C_out
    """
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    begin = tl.full((), CHUNK, tl.int64) * chunk
    padded = tl.full((), CHUNK, tl.int64) * chunks
    rows_left = length - chunk * CHUNK
    if part < blocks:
        dt_at = dt + b * dt_b + begin * dt_l
        mask_at = mask
        if mask is not None:
            mask_at = mask + b * mask_b + begin * mask_l
        _prepare_decays(
            dt_at,
            dt_scale,
            A,
            dt_bias,
            mask_at,
            decays + b * 4 * H * padded + begin,
            totals + b * 3 * H * chunks + chunk,
            dt_l,
            mask_l,
            low,
            high,
            rows_left,
            part * BLOCK_H,
            chunks,
            DT_MODE,
            LIMITED,
            H,
            BLOCK_H,
            BLOCK_N,
            CHUNK,
            HALF,
        )
    else:
        g = (part - blocks) // 2
        to = ((b * G + g) * chunks + chunk) * (CHUNK * BLOCK_N)
        unit_at = units + (b * 2 * G + g) * chunks + chunk
        first = g * N
        if (part - blocks) % 2 == 0:
            B_at = B + b * B_b + begin * B_l + first
            _prepare_operand(
                B_at, B_scale, B_out + to, unit_at, B_l, rows_left, first, B_MODE, N, BLOCK_N, CHUNK
            )
        else:
            C_at = C + b * C_b + begin * C_l + first
            unit_at += G * chunks
            _prepare_operand(
                C_at, C_scale, C_out + to, unit_at, C_l, rows_left, first, C_MODE, N, BLOCK_N, CHUNK
            )


@triton.jit(do_not_specialize=["length", "chunks"])
def _states_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    B: tl.tensor,
    decays: tl.tensor,
    totals: tl.tensor,
    units: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    entering: tl.tensor,
    entering_unit: tl.tensor,
    x_b: tl.tensor,
    x_l: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    X_MODE: tl.constexpr,
    B_EXACT: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (part of a head, sequence): S <- decay S + sum_j weight_j x_j B_j^T, chunk after chunk.

    entering[b, chunk, head, part] is S^T (BLOCK_N, BLOCK_P) before the chunk, times entering_unit, a power
    of two that leaves less than 2^15. It comes from a bound, as |B| <= 128 and weight <= 1 in their units: to
    look for the largest element would keep the warps waiting for each other in every chunk. A bound that is
    2^10 too large costs only the last bits of what is below 2^-19 of the largest.
    """
    let_next_start(EARLY)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    b = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, BLOCK_P)
    p, n, q = part * BLOCK_P + own, tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    p_in, n_in = p < P, n < N
    inside = n_in[:, None] & p_in[None, :]
    wait_for_inputs(EARLY)

    S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    bound = tl.full((), SMALLEST, tl.float32)
    S_at = state
    step = 1.0
    if state is not None:
        S_at = state + b * state_b + h * (P * N) + p[None, :] * N + n[:, None]
        if state_scale is not None:
            step = read_state_scale(
                state_scale,
                state_group,
                h * scale_h,
                h * P,
                tl.minimum(p, P - 1)[None, :],
                tl.minimum(n, N - 1)[:, None],
                scale_c,
                scale_n,
                SCALE_BY_CHANNEL,
                SCALE_BY_COLUMN,
            )
        S = tl.load(S_at, mask=inside, other=0).to(tl.float32) * step
        bound = tl.maximum(bound, tl.max(tl.max(tl.abs(S), 1), 0))

    x_step = read_scales(x_scale, h * P + p, p_in, X_MODE)
    x_peak = tl.max(x_step, 0) * 128.0
    padded = chunks * CHUNK
    weight_at = decays + ((b * 4 + 3) * H + h) * padded + q
    x_at = x + b * x_b + h * P + (q[:, None] * x_l + p[None, :])
    B_at = B + (b * G + h // (H // G)) * padded * BLOCK_N + (q[:, None] * BLOCK_N + n[None, :])
    heaviest_at = totals + ((b * 3 + 1) * H + h) * chunks
    unit_at = units + (b * 2 * G + h // (H // G)) * chunks
    for chunk in range(0, chunks):
        unit = tl.load(heaviest_at + chunk) * tl.load(unit_at + chunk)
        decay = tl.load(heaviest_at + H * chunks + chunk)
        B_q = _factor(tl.load(B_at), B_EXACT, PRECISION, INTERPRETED)
        t_in = q < length - chunk * CHUNK
        x_q = as_floats(tl.load(x_at, mask=t_in[:, None] & p_in[None, :], other=0))
        x_w = _factor(x_q * tl.load(weight_at)[:, None], False, PRECISION, INTERPRETED)
        weight_at += CHUNK
        x_at += CHUNK * x_l
        B_at += CHUNK * BLOCK_N

        slot = ((b * chunks + chunk) * H + h) * blocks + part
        peak = _power_above(bound)
        kept = (S * (_inverse_power(peak) * 32768.0)).to(entering.dtype.element_ty)
        tl.store(entering + slot * (BLOCK_N * BLOCK_P) + (n[:, None] * BLOCK_P + own[None, :]), kept)
        tl.store(entering_unit + slot, peak * (1.0 / 32768.0))
        if X_MODE == 0:
            x_peak = tl.max(tl.max(tl.abs(x_q), 1), 0)
        bound = bound * decay + x_peak * unit * (128.0 * CHUNK)
        bound = tl.minimum(tl.maximum(bound, SMALLEST), LARGEST)

        entered = _product(tl.trans(B_q), x_w, None, B_EXACT, False, PRECISION, INTERPRETED)
        S = S * decay + entered * (x_step * unit)[None, :]

    if state is not None:
        per_step = 1.0
        if state_scale is not None:
            per_step = 1.0 / step
        write_state(S_at, S, per_step, inside)


@triton.jit(do_not_specialize=["length", "chunks", "heads", "turns"])
def _outputs_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    decays: tl.tensor,
    totals: tl.tensor,
    units: tl.tensor,
    entering: tl.tensor,
    entering_unit: tl.tensor,
    D: tl.tensor,
    y: tl.tensor,
    x_b: tl.tensor,
    x_l: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    heads: tl.tensor,
    turns: tl.tensor,
    X_MODE: tl.constexpr,
    B_EXACT: tl.constexpr,
    C_EXACT: tl.constexpr,
    D_BY_CHANNEL: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (tokens of a chunk, group, one of ``turns`` parts of its heads; chunk; sequence).

    y_i = exp(decay_i) C_i S + sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) delta_j x_j + D x_i
    """
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    ITEMS: tl.constexpr = H // G * blocks
    X_EXACT: tl.constexpr = X_MODE > 0
    row = tl.program_id(0) // (turns * G) * ROWS
    g = tl.program_id(0) // turns % G
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i, q, n = row + tl.arange(0, ROWS), tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    begin = tl.full((), CHUNK, tl.int64) * chunk
    i_in, q_in = i < length - chunk * CHUNK, q < length - chunk * CHUNK

    operands = ((b * G + g) * chunks + chunk) * (CHUNK * BLOCK_N)
    C_i = tl.load(C + operands + (i[:, None] * BLOCK_N + n[None, :]))
    B_q = tl.load(B + operands + (q[:, None] * BLOCK_N + n[None, :]))
    C_i = _factor(C_i, C_EXACT, PRECISION, INTERPRETED)
    B_q = _factor(B_q, B_EXACT, PRECISION, INTERPRETED)
    CB = _product(C_i, tl.trans(B_q), None, C_EXACT, B_EXACT, PRECISION, INTERPRETED)
    CB = tl.where(i[:, None] >= q[None, :], CB, 0.0)
    B_unit = tl.load(units + (b * 2 * G + g) * chunks + chunk)
    C_unit = tl.load(units + ((b * 2 + 1) * G + g) * chunks + chunk)

    x_one = read_scale(x_scale, 0, X_MODE % 2)

    padded = chunks * CHUNK
    plane = tl.full((), H, tl.int64) * padded
    own = tl.arange(0, BLOCK_P)
    x_at = x + b * x_b + begin * x_l
    first = tl.program_id(0) % turns * heads
    for item in range(first, tl.minimum(first + heads, ITEMS)):
        h = g * (H // G) + item // blocks
        part = item % blocks
        slot = ((b * chunks + chunk) * H + h) * blocks + part
        S = tl.load(entering + slot * (BLOCK_N * BLOCK_P) + (n[:, None] * BLOCK_P + own[None, :]))
        S_unit = tl.load(entering_unit + slot)
        decay_at = decays + (b * 4 * H + h) * padded + begin
        coarse_i = tl.load(decay_at + i)
        rest_i = tl.load(decay_at + plane + i)
        driven = tl.load(decay_at + 2 * plane + q)
        driven_unit = tl.load(totals + (b * 3 * H + h) * chunks + chunk)
        p = h * P + part * BLOCK_P + own
        p_in = part * BLOCK_P + own < P
        D_p = tl.zeros((BLOCK_P,), tl.float32)
        if D is not None:
            if D_BY_CHANNEL:
                D_p += tl.load(D + p, mask=p_in, other=0).to(tl.float32)
            else:
                D_p += tl.load(D + h).to(tl.float32)
        x_q = tl.load(x_at + (q[:, None] * x_l + p[None, :]), mask=q_in[:, None] & p_in[None, :], other=0)
        x_i = x_q
        if D is not None:
            x_i = tl.load(x_at + (i[:, None] * x_l + p[None, :]), mask=i_in[:, None] & p_in[None, :], other=0)

        S = _factor(S, False, PRECISION, INTERPRETED)
        carried = _product(C_i, S, None, C_EXACT, False, PRECISION, INTERPRETED)
        # No token after i counts (CB is 0 there), but its decay must stay finite.
        if PRECISION == "half":
            mix = CB * tl.exp2(tl.minimum(coarse_i[:, None] - driven[None, :], 0.0))
        else:
            gap = tl.minimum(coarse_i[:, None] - tl.load(decay_at + q)[None, :], 0.0)
            mix = CB * tl.exp2(gap) * driven[None, :]
        mix = _factor(mix, False, PRECISION, INTERPRETED)
        x_w = _factor(x_q, X_EXACT, PRECISION, INTERPRETED)
        unit = tl.maximum(x_one * driven_unit * B_unit, SMALLEST)
        if X_MODE == 2:
            within = _product(mix, x_w, None, False, X_EXACT, PRECISION, INTERPRETED)
            x_step = tl.load(x_scale + p, mask=p_in, other=0.0)
            D_p *= x_step
            y_i = carried * (tl.exp2(coarse_i) * S_unit)[:, None] + within * (x_step * unit)[None, :]
            y_i *= (tl.exp2(rest_i) * C_unit)[:, None]
        else:
            y_i = carried * (tl.exp2(coarse_i) * (S_unit / unit))[:, None]
            y_i = _product(mix, x_w, y_i, False, X_EXACT, PRECISION, INTERPRETED)
            y_i *= (tl.exp2(rest_i) * (C_unit * unit))[:, None]
        if D is not None:
            y_i += as_floats(x_i) * (D_p * x_one)[None, :]
        y_at = y + (b * length + begin) * (H * P) + (i[:, None] * (H * P) + p[None, :])
        tl.store(y_at, y_i.to(y.dtype.element_ty), mask=i_in[:, None] & p_in[None, :])


def scan_chunks(
    launch: ScanLaunch,
    inputs: dict[str, Any],
    modes: dict[str, int],
    state: dict[str, Any],
    parameters: dict[str, Any],
    mask: Tensor | None,
    y: Tensor,
    *,
    headdim: int,
    ngroups: int,
    precision: Precision,
) -> None:
    """The three launches; y (B, L, H * P) and the state are written.

    inputs      x, dt, B, C, and x_scale, ...; modes X_MODE, ...: how the scales are given
    state       ``recurrence.state_arguments``
    parameters  A, D, dt_bias, low, high, LIMITED, D_BY_CHANNEL
    """
    D, D_BY_CHANNEL = parameters.pop("D"), parameters.pop("D_BY_CHANNEL")
    x, x_scale, dt, B, C = (inputs[name] for name in ("x", "x_scale", "dt", "B", "C"))
    batch, length, _ = x.shape
    nheads, d_state = len(parameters["A"]), B.shape[-1] // ngroups
    chunks, parts = triton.cdiv(length, launch.chunk), triton.cdiv(headdim, launch.channels)
    width = triton.next_power_of_2(max(16, d_state))
    kept = torch.float16 if precision == "half" else torch.float32
    floats, operands = y.new_empty, (batch, ngroups, chunks * launch.chunk, width)
    worked = {
        "decays": floats(batch, 4, nheads, chunks * launch.chunk, dtype=torch.float32),
        "totals": floats(batch, 3, nheads, chunks, dtype=torch.float32),
        "units": floats(batch, 2, ngroups, chunks, dtype=torch.float32),
    }
    B_kept, C_kept = floats(operands, dtype=kept), floats(operands, dtype=kept)
    entering = {
        "entering": floats(batch, chunks, nheads, parts, width, launch.channels, dtype=kept),
        "entering_unit": floats(batch, chunks, nheads, parts, dtype=torch.float32),
    }
    sizes = {"H": nheads, "G": ngroups, "BLOCK_N": width, "CHUNK": launch.chunk}
    lengths = {"length": length, "chunks": chunks, **dependent_launch(x.device)}
    products = {"PRECISION": precision, "INTERPRETED": x.device.type == "cpu"}

    head_blocks = triton.cdiv(nheads, launch.prepare_heads)
    _prepare_kernel[(chunks, head_blocks + 2 * ngroups, batch)](
        dt=dt,
        dt_scale=inputs["dt_scale"],
        mask=None if mask is None else mask.view(torch.uint8),
        B=B,
        B_scale=inputs["B_scale"],
        C=C,
        C_scale=inputs["C_scale"],
        B_out=B_kept,
        C_out=C_kept,
        dt_b=dt.stride(0),
        dt_l=dt.stride(1),
        B_b=B.stride(0),
        B_l=B.stride(1),
        C_b=C.stride(0),
        C_l=C.stride(1),
        mask_b=0 if mask is None else mask.stride(0),
        mask_l=0 if mask is None else mask.stride(1),
        DT_MODE=modes["DT_MODE"],
        B_MODE=modes["B_MODE"],
        C_MODE=modes["C_MODE"],
        N=d_state,
        BLOCK_H=launch.prepare_heads,
        HALF=precision == "half",
        **parameters,
        **worked,
        **lengths,
        **sizes,
    )
    shared = {
        "x": x,
        "x_scale": x_scale,
        "x_b": x.stride(0),
        "x_l": x.stride(1),
        "B": B_kept,
        "X_MODE": modes["X_MODE"],
        "B_EXACT": modes["B_MODE"] == ONE_SCALE,
        "P": headdim,
        "BLOCK_P": launch.channels,
        **worked,
        **entering,
        **lengths,
        **sizes,
        **products,
    }
    _states_kernel[(nheads * parts, batch)](
        **shared, **state, N=d_state, num_warps=launch.state_warps, num_stages=launch.state_stages
    )
    turns = triton.cdiv(nheads // ngroups * parts, launch.heads)
    _outputs_kernel[(launch.chunk // launch.rows * ngroups * turns, chunks, batch)](
        **shared,
        C=C_kept,
        D=D,
        y=y,
        heads=launch.heads,
        turns=turns,
        C_EXACT=modes["C_MODE"] == ONE_SCALE,
        D_BY_CHANNEL=D_BY_CHANNEL,
        ROWS=launch.rows,
        num_warps=launch.output_warps,
        num_stages=launch.output_stages,
    )
