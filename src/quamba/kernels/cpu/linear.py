"""Matrix products with quantized weights: ``kernels/reference/linear.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference.linear import linear as reference

#: Columns of a block of the kernels for 4 bits, on the widest vectors.
_BLOCK = 128
#: Rows of 16-bit floats from which on PyTorch's libraries multiply float weights: they have units for that.
_MANY_ROWS = 9
#: Rows of codes from which on the kernels lay weights out in tiles (native/kernels/linear.cpp, kManyRows).
_MANY_CODES = 12


def linear(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    input_scale_folded: bool = False,
) -> Tensor:
    """As the reference. With float x and quantized weights, each 128 columns of a row of x become integers of
    15 bits (their largest is +-16,256) and are summed as integers; x of float64 goes to the reference.

    Many rows of 16-bit floats times float weights are PyTorch's, whose libraries have units for that.
    """
    if not _has_kernel(x, weight, out_dtype):
        return reference(
            x,
            weight,
            bias,
            out_scale=out_scale,
            out_dtype=out_dtype,
            input_scale_folded=input_scale_folded,
        )
    if isinstance(x, Quantized) and not input_scale_folded and x.scale.ndim:
        raise ValueError("a per-channel input scale must be folded into the weight's columns")
    rows = abi.as_rows(x)
    codes = rows.codes if isinstance(rows, Quantized) else rows
    dtype = out_dtype if out_scale is None else torch.int8
    y = torch.empty(codes.shape[0], weight.shape[0], dtype=dtype)
    bias = abi.float32(bias)
    library.run(describe(rows, weight, bias, abi.tensor(y, out_scale), input_scale_folded))
    shape = x.codes.shape if isinstance(x, Quantized) else x.shape
    return y.view(*shape[:-1], weight.shape[0])


def describe(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    y: abi.Tensor,
    input_scale_folded: bool,
) -> abi.Linear:
    """x (rows, columns); bias float32. The struct points into all of them."""
    codes = x.codes if isinstance(x, Quantized) else x
    described = abi.Linear(
        x=abi.tensor(codes),
        y=y,
        rows=codes.shape[0],
        columns=weight.shape[1],
        outputs=weight.shape[0],
        groups=1,
        scale_rows=1,
        bias=abi.pointer(bias),
    )
    if not isinstance(weight, QuantizedWeight):
        described.weight = weight.data_ptr()
        described.bits, described.scale_dtype = 8 * weight.element_size(), abi.dtype_code(weight.dtype)
        return described
    described.weight, described.scale = weight.data.data_ptr(), weight.scale.data_ptr()
    described.channel_scale = abi.pointer(weight.channel_scale)
    many = isinstance(x, Quantized) and codes.shape[0] >= _MANY_CODES
    if many and weight.format.multiples is not None and _whole_blocks(weight):
        described.row_unit = abi.pointer(weight.row_unit())
    described.scale_rows, described.groups = weight.scale.shape
    described.bits, described.scale_dtype = weight.format.bits, abi.dtype_code(weight.scale.dtype)
    if isinstance(x, Quantized) and not input_scale_folded:
        described.x_scale = x.scale.data_ptr()
    return described


def _has_kernel(x: Activation, weight: Tensor | QuantizedWeight, out_dtype: torch.dtype) -> bool:
    if not abi.supported(x) or out_dtype == torch.float64:
        return False
    if not isinstance(weight, QuantizedWeight):
        if isinstance(x, Quantized) or not abi.supported(weight) or not weight.is_contiguous():
            return False
        return x.dtype == weight.dtype == torch.float32 or x.numel() < _MANY_ROWS * x.shape[-1]
    group = weight.shape[1] // weight.scale.shape[1]
    if weight.format.bits == 4 and group % 2:
        return False
    return weight.channel_scale is None or _whole_blocks(weight)


def _whole_blocks(weight: QuantizedWeight) -> bool:
    """Whether a vector of weights is of one group, or of one after the other."""
    return weight.scale.shape[1] == 1 or weight.shape[1] // weight.scale.shape[1] % _BLOCK == 0
