"""What flows between leaves: a float tensor, or int8 codes with their scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

#: How a quantizer rounds ties, and what becomes of what int8 cannot hold (``kernels/reference/quantize.py``).
Rounding = Literal["half_even", "half_away"]
Overflow = Literal["saturate", "wrap"]


class Quantized(NamedTuple):
    """An int8 activation: ``real = scale * codes``.

    codes  (..., C) int8
    scale  () or (C,) float32; a static property of the site, not of the values
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.codes.to(dtype) * self.scale.to(dtype)


Activation = Tensor | Quantized


def as_float(x: Activation, dtype: torch.dtype | None = None) -> Tensor:
    """The real values; a float tensor keeps its dtype unless one is given."""
    if isinstance(x, Quantized):
        return x.dequantize(dtype or torch.float32)
    return x if dtype is None else x.to(dtype)


def split(x: Activation, sizes: Sequence[int]) -> list[Activation]:
    """Cut along the last dimension; per-channel scales are cut with their channels."""
    if isinstance(x, Quantized):
        codes = x.codes.split(list(sizes), dim=-1)
        scales = x.scale.split(list(sizes)) if x.scale.ndim else [x.scale] * len(codes)
        return [Quantized(c, s) for c, s in zip(codes, scales, strict=True)]
    return list(x.split(list(sizes), dim=-1))


def with_one_scale(x: Activation) -> Activation:
    """Codes whose channels are known to share a scale, with that scale as a scalar."""
    return Quantized(x.codes, x.scale[0]) if isinstance(x, Quantized) and x.scale.ndim else x


def rows(x: Activation, start: int, stop: int, dim: int) -> Activation:
    """The slice [start, stop) along a dimension other than the last."""
    if isinstance(x, Quantized):
        return Quantized(x.codes.narrow(dim, start, stop - start), x.scale)
    return x.narrow(dim, start, stop - start)


def flatten_rows(x: Activation) -> Activation:
    """(..., C) -> (tokens, C)."""
    if isinstance(x, Quantized):
        return Quantized(x.codes.reshape(-1, x.codes.shape[-1]), x.scale)
    return x.reshape(-1, x.shape[-1])


def shape_of(x: Activation) -> torch.Size:
    return x.codes.shape if isinstance(x, Quantized) else x.shape
