"""Mamba1's step: time steps projected, the state advanced, its output gated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.codes import codes_and_scales
from quamba.kernels.triton.decode.ssd import Part
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import silu, to_codes
from quamba.kernels.triton.recurrence import (
    LOG2E,
    read_state_scale,
    read_vector,
    softplus,
    state_arguments,
    write_state,
)
from quamba.kernels.triton.words import dot4


@dataclass(frozen=True)
class ScanLaunch:
    """Channels a program, warps."""

    channels: int
    warps: int


def scan_candidates(batch: int, channels: int, d_state: int) -> list[ScanLaunch]:
    """4 to 32 elements of the state a lane."""
    width = triton.next_power_of_2(d_state)
    shapes = [(block, warps) for block in (8, 16, 32, 64) for warps in (1, 2, 4)]
    return [ScanLaunch(c, w) for c, w in shapes if 4 <= c * width / (32 * w) <= 32]


@launch_choice("decode.scan_gate", candidates=scan_candidates)
def scan_launch(batch: int, channels: int, d_state: int) -> ScanLaunch:
    """Small blocks, so that no warp has much to sum: 16 channels are 256 states and rows of 160 bytes."""
    return ScanLaunch(channels=16 if batch * channels < 1 << 15 else 32, warps=1)


@triton.jit
def _scan_kernel(
    u: tl.tensor,
    z: tl.tensor,
    rank: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    u_scale: tl.tensor,
    z_scale: tl.tensor,
    rank_scale: tl.tensor,
    B_scale: tl.tensor,
    C_scale: tl.tensor,
    w: tl.tensor,
    w_scale: tl.tensor,
    dt_scale: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    state_scale: tl.tensor,
    state_group: tl.tensor,
    u_row: tl.tensor,
    rank_row: tl.tensor,
    state_b: tl.tensor,
    scale_h: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    U_MODE: tl.constexpr,
    Z_MODE: tl.constexpr,
    RANK_MODE: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    W_SCALES: tl.constexpr,
    DT_SCALES: tl.constexpr,
    SCALE_BY_CHANNEL: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    HALF_DT: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (block of channels, sequence)."""
    let_next_start(EARLY)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    d_in, n_in, r_in = d < CHANNELS, n < N, r < R
    WORDS: tl.constexpr = w.dtype.element_ty == tl.int32  # four int8 each, as are those of rank then
    W = tl.load(w + d[:, None] * R + r[None, :], mask=d_in[:, None] & r_in[None, :], other=0)
    inside = d_in[:, None] & n_in[None, :]
    S_at = state + b * state_b + d[:, None] * N + n[None, :]
    S = tl.load(S_at, mask=inside, other=0).to(tl.float32)
    step = 1.0
    if state_scale is not None:
        step = read_state_scale(
            state_scale,
            state_group,
            0,
            0,
            tl.minimum(d, CHANNELS - 1)[:, None],
            tl.minimum(n, N - 1)[None, :],
            scale_c,
            scale_n,
            SCALE_BY_CHANNEL,
            SCALE_BY_COLUMN,
        )
        S *= step
    A_dn = tl.load(A + d[:, None] * N + n[None, :], mask=inside, other=0).to(tl.float32) * LOG2E
    bias = tl.zeros([BLOCK], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + d, mask=d_in, other=0).to(tl.float32)
    D_d = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        D_d = tl.load(D + d, mask=d_in, other=0).to(tl.float32)
    w_step = tl.full([BLOCK], 1.0, tl.float32)
    if w_scale is not None:
        w_step *= tl.load(w_scale + (d if W_SCALES else d * 0), mask=d_in, other=0).to(tl.float32)
    dt_step = tl.full([BLOCK], 1.0, tl.float32)
    if dt_scale is not None:
        dt_step *= tl.load(dt_scale + (d if DT_SCALES else d * 0), mask=d_in, other=1).to(tl.float32)
    wait_for_inputs(EARLY)

    if WORDS:
        four = (rank + b * rank_row).to(tl.pointer_type(tl.int32), bitcast=True)
        zero = tl.zeros([BLOCK, BLOCK_R], tl.int32)
        codes = tl.load(four + r, mask=r_in, other=0)
        dt = tl.sum(dot4(W, zero + codes[None, :], zero), axis=1).to(tl.float32) * w_step
        if rank_scale is not None:
            dt *= tl.load(rank_scale).to(tl.float32)
    else:
        low_rank = read_vector(rank + b * rank_row, r, r_in, rank_scale, 0, RANK_MODE)
        dt = tl.sum(W.to(tl.float32) * low_rank[None, :], axis=1) * w_step
    if dt_scale is not None:
        dt = to_codes(tl.div_rn(dt, dt_step), False, False).to(tl.float32) * dt_step
    elif HALF_DT:
        dt = dt.to(tl.float16).to(tl.float32)
    delta = softplus(dt + bias)
    u_d = read_vector(u + b * u_row, d, d_in, u_scale, 0, U_MODE)
    gate = silu(read_vector(z + b * u_row, d, d_in, z_scale, 0, Z_MODE))
    B_n = read_vector(B + b * rank_row, n, n_in, B_scale, 0, B_MODE)
    C_n = read_vector(C + b * rank_row, n, n_in, C_scale, 0, C_MODE)
    S = S * tl.exp2(delta[:, None] * A_dn) + (u_d * delta)[:, None] * B_n[None, :]
    per_step = 1.0
    if state_scale is not None:
        per_step = 1.0 / step
    write_state(S_at, S, per_step, inside)
    y = (tl.sum(S * C_n[None, :], axis=1) + u_d * D_d) * gate
    tl.store(out + b * CHANNELS + d, y, mask=d_in)


@dataclass(frozen=True)
class TimeSteps:
    """The projection of time steps (N, R): float weights, or int8 with their scale.

    out_scale  of its codes, () or (N,), or None where it gives floats
    half       whether those floats are float16
    """

    weight: Tensor
    scale: Tensor | None
    out_scale: Tensor | None
    half: bool

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight, out_scale: Tensor | None, half: bool) -> TimeSteps | None:
        """None for what the kernel does not multiply."""
        if not isinstance(weight, QuantizedWeight):
            return cls(weight, None, out_scale, half) if weight.is_contiguous() else None
        data, scale, bits = codes_and_scales(weight)
        fits = bits == 8 and scale.shape[1] == 1 and data.shape[1] % 4 == 0 and data.is_contiguous()
        return cls(data, scale, out_scale, half) if fits else None


def scan_gate(
    projected: Tensor,
    selected: Tensor,
    parts: dict[str, Part],
    time_steps: TimeSteps,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    out: Tensor,
    *,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
) -> None:
    """out[b]: the gated output of ``reference.selective_scan.selective_scan_step``.

    projected  (B, 2 C): "u", of the convolution, and "z" are parts of it
    selected   (B, R + 2 N) of x_proj: "rank", "B" and "C"; where codes, "rank" has one scale, or none where
               the weight contains it
    out        (B, C) float32
    """
    batch, row = projected.shape
    channels, d_state = A.shape
    weight = time_steps.weight
    if weight.dtype == selected.dtype == torch.int8 and selected.shape[1] % 4 == 0:  # rows are whole words
        weight = weight.view(torch.int32)
    inputs = weight.shape[1]
    launch = scan_launch(batch, channels, d_state)
    arguments: dict[str, Any] = {}
    for name, part in parts.items():
        source = projected if name in ("u", "z") else selected
        arguments[name] = source[0, part.first :]
        arguments[f"{name}_scale"] = part.scale
        arguments[f"{name.upper()}_MODE"] = part.mode
    dt_scale = time_steps.out_scale
    _scan_kernel[(triton.cdiv(channels, launch.channels), batch)](
        **arguments,
        **state_arguments(state, state_scale, state_group),
        w=weight,
        w_scale=time_steps.scale,
        dt_scale=dt_scale,
        A=A,
        D=D,
        dt_bias=dt_bias,
        out=out,
        u_row=row,
        rank_row=selected.shape[1],
        W_SCALES=time_steps.scale is not None and time_steps.scale.shape[0] > 1,
        DT_SCALES=dt_scale is not None and dt_scale.ndim == 1,
        HALF_DT=time_steps.half,
        CHANNELS=channels,
        N=d_state,
        R=inputs,
        BLOCK=launch.channels,
        BLOCK_N=triton.next_power_of_2(d_state),
        BLOCK_R=triton.next_power_of_2(inputs),
        num_warps=launch.warps,
        **dependent_launch(state.device),
    )
