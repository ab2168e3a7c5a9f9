"""Mamba2's state space dual: prompts in chunks of matrix products, and one step of the recurrence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation
from quamba.kernels.triton.recurrence import (
    LARGEST_DECAY,
    LOG2E,
    PROCESSORS,
    ROUNDER,
    check_parameters,
    operand,
    read_scalar,
    read_scale,
    read_scales,
    read_state_scale,
    read_vector,
    softplus,
    state_arguments,
    write_state,
)

#: How the matrix products of a prompt are computed. "split": on bfloat16 units; int8 codes are exact there,
#: and a float operand is cut into two halves of 8 bits, so a product errs by 2^-16 of itself at most.
#: "tf32": one pass, 2^-11. "tf32x3": three, about float32. "ieee": float32 without matrix units.
Precision = Literal["split", "tf32", "tf32x3", "ieee"]


@dataclass(frozen=True, kw_only=True)
class ScanLaunch:
    """How a prompt is cut up. Each program walks over its tokens with its part of one head's state."""

    channels: int  # of a head, per program
    chunk: int  # tokens in one matrix product
    segments: int  # parts of the prompt that run side by side; more than one costs a second launch
    num_warps: int
    num_stages: int


def scan_launch(batch: int, length: int, nheads: int, headdim: int) -> ScanLaunch:
    """Whole heads where they fill the GPU, then parts of heads, then parts of the prompt."""
    channels = min(64, max(16, triton.next_power_of_2(headdim)))
    while channels > 16 and batch * nheads * triton.cdiv(headdim, channels) < PROCESSORS:
        channels //= 2
    programs = max(1, batch * nheads * triton.cdiv(headdim, channels))
    # Of Triton 3.6 for sm_90, products of 64 bfloat16 rows with 16 or 32 columns are wrong (they go to wgmma;
    # seen on an H200: noise, or an illegal address). Of 32 rows they go to mma.sync and are right.
    chunk = 64 if length > 32 and channels == 64 else 32
    segments = max(1, min(triton.cdiv(PROCESSORS, programs), 16, length // (8 * chunk)))
    return ScanLaunch(channels=channels, chunk=chunk, segments=segments, num_warps=4, num_stages=2)


@dataclass(frozen=True, kw_only=True)
class StepLaunch:
    channels: int  # of a head, per program
    num_warps: int


def step_launch(batch: int, nheads: int, headdim: int, d_state: int) -> StepLaunch:
    """Small parts of heads while the GPU is not full, then 4096 elements of the state a program."""
    widest = max(1, min(triton.next_power_of_2(headdim), 4096 // triton.next_power_of_2(d_state)))
    channels = widest
    while channels > 8 and batch * nheads * triton.cdiv(headdim, channels) < 4 * PROCESSORS:
        channels //= 2
    return StepLaunch(channels=channels, num_warps=4 if channels * d_state > 1024 else 2)


@triton.jit
def _delta(v: tl.tensor, low: tl.tensor, high: tl.tensor, LIMITED: tl.constexpr) -> tl.tensor:
    delta = softplus(v)
    return tl.minimum(tl.maximum(delta, low), high) if LIMITED else delta


@triton.jit
def _step_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    B_scale: tl.tensor,
    C: tl.tensor,
    C_scale: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    y: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    x_b: tl.tensor,
    dt_b: tl.tensor,
    B_b: tl.tensor,
    C_b: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    X_MODE: tl.constexpr,
    DT_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    LIMITED: tl.constexpr,
    D_BY_CHANNEL: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Program (part of a head, sequence): its rows of the state are read, advanced and written once."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // blocks
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_in, n_in = p < P, n < N
    inside = p_in[:, None] & n_in[None, :]
    S_at = state + b * state_b + h * (P * N) + p[:, None] * N + n[None, :]
    S = tl.load(S_at, mask=inside, other=0).to(tl.float32)

    raw = read_scalar(dt, b * dt_b + h, dt_scale, h, DT_MODE)
    if dt_bias is not None:
        raw += tl.load(dt_bias + h).to(tl.float32)
    delta = _delta(raw, low, high, LIMITED)
    decay = tl.exp2(delta * tl.load(A + h).to(tl.float32) * LOG2E)
    x_p = read_vector(x + b * x_b + h * P, p, p_in, x_scale, h * P, X_MODE)
    first = h // HEADS_PER_GROUP * N
    B_n = read_vector(B + b * B_b + first, n, n_in, B_scale, first, B_MODE)
    C_n = read_vector(C + b * C_b + first, n, n_in, C_scale, first, C_MODE)

    per_step = 1.0
    if state_scale is not None:
        p_near = p if BLOCK_P * blocks == P else tl.minimum(p, P - 1)
        n_near = n if BLOCK_N == N else tl.minimum(n, N - 1)
        step = read_state_scale(
            state_scale,
            state_group,
            h * scale_h,
            h * P,
            p_near[:, None],
            n_near[None, :],
            scale_c,
            scale_n,
            SCALE_BY_CHANNEL,
            SCALE_BY_COLUMN,
        )
        S *= step * decay
        per_step = 1.0 / step
    else:
        S *= decay
    S += (x_p * delta)[:, None] * B_n[None, :]
    write_state(S_at, S, per_step, inside)
    y_p = tl.sum(S * C_n[None, :], axis=1)
    if D is not None:
        if D_BY_CHANNEL:
            y_p += x_p * tl.load(D + h * P + p, mask=p_in, other=0).to(tl.float32)
        else:
            y_p += x_p * tl.load(D + h).to(tl.float32)
    tl.store(y + b * (H * P) + h * P + p, y_p.to(y.dtype.element_ty), mask=p_in)


def ssd_step(
    x: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``reference.ssd.ssd_step`` in one launch; the state's bytes are read once and written once.

    state_group  (H * P,) int32 or None: with it, state_scale is (K, N) or (K, 1), one row a group of channels
    The new state differs from the reference by float32 rounding, its codes only where that crosses a tie.
    ValueError for float64, and for strides that the kernels do not read.
    """
    arguments, modes = _inputs(x, dt, B, C)
    check_parameters(A=A, D=D, dt_bias=dt_bias)
    batch, d_inner = arguments["x"].shape
    nheads, d_state = A.shape[0], arguments["B"].shape[-1] // ngroups
    y = torch.empty(batch, d_inner, dtype=out_dtype, device=A.device)
    if y.numel() == 0:
        return y
    launch = step_launch(batch, nheads, headdim, d_state)
    _step_kernel[(nheads * triton.cdiv(headdim, launch.channels), batch)](
        **arguments,
        **{f"{name}_b": arguments[name].stride(0) for name in ("x", "dt", "B", "C")},
        **modes,
        **state_arguments(state, state_scale, state_group),
        **_head_arguments(A, D, dt_bias, dt_limit),
        y=y,
        P=headdim,
        N=d_state,
        HEADS_PER_GROUP=nheads // ngroups,
        BLOCK_P=launch.channels,
        BLOCK_N=triton.next_power_of_2(d_state),
        num_warps=launch.num_warps,
    )
    return y


def _inputs(
    x: Activation, dt: Activation, B: Activation, C: Activation
) -> tuple[dict[str, Any], dict[str, int]]:
    arguments: dict[str, Any] = {}
    modes: dict[str, int] = {}
    for name, value in (("x", x), ("dt", dt), ("B", B), ("C", C)):
        arguments[name], arguments[f"{name}_scale"], modes[f"{name.upper()}_MODE"] = operand(name, value)
    return arguments, modes


def _head_arguments(
    A: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_limit: tuple[float, float]
) -> dict[str, Any]:
    return {
        "A": A,
        "D": D,
        "dt_bias": dt_bias,
        "low": float(dt_limit[0]),
        "high": float(dt_limit[1]),
        "LIMITED": tuple(dt_limit) != (0.0, math.inf),
        "D_BY_CHANNEL": D is not None and len(D) != len(A),
        "H": len(A),
    }


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
    """v as ``_product`` takes it: what bfloat16 holds exactly is narrowed once, however often it is used."""
    return _narrow(v, INTERPRETED) if EXACT and PRECISION == "split" else v


@triton.jit
def _product(
    a: tl.tensor,
    b: tl.tensor,
    A_EXACT: tl.constexpr,
    B_EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """a @ b summed in float32 (see ``Precision``); a and b are factors (``_factor``)."""
    if PRECISION == "split":
        a_high = a if A_EXACT else _upper_half(a)
        b_high = b if B_EXACT else _upper_half(b)
        a_wide = a if A_EXACT else _narrow(a_high, INTERPRETED)
        b_wide = b if B_EXACT else _narrow(b_high, INTERPRETED)
        total = tl.dot(a_wide, b_wide, input_precision="ieee")
        if not A_EXACT:
            a_rest = _narrow(a - a_high, INTERPRETED)
            total = tl.dot(a_rest, b_wide, total, input_precision="ieee")
        if not B_EXACT:
            b_rest = _narrow(b - b_high, INTERPRETED)
            total = tl.dot(a_wide, b_rest, total, input_precision="ieee")
    else:
        total = tl.dot(a, b, input_precision=PRECISION)
    return total


@triton.jit
def _decays(log2_decay: tl.tensor) -> tl.tensor:
    """Running sums of log2 of the tokens' decays, as (multiples of 2^-9, rest).

    Differences of large float32 sums would lose digits. The multiples stay exact, because a chunk sums to
    less than 2^14 once single tokens are limited (``LARGEST_DECAY``), and the rests are small.
    """
    limited = tl.maximum(log2_decay, LARGEST_DECAY)
    coarse = ((limited * 512.0 + ROUNDER) - ROUNDER) * (1.0 / 512.0)
    return coarse, limited - coarse


# One compilation for prompts of all lengths.
@triton.jit(do_not_specialize=["length", "segment", "parts", "mask_b"])
def _scan_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    B_scale: tl.tensor,
    C: tl.tensor,
    C_scale: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    entering: tl.tensor,
    totals: tl.tensor,
    x_b: tl.tensor,
    x_l: tl.tensor,
    dt_b: tl.tensor,
    dt_l: tl.tensor,
    B_b: tl.tensor,
    B_l: tl.tensor,
    C_b: tl.tensor,
    C_l: tl.tensor,
    mask_b: tl.tensor,
    mask_l: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    length: tl.tensor,
    segment: tl.tensor,
    parts: tl.tensor,
    X_MODE: tl.constexpr,
    DT_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    LIMITED: tl.constexpr,
    D_BY_CHANNEL: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PASS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (part of a head, sequence, segment of the prompt): the segment's chunks one after the other.

    PASS 0  the only segment: outputs, and the state in its stored format
    PASS 1  each segment but the last from a zero state, without outputs: entering[:, i + 1] is the state
            after segment i, totals[:, i + 1] log2 of its decay; entering[:, 0] is the initial state
    PASS 2  each segment from the state that pass 1 implies; the last one stores the final state
    The state is held as S^T (N, P), so that every product has at least CHUNK or N rows.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // blocks
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_in, n_in = p < P, n < N
    inside = p_in[:, None] & n_in[None, :]
    slot = ((b * parts + part) * H + h) * (N * P) + n[:, None] * P + p[None, :]

    S_at = state
    step = 1.0
    if state is not None:
        S_at = state + b * state_b + h * (P * N) + p[:, None] * N + n[None, :]
        if state_scale is not None:
            step = read_state_scale(
                state_scale,
                state_group,
                h * scale_h,
                h * P,
                tl.minimum(p, P - 1)[:, None],
                tl.minimum(n, N - 1)[None, :],
                scale_c,
                scale_n,
                SCALE_BY_CHANNEL,
                SCALE_BY_COLUMN,
            )

    S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if PASS == 0:
        if state is not None:
            S = tl.trans(tl.load(S_at, mask=inside, other=0).to(tl.float32) * step)
    elif PASS == 1:
        if part == 0:
            initial = S
            if state is not None:
                initial = tl.trans(tl.load(S_at, mask=inside, other=0).to(tl.float32) * step)
            tl.store(entering + slot, initial, mask=tl.trans(inside))
            tl.store(totals + b * parts * H + h, 0.0)
    else:
        for i in range(0, part + 1):
            at = entering + ((b * parts + i) * H + h) * (N * P) + n[:, None] * P + p[None, :]
            decayed = S * tl.exp2(tl.load(totals + (b * parts + i) * H + h))
            S = decayed + tl.load(at, mask=tl.trans(inside), other=0.0)

    group = h // HEADS_PER_GROUP * N
    A_h = tl.load(A + h).to(tl.float32) * LOG2E
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + h).to(tl.float32)
    dt_step = read_scale(dt_scale, h, DT_MODE)
    D_p = tl.zeros((BLOCK_P,), tl.float32)
    if D is not None:
        if D_BY_CHANNEL:
            D_p += tl.load(D + h * P + p, mask=p_in, other=0).to(tl.float32)
        else:
            D_p += tl.load(D + h).to(tl.float32)
        D_p *= read_scales(x_scale, h * P + p, p_in, X_MODE)

    # Codes are multiplied as they are. One scale for all goes to the weights of tokens, scales by channel to
    # the sums; only where they vary along the sum does an operand carry them.
    X_EXACT: tl.constexpr = X_MODE > 0
    B_EXACT: tl.constexpr = B_MODE > 0
    C_EXACT: tl.constexpr = C_MODE > 0
    BY_COLUMN: tl.constexpr = B_MODE == 2 or C_MODE == 2
    x_one = read_scale(x_scale, 0, X_MODE % 2)
    B_one = read_scale(B_scale, 0, B_MODE % 2)
    C_one = read_scale(C_scale, 0, C_MODE % 2)
    x_step = read_scales(x_scale, h * P + p, p_in, X_MODE // 2 * 2)
    B_step = read_scales(B_scale, group + n, n_in, B_MODE // 2 * 2)
    C_step = read_scales(C_scale, group + n, n_in, C_MODE // 2 * 2)

    q = tl.arange(0, CHUNK)
    begin = part * segment
    end = tl.minimum(begin + segment, length)
    total = 0.0
    for start in range(begin, end, CHUNK):
        t_in = start + q < end
        far = tl.full((), 0, tl.int64) + start
        raw = tl.load(dt + b * dt_b + far * dt_l + h + q * dt_l, mask=t_in, other=0).to(tl.float32)
        delta = _delta(raw * dt_step + bias, low, high, LIMITED)
        if mask is not None:
            kept = tl.load(mask + b * mask_b + far * mask_l + q * mask_l, mask=t_in, other=0)
            delta = tl.where(kept != 0, delta, 0.0)
        delta = tl.where(t_in, delta, 0.0)
        coarse_t, rest_t = _decays(delta * A_h)
        coarse, rest = tl.cumsum(coarse_t, 0), tl.cumsum(rest_t, 0)
        coarse_end, rest_end = tl.sum(coarse_t, 0), tl.sum(rest_t, 0)

        x_at = x + b * x_b + far * x_l + h * P + (q[:, None] * x_l + p[None, :])
        x_q = tl.load(x_at, mask=t_in[:, None] & p_in[None, :], other=0).to(tl.float32)
        B_at = B + b * B_b + far * B_l + group + (q[:, None] * B_l + n[None, :])
        B_q = tl.load(B_at, mask=t_in[:, None] & n_in[None, :], other=0).to(tl.float32)
        B_q = _factor(B_q, B_EXACT, PRECISION, INTERPRETED)

        if PASS != 1:
            C_at = C + b * C_b + far * C_l + group + (q[:, None] * C_l + n[None, :])
            C_q = tl.load(C_at, mask=t_in[:, None] & n_in[None, :], other=0).to(tl.float32)
            C_w = _factor(C_q, C_EXACT, PRECISION, INTERPRETED)
            # From before the chunk: y_i = exp(decay_i) C_i S
            if C_MODE == 2:
                y_q = _product(C_w, S * C_step[:, None], C_EXACT, False, PRECISION, INTERPRETED)
            else:
                y_q = _product(C_w, S, C_EXACT, False, PRECISION, INTERPRETED)
            y_q *= (tl.exp2(coarse) * C_one)[:, None]
            # Within it: y_i += sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) delta_j x_j
            if BY_COLUMN:
                C_B = C_q * (B_step * C_step)[None, :]
                CB = _product(C_B, tl.trans(B_q), False, B_EXACT, PRECISION, INTERPRETED)
            else:
                CB = _product(C_w, tl.trans(B_q), C_EXACT, B_EXACT, PRECISION, INTERPRETED)
            gap = tl.where(q[:, None] >= q[None, :], coarse[:, None] - coarse[None, :], float("-inf"))
            mix = CB * tl.exp2(gap) * (delta * tl.exp2(-rest) * (x_one * B_one * C_one))[None, :]
            x_w = _factor(x_q, X_EXACT, PRECISION, INTERPRETED)
            within = _product(mix, x_w, False, X_EXACT, PRECISION, INTERPRETED)
            if X_MODE == 2:
                within *= x_step[None, :]
            y_q = (y_q + within) * tl.exp2(rest)[:, None]
            if D is not None:
                y_q += x_q * D_p[None, :]
            y_at = y + (b * length + far) * (H * P) + h * P + (q[:, None] * (H * P) + p[None, :])
            tl.store(y_at, y_q.to(y.dtype.element_ty), mask=t_in[:, None] & p_in[None, :])

        # The state after it: S <- exp(decay_Q) S + sum_j exp(decay_Q - decay_j) delta_j x_j B_j^T
        weight = delta * tl.exp2((coarse_end - coarse) + (rest_end - rest)) * (x_one * B_one)
        entered = _product(tl.trans(B_q), x_q * weight[:, None], B_EXACT, False, PRECISION, INTERPRETED)
        if X_MODE == 2:
            entered *= x_step[None, :]
        if B_MODE == 2:
            entered *= B_step[:, None]
        S = S * tl.exp2(coarse_end + rest_end) + entered
        total += coarse_end + rest_end

    if PASS == 1:
        after = (b * parts + part + 1) * H + h
        tl.store(entering + after * (N * P) + n[:, None] * P + p[None, :], S, mask=tl.trans(inside))
        tl.store(totals + after, total)
    elif state is not None:  # noqa: SIM102, known when compiled; the other only when run
        if part + 1 == parts:
            per_step = 1.0
            if state_scale is not None:
                per_step = 1.0 / step
            write_state(S_at, tl.trans(S), per_step, inside)


def ssd_scan(
    x: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 64,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    precision: Precision = "split",
) -> Tensor:
    """``reference.ssd.ssd_scan`` in one launch, or two where one would leave most of the GPU idle.

    chunk_size   of the model: the result does not depend on it, the kernel takes what suits the GPU
    state_group  (H * P,) int32 or None: with it, state_scale is (K, N) or (K, 1), one row a group of channels
    precision    of the matrix products; everything else is float32. Relative to the root mean square of y,
                 "split" errs by less than 1e-5 (root mean square), "ieee" as the float32 reference does
    ValueError for float64, and for strides that the kernels do not read.
    """
    arguments, modes = _inputs(x, dt, B, C)
    check_parameters(A=A, D=D, dt_bias=dt_bias)
    batch, length, d_inner = arguments["x"].shape
    nheads, d_state = A.shape[0], arguments["B"].shape[-1] // ngroups
    y = torch.empty(batch, length, d_inner, dtype=out_dtype, device=A.device)
    if y.numel() == 0:
        return y
    launch = scan_launch(batch, length, nheads, headdim)
    segment = triton.cdiv(triton.cdiv(length, launch.segments), launch.chunk) * launch.chunk
    parts = triton.cdiv(length, segment)
    entering = totals = None
    if parts > 1:
        entering = torch.empty(batch, parts, nheads, d_state, headdim, device=A.device)
        totals = torch.empty(batch, parts, nheads, device=A.device)
    for name in ("x", "dt", "B", "C"):
        arguments[f"{name}_b"], arguments[f"{name}_l"] = arguments[name].stride()[:2]
    for scan_pass, programs in ((0, 1),) if parts == 1 else ((1, parts - 1), (2, parts)):
        _scan_kernel[(nheads * triton.cdiv(headdim, launch.channels), batch, programs)](
            **arguments,
            **modes,
            **state_arguments(state, state_scale, state_group),
            **_head_arguments(A, D, dt_bias, dt_limit),
            mask=None if mask is None else mask.view(torch.uint8),
            mask_b=0 if mask is None else mask.stride(0),
            mask_l=0 if mask is None else mask.stride(1),
            y=y,
            entering=entering,
            totals=totals,
            length=length,
            segment=segment,
            parts=parts,
            P=headdim,
            N=d_state,
            HEADS_PER_GROUP=nheads // ngroups,
            BLOCK_P=launch.channels,
            BLOCK_N=triton.next_power_of_2(max(16, d_state)),
            CHUNK=launch.chunk,
            PASS=scan_pass,
            PRECISION=precision,
            INTERPRETED=A.device.type == "cpu",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return y
