"""Static symmetric int8 quantization, and what other kernels share: the scale of codes that are given."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Overflow, Rounding
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference import quantize as reference


def quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> Tensor:
    """``reference.quantize.quantize``, which itself serves float64 and scales that differ between rows."""
    one = scale.numel() == 1
    if not abi.supported(x) or x.ndim == 0 or not (one or scale.shape[-1] == scale.numel() == x.shape[-1]):
        return reference.quantize(x, scale, rounding=rounding, overflow=overflow)
    y = torch.empty(x.shape, dtype=torch.int8)
    if x.numel() == 0:
        return y
    step = channel_scale(scale)
    rows, codes = abi.as_rows(x), abi.as_rows(y)
    assert isinstance(rows, Tensor) and isinstance(codes, Tensor)
    if one and rows.is_contiguous():
        rows, codes = rows.view(1, -1), codes.view(1, -1)
    library.run(
        abi.Quantize(
            abi.tensor(rows),
            abi.tensor(codes, step),
            rows.shape[0],
            rows.shape[1],
            abi.rounding_code(rounding),
            abi.overflow_code(overflow),
        )
    )
    return y


def channel_scale(scale: Tensor) -> Tensor:
    """Contiguous float32, () or (C,)."""
    flat = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1)
    return flat.to(torch.float32).contiguous()


def output(shape: torch.Size, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Uninitialised: int8 if the site has a scale, else floats of this dtype."""
    return torch.empty(shape, dtype=dtype if scale is None else torch.int8)
