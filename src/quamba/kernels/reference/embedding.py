"""Embedding lookup from a float or quantized table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.packing import unpack_int4
from quamba.formats.weight import QuantizedWeight, apply_scale


def embedding(
    ids: Tensor, weight: Tensor | QuantizedWeight, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """y[t] = scale[ids[t], g] * codes[ids[t]], g the group of the column

    ids      (...) int64
    weight   (V, D) float, or QuantizedWeight with one scale a row or a group of a row
    returns  (..., D) out_dtype; only the rows looked up are unpacked
    """
    if isinstance(weight, QuantizedWeight):
        data = weight.data[ids.flatten()]
        codes = unpack_int4(data) if weight.format.bits == 4 else data
        scale = weight.scale if weight.format.granularity == "tensor" else weight.scale[ids.flatten()]
        wide = torch.float64 if out_dtype == torch.float64 else torch.float32
        return apply_scale(codes, scale, wide).to(out_dtype).view(*ids.shape, weight.shape[1])
    return F.embedding(ids, weight).to(out_dtype)
