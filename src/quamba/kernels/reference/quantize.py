"""Static symmetric int8 quantization of activations and states."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Overflow, Rounding


def quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> Tensor:
    """q = clamp(round(x / scale), -128, 127)

    x         (..., C) float
    scale     broadcastable to x, float32, > 0
    rounding  of ties: "half_even", or "half_away" from zero
    overflow  "saturate" as written, or "wrap": the low 8 bits of the rounded integer (of 32 bits)
    returns   (..., C) int8; a NaN has no code and gives an arbitrary one
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # a scale without dimensions would not widen 16 bits
    q = torch.div(x.to(wide), scale)
    q = q.round_() if rounding == "half_even" else _round_half_away(q)
    if overflow == "wrap":
        return q.double().clamp_(-(2.0**31), 2.0**31 - 1).to(torch.int32).to(torch.int8)
    return q.clamp_(-128, 127).to(torch.int8)


def quantize_or_cast(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, rounding: Rounding = "half_even"
) -> Tensor:
    """Int8 codes if the site has a scale, else floats of the wanted dtype."""
    return x.to(dtype) if scale is None else quantize(x, scale, rounding=rounding)


def _round_half_away(x: Tensor) -> Tensor:
    """C's roundf. Adding 0.5 before a floor would round the float below 0.5 up."""
    whole = x.trunc()
    return whole + (x - whole).abs().ge(0.5).to(x.dtype).copysign_(x)
