"""The Hadamard rotation of the last dimension, alone or after the gated norm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Overflow, Rounding
from quamba.formats.hadamard import hadamard_factors, paley_matrix
from quamba.kernels.cpu import abi, library
from quamba.kernels.cpu.norm import check_groups
from quamba.kernels.cpu.quantize import channel_scale, output
from quamba.kernels.reference import hadamard as reference

FORWARD, TRANSPOSED = 1, 2


def hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """``reference.hadamard.hadamard``, which itself serves float64."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        return reference.hadamard(x, transpose)
    y = torch.empty(x.shape, dtype=x.dtype)
    _run(x, None, None, y, None, 0, 0.0, False, TRANSPOSED if transpose else FORWARD)
    return y


def hadamard_quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> Tensor:
    """``reference.hadamard.hadamard_quantize``, which itself serves float64."""
    if x.dtype == torch.float64:
        return reference.hadamard_quantize(x, scale, rounding=rounding, overflow=overflow)
    y = torch.empty(x.shape, dtype=torch.int8)
    _run(x, None, None, y, scale, 0, 0.0, False, FORWARD, rounding, overflow)
    return y


def gated_norm_hadamard(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> Tensor:
    """``reference.hadamard.gated_norm_hadamard``, which itself serves float64; float32 in between."""
    if not abi.supported(y, z) or out_dtype == torch.float64:
        return reference.gated_norm_hadamard(
            y,
            z,
            weight,
            eps=eps,
            group_size=group_size,
            norm_before_gate=norm_before_gate,
            out_scale=out_scale,
            out_dtype=out_dtype,
            rounding=rounding,
            overflow=overflow,
        )
    check_groups(y.shape[-1], group_size)
    out = output(y.shape, out_scale, out_dtype)
    _run(y, z, weight, out, out_scale, group_size, eps, norm_before_gate, FORWARD, rounding, overflow)
    return out


def _run(
    y: Tensor,
    z: Activation | None,
    weight: Tensor | None,
    out: Tensor,
    out_scale: Tensor | None,
    group_size: int,
    eps: float,
    norm_before_gate: bool,
    rotate: int,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> None:
    columns = y.shape[-1]
    order, _ = hadamard_factors(columns)
    if out.numel() == 0:
        return
    signs, weight = paley_signs(order), abi.float32(weight)
    scale = None if out_scale is None else channel_scale(out_scale)
    values, gate = abi.as_rows(y), None if z is None else abi.as_rows(z)
    library.run(
        abi.GatedNorm(
            abi.activation(values),
            abi.Tensor() if gate is None else abi.activation(gate),
            abi.tensor(out.view(-1, columns), scale),
            out.numel() // columns,
            columns,
            group_size,
            order,
            abi.pointer(weight),
            abi.pointer(signs),
            eps,
            int(norm_before_gate),
            rotate,
            abi.rounding_code(rounding),
            abi.overflow_code(overflow),
        )
    )


@functools.cache
def paley_signs(order: int) -> Tensor:
    """float32 (order, order) of +-1: the slow factor of a rotation."""
    with torch.inference_mode(False):
        return paley_matrix(order).to(torch.float32).contiguous()
