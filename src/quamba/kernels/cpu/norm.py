"""Residual addition and normalisation, and Mamba2's gated norm."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, shape_of
from quamba.kernels.cpu import abi, library
from quamba.kernels.cpu.quantize import channel_scale, output
from quamba.kernels.reference import norm as reference

_NOTHING = abi.Tensor()


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``reference.norm.add_norm``, which itself serves float64."""
    dtype = residual_dtype or (x.dtype if residual is None else residual.dtype)
    if not abi.supported(x, residual) or torch.float64 in (dtype, out_dtype):
        return reference.add_norm(
            x,
            residual,
            weight,
            bias,
            eps=eps,
            center=center,
            residual_dtype=residual_dtype,
            out_scale=out_scale,
            out_dtype=out_dtype,
        )
    total = x
    if residual is not None or dtype != x.dtype:
        total = torch.empty(x.shape, dtype=dtype)
    y = output(x.shape, out_scale, out_dtype)
    _run(x, residual, None if total is x else total, y, weight, bias, eps, center, out_scale)
    return y, total


def rms_norm(
    x: Activation, *, eps: float, out_scale: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``reference.norm.rms_norm``, which itself serves float64; int8 codes are read as they are."""
    if not abi.supported(x) or out_dtype == torch.float64:
        return reference.rms_norm(x, eps=eps, out_scale=out_scale, out_dtype=out_dtype)
    y = output(shape_of(x), out_scale, out_dtype)
    _run(x, None, None, y, None, None, eps, False, out_scale)
    return y


def _run(
    x: Activation,
    residual: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_scale: Tensor | None,
) -> None:
    if y.numel() == 0:
        return
    columns = y.shape[-1]
    scale = None if out_scale is None else channel_scale(out_scale)
    tensors = [None if t is None else abi.as_rows(t) for t in (x, residual, total)]
    weight, bias = abi.float32(weight), abi.float32(bias)
    library.run(
        abi.AddNorm(
            *(_NOTHING if t is None else abi.activation(t) for t in tensors),
            abi.tensor(y.view(-1, columns), scale),
            y.numel() // columns,
            columns,
            abi.pointer(weight),
            abi.pointer(bias),
            eps,
            int(center),
        )
    )


def gated_rms_norm(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``reference.norm.gated_rms_norm``, which itself serves float64."""
    if not abi.supported(y, z) or out_dtype == torch.float64:
        return reference.gated_rms_norm(
            y,
            z,
            weight,
            eps=eps,
            group_size=group_size,
            norm_before_gate=norm_before_gate,
            out_dtype=out_dtype,
        )
    out = torch.empty(y.shape, dtype=out_dtype)
    if out.numel() == 0:
        return out
    columns = y.shape[-1]
    check_groups(columns, group_size)
    values, gate, weight = abi.as_rows(y), abi.as_rows(z), abi.float32(weight)
    library.run(
        abi.GatedNorm(
            abi.activation(values),
            abi.activation(gate),
            abi.tensor(out.view(-1, columns)),
            out.numel() // columns,
            columns,
            group_size,
            1,
            abi.pointer(weight),
            None,
            eps,
            int(norm_before_gate),
            0,
            0,
            0,
        )
    )
    return out


def check_groups(columns: int, group_size: int) -> None:
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {columns} channels.")
