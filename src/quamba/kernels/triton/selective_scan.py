"""Mamba1's selective scan: prompts, and one step of the recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import silu
from quamba.kernels.triton.recurrence import (
    LOG2E,
    PROCESSORS,
    check_parameters,
    operand,
    read_scale,
    read_scales,
    read_state_scale,
    read_vector,
    softplus,
    state_arguments,
    write_state,
)


@dataclass(frozen=True, kw_only=True)
class ScanLaunch:
    """How a prompt is cut up. Each program walks over its tokens with the states of its channels."""

    channels: int  # per program
    lanes: int  # threads that share a channel's states
    tokens: int  # loaded together, and worked on in order
    segments: int  # parts of the prompt that run side by side; more than one costs a second launch
    num_warps: int


@launch_choice("selective_scan.launch")
def scan_launch(batch: int, length: int, d_inner: int) -> ScanLaunch:
    """From timings on an H200: 16 channels a warp where a multiprocessor gets 16 such warps, or as many
    segments as make them so many; 8 channels where the work is in between.

    Segments cost a second pass over most of the work, and pay where few programs leave processors idle.
    """
    warps = batch * triton.cdiv(d_inner, 16)
    if warps >= 16 * PROCESSORS:
        return ScanLaunch(channels=16, lanes=2, tokens=8, segments=1, num_warps=1)
    segments = min(20 * PROCESSORS // max(1, warps), 16, length // 64)
    if segments >= 4:
        return ScanLaunch(channels=16, lanes=2, tokens=8, segments=segments, num_warps=1)
    return ScanLaunch(
        channels=8, lanes=4, tokens=8 if warps >= 4 * PROCESSORS else 16, segments=1, num_warps=1
    )


@dataclass(frozen=True, kw_only=True)
class StepLaunch:
    channels: int  # per program
    rows: int  # sequences per program, which share one read of A
    num_warps: int


@launch_choice("selective_scan_step.launch")
def step_launch(batch: int, d_inner: int, d_state: int) -> StepLaunch:
    """512 elements of the state a program; fewer, or those of more sequences, as the GPU fills."""
    channels = max(4, 512 // triton.next_power_of_2(d_state))
    while channels > 4 and batch * triton.cdiv(d_inner, channels) < PROCESSORS:
        channels //= 2
    programs = batch * triton.cdiv(d_inner, channels)
    rows = max(1, min(4, triton.next_power_of_2(programs // (16 * PROCESSORS) + 1) // 2))
    return StepLaunch(channels=channels, rows=rows, num_warps=1 if rows > 1 else 2)


@triton.jit(do_not_specialize=["batch"])
def _step_kernel(
    u: tl.tensor,
    u_scale: tl.tensor,
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    B_scale: tl.tensor,
    C: tl.tensor,
    C_scale: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    dt_bias: tl.tensor,
    y: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    u_b: tl.tensor,
    dt_b: tl.tensor,
    B_b: tl.tensor,
    C_b: tl.tensor,
    z_b: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    batch: tl.tensor,
    channels: tl.tensor,
    U_MODE: tl.constexpr,
    DT_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    Z_MODE: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (channels, sequences): the states are read, advanced and written once, A is read once."""
    let_next_start(EARLY)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    d_in, n_in = d < channels, n < N
    inside = d_in[:, None] & n_in[None, :]
    at = d[:, None] * N + n[None, :]
    begin = tl.program_id(1) * ROWS
    wait_for_inputs(EARLY)
    A_dn = tl.load(A + at, mask=inside, other=0).to(tl.float32) * LOG2E
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + d, mask=d_in, other=0).to(tl.float32)
    D_d = tl.zeros((BLOCK_D,), tl.float32)
    if D is not None:
        D_d = tl.load(D + d, mask=d_in, other=0).to(tl.float32)
    step = 1.0
    per_step = 1.0
    if state_scale is not None:
        step = read_state_scale(
            state_scale,
            state_group,
            0,
            0,
            tl.minimum(d, channels - 1)[:, None],
            (n if BLOCK_N == N else tl.minimum(n, N - 1))[None, :],
            scale_c,
            scale_n,
            SCALE_BY_CHANNEL,
            SCALE_BY_COLUMN,
        )
        per_step = 1.0 / step

    for row in range(begin, tl.minimum(begin + ROWS, batch)):
        b = tl.full((), 0, tl.int64) + row
        h_at = state + b * state_b + at
        h = tl.load(h_at, mask=inside, other=0).to(tl.float32)
        u_d = read_vector(u + b * u_b, d, d_in, u_scale, 0, U_MODE)
        delta = softplus(read_vector(dt + b * dt_b, d, d_in, dt_scale, 0, DT_MODE) + bias)
        B_n = read_vector(B + b * B_b, n, n_in, B_scale, 0, B_MODE)
        C_n = read_vector(C + b * C_b, n, n_in, C_scale, 0, C_MODE)
        if state_scale is not None:
            h *= step
        h = h * tl.exp2(delta[:, None] * A_dn) + (delta * u_d)[:, None] * B_n[None, :]
        write_state(h_at, h, per_step, inside)
        y_d = tl.sum(h * C_n[None, :], axis=1) + u_d * D_d
        if z is not None:
            y_d *= silu(read_vector(z + b * z_b, d, d_in, z_scale, 0, Z_MODE))
        tl.store(y + b * channels + d, y_d.to(y.dtype.element_ty), mask=d_in)


def selective_scan_step(
    u: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    z: Activation | None,
    dt_bias: Tensor | None,
    *,
    state: Tensor,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``reference.selective_scan.selective_scan_step`` in one launch; each byte of the state is read once.

    state_group  (Di,) int32 or None: with it, state_scale is (K, N) or (K, 1), one row a group of channels
    The new state differs from the reference by float32 rounding, its codes only where that crosses a tie.
    ValueError for float64, and for strides that the kernels do not read.
    """
    arguments = _inputs(u, dt, B, C, z)
    check_parameters(A=A, D=D, dt_bias=dt_bias)
    batch, d_inner = arguments["u"].shape
    d_state = A.shape[1]
    y = torch.empty(batch, d_inner, dtype=out_dtype, device=A.device)
    if y.numel() == 0:
        return y
    launch = step_launch(batch, d_inner, d_state)
    _step_kernel[(triton.cdiv(d_inner, launch.channels), triton.cdiv(batch, launch.rows))](
        **arguments,
        **_strides(arguments, "b"),
        **state_arguments(state, state_scale, state_group),
        A=A,
        D=D,
        dt_bias=dt_bias,
        y=y,
        batch=batch,
        channels=d_inner,
        N=d_state,
        BLOCK_D=launch.channels,
        BLOCK_N=triton.next_power_of_2(d_state),
        ROWS=launch.rows,
        num_warps=launch.num_warps,
        **dependent_launch(y.device),
    )
    return y


def _inputs(
    u: Activation, dt: Activation, B: Activation, C: Activation, z: Activation | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"z": None, "z_scale": None, "Z_MODE": 0}
    for name, value in (("u", u), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if value is not None:
            data, scale, mode = operand(name, value)
            arguments.update({name: data, f"{name}_scale": scale, f"{name.upper()}_MODE": mode})
    return arguments


def _strides(arguments: dict[str, Any], dims: str) -> dict[str, int]:
    """u_b, u_l, dt_b, ... of the inputs; 0 for an absent z."""
    return {
        f"{name}_{dim}": 0 if arguments[name] is None else arguments[name].stride(i)
        for name in ("u", "dt", "B", "C", "z")
        for i, dim in enumerate(dims)
    }


@triton.jit
def _token(values: tl.tensor, at: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """values[..., s]. All tokens of a channel are in registers of one thread, so this compiles to nothing.

    As integers: a sum of floats with zeros is not the same float to a compiler, as that may be -0.
    """
    bits = tl.where(at == s, values.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 3, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _by_state(values: tl.tensor, LANES: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """(TOKENS, states) -> (EACH, 1, LANES, TOKENS), state lane * EACH + i at (i, 0, lane)."""
    return tl.permute(tl.reshape(values, (TOKENS, LANES, EACH)), (2, 1, 0))[:, None, :, :]


# One compilation for prompts of all lengths.
#
# Triton gives a tensor the layout of a load that it comes from: neighbours in memory to one thread, then
# dimension by dimension to the threads of a warp. So A and the states are loaded as (states of a thread,
# channels, threads of a channel, 1), which leaves a last dimension, that of tokens, to registers.
@triton.jit(do_not_specialize=["length", "segment", "parts", "mask_b"])
def _scan_kernel(
    u: tl.tensor,
    u_scale: tl.tensor,
    dt: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    B_scale: tl.tensor,
    C: tl.tensor,
    C_scale: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    dt_bias: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    entering: tl.tensor,
    totals: tl.tensor,
    u_b: tl.tensor,
    u_l: tl.tensor,
    dt_b: tl.tensor,
    dt_l: tl.tensor,
    B_b: tl.tensor,
    B_l: tl.tensor,
    C_b: tl.tensor,
    C_l: tl.tensor,
    z_b: tl.tensor,
    z_l: tl.tensor,
    mask_b: tl.tensor,
    mask_l: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    length: tl.tensor,
    segment: tl.tensor,
    parts: tl.tensor,
    channels: tl.tensor,
    U_MODE: tl.constexpr,
    DT_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    Z_MODE: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    TOKENS: tl.constexpr,
    PASS: tl.constexpr,
) -> None:
    """Program (channels, sequence, segment of the prompt): the tokens of the segment one after the other.

    PASS 0  the only segment: outputs, and the state in its stored format
    PASS 1  each segment but the last from a zero state, without outputs: entering[:, i + 1] is the state
            after segment i, totals[:, i + 1] its sum of delta; entering[:, 0] is the initial state
    PASS 2  each segment from the state that pass 1 implies; the last one stores the final state
    What depends on a token and a channel is worked out once, by one thread, for ``TOKENS`` at a time; the
    next ones are loaded meanwhile.
    """
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d < channels
    n = tl.arange(0, LANES)[None, None, :, None] * EACH + tl.arange(0, EACH)[:, None, None, None]
    d4 = d[None, :, None, None]
    inside = (d4 < channels) & (n < N)
    at = d4 * N + n
    A_dn = tl.load(A + at, mask=inside, other=0).to(tl.float32) * LOG2E
    slot = at + b * parts * N * channels

    step = 1.0
    if state_scale is not None:
        step = read_state_scale(
            state_scale,
            state_group,
            0,
            0,
            tl.minimum(d4, channels - 1),
            tl.minimum(n, N - 1),
            scale_c,
            scale_n,
            SCALE_BY_CHANNEL,
            SCALE_BY_COLUMN,
        )
    h = tl.zeros((EACH, BLOCK_D, LANES, 1), tl.float32)
    if PASS == 0:
        if state is not None:
            h = tl.load(state + b * state_b + at, mask=inside, other=0).to(tl.float32) * step
    elif PASS == 1:
        if part == 0:
            initial = h
            if state is not None:
                initial = tl.load(state + b * state_b + at, mask=inside, other=0).to(tl.float32) * step
            tl.store(entering + slot, initial, mask=inside)
    else:
        h = tl.load(entering + slot, mask=inside, other=0.0)
        for i in range(1, part + 1):
            since = tl.load(totals + (b * parts + i) * channels + d4, mask=d4 < channels, other=0.0)
            local = tl.load(entering + slot + i * (N * channels), mask=inside, other=0.0)
            h = h * tl.exp2(since * A_dn) + local

    states = tl.arange(0, LANES * EACH)
    n_in = states < N
    u_step = read_scales(u_scale, d, d_in, U_MODE)[None, :]
    dt_step = read_scales(dt_scale, d, d_in, DT_MODE)[None, :]
    z_step = read_scales(z_scale, d, d_in, Z_MODE)[None, :]
    B_one = read_scale(B_scale, 0, B_MODE % 2)
    C_one = read_scale(C_scale, 0, C_MODE % 2)
    B_step = read_scales(B_scale, states, n_in, B_MODE // 2 * 2)[None, :]
    C_step = read_scales(C_scale, states, n_in, C_MODE // 2 * 2)[None, :]
    bias = tl.zeros((1, BLOCK_D), tl.float32)
    if dt_bias is not None:
        bias += tl.load(dt_bias + d, mask=d_in, other=0).to(tl.float32)[None, :]
    D_d = tl.zeros((1, BLOCK_D), tl.float32)
    if D is not None:
        D_d += tl.load(D + d, mask=d_in, other=0).to(tl.float32)[None, :]

    begin = part * segment
    end = tl.minimum(begin + segment, length)
    far = tl.full((), 0, tl.int64) + begin
    t = tl.arange(0, TOKENS)
    t4 = t[None, None, None, :]
    u_at = u + b * u_b + far * u_l + (t[:, None] * u_l + d[None, :])
    dt_at = dt + b * dt_b + far * dt_l + (t[:, None] * dt_l + d[None, :])
    B_at = B + b * B_b + far * B_l + (t[:, None] * B_l + states[None, :])
    C_at = C + b * C_b + far * C_l + (t[:, None] * C_l + states[None, :])
    z_at = u_at
    mask_at = u_at
    y_at = y + (b * length + far) * channels + (t[:, None] * channels + d[None, :])
    t_in = t < end - begin
    of_channels, of_states = t_in[:, None] & d_in[None, :], t_in[:, None] & n_in[None, :]
    u_next = tl.load(u_at, mask=of_channels, other=0)
    dt_next = tl.load(dt_at, mask=of_channels, other=0)
    B_next = tl.load(B_at, mask=of_states, other=0)
    C_next = B_next
    if PASS != 1:
        C_next = tl.load(C_at, mask=of_states, other=0)
    z_next = u_next
    if z is not None and PASS != 1:
        z_at = z + b * z_b + far * z_l + (t[:, None] * z_l + d[None, :])
        z_next = tl.load(z_at, mask=of_channels, other=0)
    kept_next = t_in.to(tl.uint8)
    if mask is not None:
        mask_at = mask + b * mask_b + far * mask_l + t * mask_l
        kept_next = tl.load(mask_at, mask=t_in, other=0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, TOKENS):
        store = of_channels
        u_t = u_next.to(tl.float32) * u_step
        delta = softplus(dt_next.to(tl.float32) * dt_step + bias)
        delta = tl.where(kept_next[:, None] != 0, delta, 0.0)
        B_t = B_next.to(tl.float32)
        if B_MODE == 2:
            B_t *= B_step
        C_t = C_next.to(tl.float32)
        if C_MODE == 2:
            C_t *= C_step
        gate = tl.full((TOKENS, BLOCK_D), 1.0, tl.float32)
        if z is not None and PASS != 1:
            gate = silu(z_next.to(tl.float32) * z_step)

        t_in = t < end - start - TOKENS
        of_channels, of_states = t_in[:, None] & d_in[None, :], t_in[:, None] & n_in[None, :]
        u_at += TOKENS * u_l
        dt_at += TOKENS * dt_l
        B_at += TOKENS * B_l
        u_next = tl.load(u_at, mask=of_channels, other=0)
        dt_next = tl.load(dt_at, mask=of_channels, other=0)
        B_next = tl.load(B_at, mask=of_states, other=0)
        kept_next = t_in.to(tl.uint8)
        if mask is not None:
            mask_at += TOKENS * mask_l
            kept_next = tl.load(mask_at, mask=t_in, other=0)
        if PASS != 1:
            C_at += TOKENS * C_l
            C_next = tl.load(C_at, mask=of_states, other=0)
            if z is not None:
                z_at += TOKENS * z_l
                z_next = tl.load(z_at, mask=of_channels, other=0)

        decay = tl.exp2(tl.trans(delta)[None, :, None, :] * A_dn)
        driven = tl.trans(delta * u_t * B_one)[None, :, None, :] * _by_state(B_t, LANES, EACH, TOKENS)
        held = tl.zeros((EACH, BLOCK_D, LANES, TOKENS), tl.float32)
        for s in tl.static_range(TOKENS):
            h = _token(decay, t4, s) * h + _token(driven, t4, s)
            if PASS != 1:
                held = tl.where(t4 == s, h, held)
        if PASS == 1:
            total += tl.sum(delta, 0)
        else:
            products = held * _by_state(C_t, LANES, EACH, TOKENS)
            y_t = tl.trans(tl.sum(tl.sum(products, 0), 1)) * C_one
            y_t = (y_t + u_t * D_d) * gate
            tl.store(y_at, y_t.to(y.dtype.element_ty), mask=store)
            y_at += TOKENS * channels

    if PASS == 1:
        tl.store(entering + slot + (part + 1) * (N * channels), h, mask=inside)
        tl.store(totals + (b * parts + part + 1) * channels + d, total, mask=d_in)
    elif state is not None:  # noqa: SIM102, known when compiled; the other only when run
        if part + 1 == parts:
            per_step = 1.0
            if state_scale is not None:
                per_step = 1.0 / step
            write_state(state + b * state_b + at, h, per_step, inside)


def selective_scan(
    u: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    z: Activation | None,
    dt_bias: Tensor | None,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``reference.selective_scan.selective_scan`` in one launch, or two where one would leave the GPU idle.

    state_group  (Di,) int32 or None: with it, state_scale is (K, N) or (K, 1), one row a group of channels
    ValueError for float64, and for strides that the kernels do not read.
    """
    arguments = _inputs(u, dt, B, C, z)
    check_parameters(A=A, D=D, dt_bias=dt_bias)
    batch, length, d_inner = arguments["u"].shape
    d_state = A.shape[1]
    y = torch.empty(batch, length, d_inner, dtype=out_dtype, device=A.device)
    if y.numel() == 0:
        return y
    launch = scan_launch(batch, length, d_inner)
    segment = triton.cdiv(length, launch.segments)
    parts = triton.cdiv(length, segment)
    lanes = min(launch.lanes, triton.next_power_of_2(d_state))
    entering = totals = None
    if parts > 1:
        entering = torch.empty(batch, parts, d_inner, d_state, device=A.device)
        totals = torch.empty(batch, parts, d_inner, device=A.device)
    for scan_pass, programs in ((0, 1),) if parts == 1 else ((1, parts - 1), (2, parts)):
        _scan_kernel[(triton.cdiv(d_inner, launch.channels), batch, programs)](
            **arguments,
            **_strides(arguments, "bl"),
            **state_arguments(state, state_scale, state_group),
            A=A,
            D=D,
            dt_bias=dt_bias,
            mask=None if mask is None else mask.view(torch.uint8),
            mask_b=0 if mask is None else mask.stride(0),
            mask_l=0 if mask is None else mask.stride(1),
            y=y,
            entering=entering,
            totals=totals,
            length=length,
            segment=segment,
            parts=parts,
            channels=d_inner,
            N=d_state,
            BLOCK_D=launch.channels,
            LANES=lanes,
            EACH=triton.next_power_of_2(d_state) // lanes,
            TOKENS=launch.tokens,
            PASS=scan_pass,
            num_warps=launch.num_warps,
        )
    return y
