"""Residual addition and normalisation, and Mamba2's gated norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, as_float, flatten_rows, rows
from quamba.kernels.reference.quantize import quantize_or_cast
from quamba.kernels.reference.slabs import slabs


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
    """r = x + residual;  y = r / sqrt(mean(r^2) + eps) * weight   (RMSNorm; LayerNorm if ``center``)

    x, residual     (..., D) float; residual None means zero
    weight, bias    (D,) or None for ones and zeros
    residual_dtype  dtype of the returned r; None keeps that of the sum
    returns         y (..., D) int8 codes of out_scale (scalar) if given, else out_dtype; and r
    """
    r = x if residual is None else x.to(residual.dtype) + residual
    if residual_dtype is not None:
        r = r.to(residual_dtype)
    v = r if r.dtype == torch.float64 else r.float()
    if center:
        v = v - v.mean(-1, keepdim=True)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return quantize_or_cast(y, out_scale, out_dtype), r


def rms_norm(
    x: Activation, *, eps: float, out_scale: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps), no weight: Falcon Mamba's norm of B, C and dt. x (..., C)."""
    x = as_float(x)
    y, _ = add_norm(x, None, None, eps=eps, out_scale=out_scale, out_dtype=out_dtype)
    return y


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
    """v = y * silu(z);  out = v / sqrt(mean_group(v^2) + eps) * weight

    With norm_before_gate: out = y / sqrt(mean_group(y^2) + eps) * weight * silu(z).
    y (..., C) float, z (..., C) float or int8, weight (C,) or None; the mean runs over groups of
    ``group_size`` neighbouring channels. Returns (..., C) out_dtype. (Mamba2 paper, section 7.)
    """
    flat, gate = y.reshape(-1, y.shape[-1]), flatten_rows(z)
    out = torch.empty(flat.shape, dtype=out_dtype, device=y.device)
    for start, stop in slabs(flat.shape[0], flat.device):
        v = flat[start:stop]
        v = v if v.dtype == torch.float64 else v.float()
        g = F.silu(as_float(rows(gate, start, stop, 0), v.dtype))
        if not norm_before_gate:
            v = v * g
        grouped = v.unflatten(-1, (-1, group_size))
        v = (grouped * torch.rsqrt((grouped * grouped).mean(-1, keepdim=True) + eps)).flatten(-2)
        if weight is not None:
            v = v * weight.to(v.dtype)
        if norm_before_gate:
            v = v * g
        out[start:stop] = v
    return out.view(y.shape)
