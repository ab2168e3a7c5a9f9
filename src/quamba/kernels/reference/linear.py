"""Matrix products: float, weight-only quantized, and integer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.reference.quantize import quantize_or_cast
from quamba.kernels.reference.slabs import slabs


def linear(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    input_scale_folded: bool = False,
) -> Tensor:
    """y[m, n] = s_x * sum_g s_w[n, g] * (sum_{k in g} x[m, k] * w[n, k]) + bias[n]

    x          (..., K): float; or int8 codes with a scalar scale s_x
    weight     (N, K) float, or QuantizedWeight of any format: w, s_w = weight.integers()
    bias       (N,) float or None
    out_scale  None, or () or (N,) float32: y is rounded to int8 codes of this scale
    input_scale_folded  the columns of ``weight`` already contain the scale of x, so s_x = 1
    returns    (..., N) int8 if out_scale is given, else out_dtype

    With integer x and weight the products are int8 x int8 summed in int32 inside a group; the sum
    over groups, the scales and the bias are float32, in the order written. With float x a quantized weight is
    first dequantized to the dtype of x.
    """
    if not isinstance(x, Quantized):
        dense = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight
        y = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return quantize_or_cast(y, out_scale, out_dtype if out_scale is None else y.dtype)
    if not isinstance(weight, QuantizedWeight):
        raise TypeError("an int8 activation needs a quantized weight")
    if input_scale_folded:
        x_scale = torch.ones((), dtype=torch.float32, device=x.codes.device)
    elif x.scale.ndim == 0:
        x_scale = x.scale
    else:
        raise ValueError("a per-channel input scale must be folded into the weight's columns")
    codes = x.codes.reshape(-1, x.codes.shape[-1])
    w, scale = weight.integers()
    out = torch.empty(
        codes.shape[0],
        w.shape[0],
        dtype=torch.int8 if out_scale is not None else out_dtype,
        device=codes.device,
    )
    for start, stop in slabs(codes.shape[0], codes.device):
        y = _scaled_sums(codes[start:stop], w, scale).mul_(x_scale)
        if bias is not None:
            y += bias
        out[start:stop] = quantize_or_cast(y, out_scale, out_dtype)
    return out.view(*x.codes.shape[:-1], w.shape[0])


def _scaled_sums(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """sum_g scale[n, g] * int32 sums of group g, float32 (M, N)."""
    n_groups = scale.shape[1]
    if n_groups == 1:
        return int_matmul(x, w).to(torch.float32).mul_(scale[:, 0].to(torch.float32))
    size = w.shape[1] // n_groups
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    for g in range(n_groups):
        columns = slice(g * size, (g + 1) * size)
        sums = int_matmul(x[:, columns], w[:, columns]).to(torch.float32)
        total.addcmul_(sums, scale[:, g].to(torch.float32))
    return total


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T with int32 sums, exact. a (M, K) int8, b (N, K) int8 -> (M, N) int32."""
    if a.shape[1] == 1:  # torch._int_mm gives uninitialised memory for it on CPUs (seen in torch 2.13)
        return a.to(torch.int32) * b.to(torch.int32).t()
    if a.device.type == "cpu":
        return torch._int_mm(a.contiguous(), b.t())
    if a.device.type == "cuda":
        return _int_mm_padded(a, b)
    # Any other device: float32 products of int8 are exact up to 2^24 / 2^14 = 1024 terms.
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[1], 1024):
        total += (a[:, k : k + 1024].float() @ b[:, k : k + 1024].float().t()).to(torch.int32)
    return total


def _int_mm_padded(a: Tensor, b: Tensor) -> Tensor:
    """cuBLASLt wants more than 16 rows and multiples of 8 elsewhere."""
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    pad_k = -k % 8
    a = F.pad(a, (0, pad_k, 0, max(32 - m, -m % 8)))
    b = F.pad(b, (0, pad_k, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]
