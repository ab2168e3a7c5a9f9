"""Mamba2's step of the state, gated, with what the norm behind it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import silu
from quamba.kernels.triton.recurrence import (
    CHANNEL_SCALES,
    FLOAT,
    LOG2E,
    ONE_SCALE,
    read_scalar,
    read_state_scale,
    read_vector,
    softplus,
    state_arguments,
    write_state,
)


@dataclass(frozen=True)
class SsdLaunch:
    """Channels of a head a program, warps."""

    channels: int
    warps: int


def ssd_candidates(batch: int, nheads: int, headdim: int, d_state: int) -> list[SsdLaunch]:
    """8 to 64 elements of the state a lane."""
    most, width = triton.next_power_of_2(headdim), triton.next_power_of_2(d_state)
    shapes = [(channels, warps) for channels in (8, 16, 32, 64) for warps in (1, 2, 4, 8) if channels <= most]
    return [SsdLaunch(c, w) for c, w in shapes if 8 <= c * width / (32 * w) <= 64]


@launch_choice("decode.ssd_gate", candidates=ssd_candidates)
def ssd_launch(batch: int, nheads: int, headdim: int, d_state: int) -> SsdLaunch:
    """Parts of 16 channels, so that no warp has much to sum, until programs fill the GPU several times."""
    channels = min(16 if batch * nheads < 512 else 32, triton.next_power_of_2(headdim))
    return SsdLaunch(
        channels=channels, warps=max(1, min(4, channels * triton.next_power_of_2(d_state) // 1024))
    )


@triton.jit
def _ssd_kernel(
    x: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    z: tl.tensor,
    dt: tl.tensor,
    x_scale: tl.tensor,
    B_scale: tl.tensor,
    C_scale: tl.tensor,
    z_scale: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    squares: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    row: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    X_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    Z_MODE: tl.constexpr,
    DT_MODE: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    LIMITED: tl.constexpr,
    D_BY_CHANNEL: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (part of a head, sequence)."""
    let_next_start(EARLY)
    PARTS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // PARTS
    b = tl.program_id(1).to(tl.int64)
    p, n = tl.program_id(0) % PARTS * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    p_in, n_in = p < P, n < N
    inside = p_in[:, None] & n_in[None, :]
    S_at = state + b * state_b + h * (P * N) + p[:, None] * N + n[None, :]
    S = tl.load(S_at, mask=inside, other=0).to(tl.float32)
    step = 1.0
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
        S *= step
    A_h = tl.load(A + h).to(tl.float32) * LOG2E
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + h).to(tl.float32)
    D_p = tl.zeros([BLOCK_P], tl.float32)
    if D is not None:
        if D_BY_CHANNEL:
            D_p += tl.load(D + h * P + p, mask=p_in, other=0).to(tl.float32)
        else:
            D_p += tl.load(D + h).to(tl.float32)
    factor = tl.full([BLOCK_P], 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + h * P + p, mask=p_in, other=0).to(tl.float32)
    first = h // HEADS_PER_GROUP * N
    wait_for_inputs(EARLY)

    delta = softplus(read_scalar(dt, b * row + h, dt_scale, h, DT_MODE) + bias)
    if LIMITED:
        delta = tl.minimum(tl.maximum(delta, low), high)
    x_p = read_vector(x + b * row + h * P, p, p_in, x_scale, h * P, X_MODE)
    B_n = read_vector(B + b * row + first, n, n_in, B_scale, first, B_MODE)
    C_n = read_vector(C + b * row + first, n, n_in, C_scale, first, C_MODE)
    gate = silu(read_vector(z + b * row + h * P, p, p_in, z_scale, h * P, Z_MODE))
    S = S * tl.exp2(delta * A_h) + (x_p * delta)[:, None] * B_n[None, :]
    per_step = 1.0
    if state_scale is not None:
        per_step = 1.0 / step
    write_state(S_at, S, per_step, inside)
    y = tl.sum(S * C_n[None, :], axis=1) + x_p * D_p
    gated = y * gate
    counted = y if NORM_FIRST else gated
    tl.store(out + (b * H + h) * P + p, gated * factor, mask=p_in)
    counted = tl.where(p_in, counted, 0.0)
    tl.store(squares + b * (H * PARTS) + tl.program_id(0), tl.sum(counted * counted, 0))


@dataclass(frozen=True)
class Part:
    """Some neighbouring columns of the projection's outputs: where they begin, and their scale if codes."""

    first: int
    scale: Tensor | None

    @property
    def mode(self) -> int:
        if self.scale is None:
            return FLOAT
        return ONE_SCALE if self.scale.numel() == 1 else CHANNEL_SCALES

    def with_one_scale(self) -> Part:
        """For columns known to share their scale."""
        return self if self.scale is None or not self.scale.ndim else Part(self.first, self.scale[0])


def square_parts(batch: int, nheads: int, headdim: int, d_state: int) -> int:
    """Columns of ``squares``."""
    return nheads * triton.cdiv(headdim, ssd_launch(batch, nheads, headdim, d_state).channels)


def ssd_gate(
    projected: Tensor,
    parts: dict[str, Part],
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    out: Tensor,
    squares: Tensor,
    *,
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    norm_before_gate: bool = False,
) -> None:
    """out[b] = weight * y[b] * silu(z[b]), y as ``reference.ssd.ssd_step`` has it.

    projected  (B, C) int8 or float, what the projection and the convolution gave
    parts      of it: "x", "B", "C", "z", "dt"
    out        (B, H * P) float32
    squares    (B, ``square_parts``) float32: sums over parts of heads of what the norm divides by,
               (y silu(z))^2, or y^2 with norm_before_gate
    """
    batch, columns = projected.shape
    nheads, d_state = A.shape[0], state.shape[-1]
    launch = ssd_launch(batch, nheads, headdim, d_state)
    arguments: dict[str, Any] = {}
    for name, part in parts.items():
        arguments[name] = projected[0, part.first :]
        arguments[f"{name}_scale"] = part.scale
        arguments[f"{name.upper()}_MODE"] = part.mode
    _ssd_kernel[(nheads * triton.cdiv(headdim, launch.channels), batch)](
        **arguments,
        **state_arguments(state, state_scale, state_group),
        A=A,
        D=D,
        dt_bias=dt_bias,
        weight=weight,
        out=out,
        squares=squares,
        row=columns,
        low=float(dt_limit[0]),
        high=float(dt_limit[1]),
        LIMITED=tuple(dt_limit) != (0.0, math.inf),
        D_BY_CHANNEL=D is not None and len(D) != nheads,
        NORM_FIRST=norm_before_gate,
        H=nheads,
        P=headdim,
        N=d_state,
        HEADS_PER_GROUP=nheads // ngroups,
        BLOCK_P=launch.channels,
        BLOCK_N=triton.next_power_of_2(d_state),
        num_warps=launch.warps,
        **dependent_launch(state.device),
    )
