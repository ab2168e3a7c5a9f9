"""Causal depthwise convolution with SiLU, for prompts and single tokens alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.reference.quantize import quantize_or_cast
from quamba.kernels.reference.slabs import slabs


def causal_conv1d(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
) -> Tensor:
    """y[t, c] = silu(bias[c] + sum_w weight[c, w] * x[t - W + 1 + w, c])

    x        (B, L, C) float, or int8 codes with a scale () or (C,)
    weight   (C, W) float, or QuantizedWeight per tensor or channel
    bias     (C,) float or None
    state    (B, W - 1, C) in the format of x: the inputs before the first, overwritten with the
             last ones; None means zeros
    mask     (B, L) bool or None: where False the input counts as zero and so does the output
    rounding of the output's codes: ties "half_even" or "half_away"
    returns  (B, L, C) int8 codes of out_scale () or (C,) if given, else out_dtype

    With int8 x and a quantized weight the products and their sum are integers (exact in float32:
    |sum| < 2^24 for W < 1024); scales, bias and SiLU are float32.
    """
    values, x_scale = (x.codes, x.scale) if isinstance(x, Quantized) else (x, None)
    if mask is not None:
        values = values * mask[..., None].to(values.dtype)
    width = weight.shape[1]
    before = values.new_zeros(values.shape[0], width - 1, values.shape[2]) if state is None else state
    window = torch.cat([before, values], dim=1)
    if state is not None:
        state.copy_(window[:, values.shape[1] :])
    scale = _product_scale(weight, x_scale)
    taps = weight.codes() if isinstance(weight, QuantizedWeight) and x_scale is not None else weight
    if isinstance(taps, QuantizedWeight):
        taps = taps.dequantize(values.dtype)
    length = values.shape[1]
    compute = torch.float32 if x_scale is not None else values.dtype
    out = torch.empty(
        values.shape, dtype=torch.int8 if out_scale is not None else out_dtype, device=values.device
    )
    for start, stop in slabs(values.shape[0], values.device, cpu_rows=1):  # a sequence stays in the caches
        part = window[start:stop].to(compute)
        acc = part[:, :length] * taps[:, 0].to(compute)
        for w in range(1, width):
            acc.addcmul_(part[:, w : w + length], taps[:, w].to(compute))
        if scale is not None:
            acc *= scale
        if bias is not None:
            acc += bias.to(compute)
        out[start:stop] = quantize_or_cast(F.silu(acc), out_scale, out_dtype, rounding)
    if mask is not None:
        out *= mask[..., None].to(out.dtype)
    return out


def _product_scale(weight: Tensor | QuantizedWeight, x_scale: Tensor | None) -> Tensor | None:
    """Real value of one step of the integer sum, () or (C,); None for float inputs."""
    if x_scale is None:
        return None
    if not isinstance(weight, QuantizedWeight):
        return x_scale
    return weight.scale[:, 0].to(torch.float32).squeeze(0) * x_scale
