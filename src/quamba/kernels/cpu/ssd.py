"""Mamba2's state space dual: prompts in chunks of matrix products, and one step of the recurrence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, shape_of
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference import ssd as reference


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
) -> Tensor:
    """``reference.ssd.ssd_scan``; chunk_size changes nothing. float64 is left to the reference."""
    y = torch.empty(shape_of(x), dtype=out_dtype)
    if not abi.supported(x, dt, A, B, C, D, dt_bias, state, y):
        return reference.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            headdim=headdim,
            ngroups=ngroups,
            dt_limit=dt_limit,
            chunk_size=chunk_size,
            state=state,
            state_scale=state_scale,
            state_group=state_group,
            mask=mask,
            out_dtype=out_dtype,
        )
    _run(
        (x, dt, B, C),
        y,
        (A, D, dt_bias),
        headdim,
        ngroups,
        dt_limit,
        (state, state_scale, state_group),
        mask,
    )
    return y


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
    """``reference.ssd.ssd_step``; the state is read and written once. float64 is left to the reference."""
    y = torch.empty(shape_of(x), dtype=out_dtype)
    if not abi.supported(x, dt, A, B, C, D, dt_bias, state, y):
        return reference.ssd_step(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            headdim=headdim,
            ngroups=ngroups,
            dt_limit=dt_limit,
            state=state,
            state_scale=state_scale,
            state_group=state_group,
            out_dtype=out_dtype,
        )
    inputs = (_as_prompt(x), _as_prompt(dt), _as_prompt(B), _as_prompt(C))
    carried = (state, state_scale, state_group)
    _run(inputs, y[:, None], (A, D, dt_bias), headdim, ngroups, dt_limit, carried, None)
    return y


def _run(
    inputs: tuple[Activation, Activation, Activation, Activation],
    y: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor | None],
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float],
    carried: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
) -> None:
    """inputs x, dt, B, C (batch, length, ...), parameters A, D, dt_bias, carried state, scale, group."""
    if y.numel() == 0:
        return
    x, dt, B, C = (abi.with_unit_channels(t) for t in inputs)
    A, D, dt_bias = (abi.float32(t) for t in parameters)
    assert A is not None
    if D is not None and len(D) != y.shape[-1]:
        D = D.repeat_interleave(y.shape[-1] // len(D))
    state, scale, group = carried
    stored = state if state is None else state.contiguous()
    scale = state_scales(scale, group, A.shape[0], headdim)
    group = None if group is None or scale is None else group.to(torch.int32).contiguous()
    mask = None if mask is None else mask.to(torch.bool).contiguous()
    library.run(
        abi.Ssd(
            x=abi.activation(x),
            dt=abi.activation(dt),
            B=abi.activation(B),
            C=abi.activation(C),
            y=abi.tensor(y),
            state=abi.State() if stored is None else _state(stored, scale, group),
            batch=y.shape[0],
            length=y.shape[1],
            heads=len(A),
            headdim=headdim,
            groups=ngroups,
            d_state=shape_of(B)[-1] // ngroups,
            A=A.data_ptr(),
            D=abi.pointer(D),
            dt_bias=abi.pointer(dt_bias),
            mask=abi.pointer(mask),
            dt_min=dt_limit[0],
            dt_max=dt_limit[1],
        )
    )
    if state is not None and stored is not None and stored is not state:
        state.copy_(stored)


def state_scales(scale: Tensor | None, group: Tensor | None, heads: int, headdim: int) -> Tensor | None:
    """As the kernel reads them, float32: a row a group, one for all or one a channel; (rows, 1 or d_state).

    scale  with group (K, N) or (K, 1), else broadcastable to (heads, headdim, d_state)
    """
    if scale is None or group is not None:
        return abi.float32(scale)
    scale = scale.to(torch.float32)
    scale = scale.view(*[1] * (3 - scale.ndim), *scale.shape)
    if scale.shape[:2] == (1, 1):
        return scale.reshape(1, -1).contiguous()
    return scale.expand(heads, headdim, -1).reshape(heads * headdim, -1).contiguous()


def _state(state: Tensor, scale: Tensor | None, group: Tensor | None) -> abi.State:
    rows, columns = (0, 0) if scale is None else scale.shape
    return abi.State(
        data=state.data_ptr(),
        scale=abi.pointer(scale),
        group=abi.pointer(group),
        scale_rows=rows,
        scale_columns=columns,
        dtype=abi.dtype_code(state.dtype),
    )


def _as_prompt(x: Activation) -> Activation:
    return Quantized(x.codes[:, None], x.scale) if isinstance(x, Quantized) else x[:, None]
