"""Causal depthwise convolution with SiLU, for prompts and single tokens alike."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference import conv as reference

_MAX_WIDTH = 4


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
    """``reference.conv.causal_conv1d``; float64 and more than 4 taps are left to that."""
    x = abi.with_unit_channels(x)
    values = x.codes if isinstance(x, Quantized) else x
    taps, step = prepare_taps(weight, x)
    y = torch.empty(values.shape, dtype=torch.int8 if out_scale is not None else out_dtype)
    if len(taps) > _MAX_WIDTH or not abi.supported(
        values, y, None if isinstance(weight, QuantizedWeight) else weight
    ):
        return reference.causal_conv1d(
            x,
            weight,
            bias,
            state=state,
            mask=mask,
            out_scale=out_scale,
            out_dtype=out_dtype,
            rounding=rounding,
        )
    if y.numel() == 0:
        return y
    window = state if state is None or state.stride(-1) == 1 else state.contiguous()
    wide_bias = abi.float32(bias)
    out_scale = abi.float32(out_scale)
    flags = None if mask is None else mask.to(torch.bool).contiguous()
    library.run(
        abi.Conv(
            x=abi.tensor(values),
            y=abi.tensor(y, out_scale),
            state=abi.Tensor() if window is None or window.numel() == 0 else abi.tensor(window),
            batch=values.shape[0],
            length=values.shape[1],
            channels=values.shape[2],
            width=len(taps),
            weight=taps.data_ptr(),
            bias=abi.pointer(wide_bias),
            product_scale=abi.pointer(step),
            mask=abi.pointer(flags),
            product_step=0 if step is None or step.ndim == 0 else 1,
            rounding=abi.rounding_code(rounding),
        )
    )
    if state is not None and window is not None and window is not state:
        state.copy_(window)
    return y


def prepare_taps(weight: Tensor | QuantizedWeight, x: Activation) -> tuple[Tensor, Tensor | None]:
    """What the kernel multiplies inputs like x with.

    returns  taps (W, C) float32: integers where both x and weight are codes; and for codes x the real value
             of one step of the sum, () or (C,) float32
    """
    if not isinstance(x, Quantized):
        taps = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        return taps.t().to(torch.float32).contiguous(), None
    if not isinstance(weight, QuantizedWeight):
        return weight.t().to(torch.float32).contiguous(), x.scale.to(torch.float32).contiguous()
    scale = weight.scale[:, 0].to(torch.float32).squeeze(0) * x.scale
    return weight.codes().t().to(torch.float32).contiguous(), scale.contiguous()
