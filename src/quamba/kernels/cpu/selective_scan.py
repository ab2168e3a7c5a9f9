"""Mamba1's selective scan: prompts, and one step of it."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, shape_of
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference import selective_scan as reference


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
    """``reference.selective_scan.selective_scan``, which itself serves float64; token by token in float32."""
    if not abi.supported(u, dt, A, B, C, z, state) or out_dtype == torch.float64:
        return reference.selective_scan(
            u,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            state=state,
            state_scale=state_scale,
            state_group=state_group,
            mask=mask,
            out_dtype=out_dtype,
        )
    y = torch.empty(shape_of(u), dtype=out_dtype)
    if y.numel() == 0:
        return y
    inputs = [None if t is None else abi.with_unit_channels(t) for t in (u, dt, z, B, C)]
    stored = None if state is None else state.contiguous()
    A32, D32, bias = abi.float32(A), abi.float32(D), abi.float32(dt_bias)
    kept = None if mask is None else mask.to(torch.bool).contiguous()
    described, scales = describe_state(stored, state_scale, state_group)
    library.run(
        abi.SelectiveScan(
            *(abi.Tensor() if t is None else abi.activation(t) for t in inputs),
            abi.tensor(y),
            described,
            *y.shape,
            A.shape[1],
            *(abi.pointer(t) for t in (A32, D32, bias, kept)),
        )
    )
    if state is not None and stored is not None and stored is not state:
        state.copy_(stored)
    del scales
    return y


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
    """``reference.selective_scan.selective_scan_step``, which itself serves float64."""
    if not abi.supported(u, dt, A, B, C, z, state) or out_dtype == torch.float64:
        return reference.selective_scan_step(
            u,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            state=state,
            state_scale=state_scale,
            state_group=state_group,
            out_dtype=out_dtype,
        )
    gate = None if z is None else _as_prompt(z)
    return selective_scan(
        _as_prompt(u),
        _as_prompt(dt),
        A,
        _as_prompt(B),
        _as_prompt(C),
        D,
        gate,
        dt_bias,
        state=state,
        state_scale=state_scale,
        state_group=state_group,
        out_dtype=out_dtype,
    )[:, 0]


def _as_prompt(x: Activation) -> Activation:
    return Quantized(x.codes[:, None], x.scale) if isinstance(x, Quantized) else x[:, None]


def describe_state(
    state: Tensor | None, scale: Tensor | None, group: Tensor | None
) -> tuple[abi.State, tuple[Tensor | None, ...]]:
    """A contiguous state (batch, channels, d_state) for the kernels, and what its pointers point to."""
    if state is None:
        return abi.State(), ()
    if scale is not None:
        scale = scale.to(torch.float32).reshape(-1, scale.shape[-1] if scale.ndim else 1).contiguous()
        group = None if group is None else group.to(torch.int32).contiguous()
    rows, columns = (0, 0) if scale is None else scale.shape
    described = abi.State(
        state.data_ptr(),
        abi.pointer(scale),
        abi.pointer(group),
        rows,
        columns,
        abi.dtype_code(state.dtype),
        0,
    )
    return described, (scale, group)
