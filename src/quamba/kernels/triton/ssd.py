"""Mamba2's state space dual: prompts in chunks of matrix products, and one step of the recurrence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.recurrence import (
    LOG2E,
    PROCESSORS,
    as_floats,
    check_parameters,
    limited_softplus,
    operand,
    read_scale,
    read_scales,
    read_state_scale,
    state_arguments,
    write_state,
)
from quamba.kernels.triton.ssd_chunks import Precision, scan_chunks, scan_launch

#: Programs that fill an H200 while each has several states under way.
_FULL = 384


@dataclass(frozen=True, kw_only=True)
class StepLaunch:
    channels: int  # of a head, per program
    rows: int  # sequences per program, which share one read of the scales
    stages: int  # states of so many sequences are under way; 1: each is asked for when it is needed
    num_warps: int


def step_candidates(batch: int, nheads: int, headdim: int, d_state: int, codes: bool) -> list[StepLaunch]:
    """16 to 64 elements of the state a thread."""
    width, most = triton.next_power_of_2(d_state), triton.next_power_of_2(headdim)
    shapes = [(channels, warps) for channels in (8, 16, 32, 64) for warps in (1, 2, 4, 8) if channels <= most]
    shapes = [(channels, warps) for channels, warps in shapes if 16 <= channels * width // (32 * warps) <= 64]
    shared = [(rows, stages) for rows in (2, 4, 8, 16) for stages in (1, 3, 4) if 4 * rows <= batch]
    return [
        StepLaunch(channels=channels, rows=rows, stages=stages, num_warps=warps)
        for channels, warps in shapes
        for rows, stages in ([(1, 1), *shared] if codes else [(1, 1), (2, 1)])
    ]


@launch_choice("ssd_step.launch", candidates=step_candidates)
def step_launch(batch: int, nheads: int, headdim: int, d_state: int, codes: bool = False) -> StepLaunch:
    """Small parts of heads while the GPU is not full, then 4096 elements of the state a program.

    codes  the state is int8: its scales take four times its bytes, so as many sequences share them as leave
           the GPU full
    """
    widest = max(1, min(triton.next_power_of_2(headdim), 4096 // triton.next_power_of_2(d_state)))
    channels = widest
    while channels > 8 and batch * nheads * triton.cdiv(headdim, channels) < 4 * PROCESSORS:
        channels //= 2
    programs = batch * nheads * triton.cdiv(headdim, channels)
    rows = 16
    while rows > 1 and (not codes or rows > batch or programs < _FULL * rows):
        rows //= 2
    return StepLaunch(
        channels=channels,
        rows=rows,
        stages=4 if rows > 1 else 1,
        num_warps=4 if channels * d_state > 1024 else 2,
    )


@triton.jit(do_not_specialize=["batch"])
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
    batch: tl.tensor,
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
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (part of a head, sequences): its rows of their states are read, advanced and written once."""
    let_next_start(EARLY)
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // blocks
    begin = tl.program_id(1) * ROWS
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_in, n_in = p < P, n < N
    inside = p_in[:, None] & n_in[None, :]
    wait_for_inputs(EARLY)
    rate = tl.load(A + h).to(tl.float32) * LOG2E
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + h).to(tl.float32)
    skip = tl.zeros((BLOCK_P,), tl.float32)
    if D is not None:
        if D_BY_CHANNEL:
            skip = tl.load(D + h * P + p, mask=p_in, other=0).to(tl.float32)
        else:
            skip += tl.load(D + h).to(tl.float32)
    step = 1.0
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
        per_step = 1.0 / step
    first = h // HEADS_PER_GROUP * N
    x_step = read_scales(x_scale, h * P + p, p_in, X_MODE)
    B_step = read_scales(B_scale, first + n, n_in, B_MODE)
    C_step = read_scales(C_scale, first + n, n_in, C_MODE)
    dt_step = read_scale(dt_scale, h, DT_MODE)

    b = tl.full((), 0, tl.int64) + begin
    dt_next = tl.load(dt + b * dt_b + h)
    x_next = tl.load(x + b * x_b + h * P + p, mask=p_in, other=0)
    B_next = tl.load(B + b * B_b + first + n, mask=n_in, other=0)
    C_next = tl.load(C + b * C_b + first + n, mask=n_in, other=0)
    for row in tl.range(begin, tl.minimum(begin + ROWS, batch), num_stages=STAGES):
        b = tl.full((), 0, tl.int64) + row
        S_at = state + b * state_b + h * (P * N) + (p[:, None] * N + n[None, :])
        S = as_floats(tl.load(S_at, mask=inside, other=0))
        delta = limited_softplus(dt_next.to(tl.float32) * dt_step + bias, low, high, LIMITED)
        decay = tl.exp2(delta * rate)
        x_p = x_next.to(tl.float32) * x_step
        B_n = B_next.to(tl.float32) * B_step
        C_n = C_next.to(tl.float32) * C_step
        if ROWS > 1:  # what the next sequence needs is on its way meanwhile
            following = tl.full((), 0, tl.int64) + tl.minimum(row + 1, batch - 1)
            dt_next = tl.load(dt + following * dt_b + h)
            x_next = tl.load(x + following * x_b + h * P + p, mask=p_in, other=0)
            B_next = tl.load(B + following * B_b + first + n, mask=n_in, other=0)
            C_next = tl.load(C + following * C_b + first + n, mask=n_in, other=0)
        # Not S * (step * decay): blocks of its layout would be converted every time. And the product
        # that is not rounded before the sum is named: the compiler would choose by what else a program does.
        S = tl.fma(S * decay, step, (x_p * delta)[:, None] * B_n[None, :])
        write_state(S_at, S, per_step, inside)
        y_p = tl.sum(S * C_n[None, :], axis=1)
        if D is not None:
            y_p += x_p * skip
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
    launch = step_launch(batch, nheads, headdim, d_state, state.dtype == torch.int8)
    _step_kernel[(nheads * triton.cdiv(headdim, launch.channels), triton.cdiv(batch, launch.rows))](
        **arguments,
        **{f"{name}_b": arguments[name].stride(0) for name in ("x", "dt", "B", "C")},
        **modes,
        **state_arguments(state, state_scale, state_group),
        **_head_arguments(A, D, dt_bias, dt_limit),
        y=y,
        H=nheads,
        P=headdim,
        N=d_state,
        HEADS_PER_GROUP=nheads // ngroups,
        BLOCK_P=launch.channels,
        BLOCK_N=triton.next_power_of_2(d_state),
        ROWS=launch.rows,
        STAGES=launch.stages,
        batch=batch,
        num_warps=launch.num_warps,
        **dependent_launch(y.device),
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
    }


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
    precision: Precision | None = None,
) -> Tensor:
    """``reference.ssd.ssd_scan`` in three launches (``ssd_chunks``).

    chunk_size   of the model: the result does not depend on it, the kernels take what suits the GPU
    state_group  (H * P,) int32 or None: with it, state_scale is (K, N) or (K, 1), one row a group of channels
    precision    of the matrix products; everything else is float32. None: "half" where x, B and C are codes
                 or float16 and the output has 16 bits, else "split". Relative to the root mean square of y,
                 "half" errs by 2.2e-4 (4e-4 where channels of B or C have scales of their own), "split" by
                 less than 1e-5, "ieee" as the float32 reference; rounding y to float16 costs 2.1e-4
    Memory for the states between chunks is as much as y takes, four times that in other precisions.
    ValueError for float64, and for strides that the kernels do not read.
    """
    arguments, modes = _inputs(x, dt, B, C)
    check_parameters(A=A, D=D, dt_bias=dt_bias)
    batch, length, d_inner = arguments["x"].shape
    y = torch.empty(batch, length, d_inner, dtype=out_dtype, device=A.device)
    states = state_arguments(state, state_scale, state_group)
    if y.numel() == 0:
        return y
    chosen = precision or _precision(arguments, out_dtype)
    d_state = arguments["B"].shape[-1] // ngroups
    scan_chunks(
        scan_launch(batch, length, len(A), headdim, d_state, ngroups, chosen == "half"),
        arguments,
        modes,
        states,
        _head_arguments(A, D, dt_bias, dt_limit),
        mask,
        y,
        headdim=headdim,
        ngroups=ngroups,
        precision=chosen,
    )
    return y


def _precision(arguments: dict[str, Any], out_dtype: torch.dtype) -> Precision:
    """float16 holds codes and float16 exactly; bfloat16 and float32 it does not."""
    exact = all(arguments[name].dtype in (torch.int8, torch.float16) for name in ("x", "B", "C"))
    return "half" if exact and out_dtype != torch.float32 else "split"
