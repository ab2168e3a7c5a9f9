"""Static symmetric int8 quantization of activations and states."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """q = clamp(round_half_even(x / scale), -128, 127)

    x        (..., C) float
    scale    broadcastable to x, float32, > 0
    returns  (..., C) int8; saturates; a NaN has no code and gives an arbitrary one
    """
    return torch.div(x, scale).round_().clamp_(-128, 127).to(torch.int8)


def quantize_or_cast(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Int8 codes if the site has a scale, else floats of the wanted dtype."""
    return x.to(dtype) if scale is None else quantize(x, scale)
