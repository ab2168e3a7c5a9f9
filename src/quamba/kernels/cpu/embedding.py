"""Embedding lookup from a float or quantized table."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.cpu import abi, library
from quamba.kernels.reference import embedding as reference


def embedding(
    ids: Tensor, weight: Tensor | QuantizedWeight, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``reference.embedding.embedding``, which serves float64. IndexError for an id outside the table."""
    table = weight.data if isinstance(weight, QuantizedWeight) else weight
    if torch.float64 in (table.dtype, out_dtype):
        return reference.embedding(ids, weight, out_dtype=out_dtype)
    vocabulary, columns = weight.shape
    y = torch.empty(*ids.shape, columns, dtype=out_dtype)
    if y.numel() == 0:
        return y
    if library.is_recording():
        pass  # ids of later: those that are chosen from logits
    elif int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise IndexError(
            f"ids go from {int(ids.min())} to {int(ids.max())}; the table has {vocabulary} rows."
        )
    rows, flat = y.view(-1, columns), ids.to(torch.int64).contiguous()
    library.run(embedding_op(flat, weight, rows))
    return y


def embedding_op(ids: Tensor, weight: Tensor | QuantizedWeight, y: Tensor) -> abi.Embedding:
    """ids contiguous int64, y (ids, D); a table is contiguous and not of granularity "two_level"."""
    columns = weight.shape[1]
    bits: int
    if isinstance(weight, QuantizedWeight):
        if weight.channel_scale is not None:
            raise ValueError("weight is of granularity 'two_level', expected one level of scales.")
        data, scale, bits = weight.data, weight.scale, weight.format.bits
        scale_rows, groups, scale_dtype = *scale.shape, abi.dtype_code(scale.dtype)
    else:
        data, scale, bits = weight, None, 8 * weight.element_size()
        scale_rows, groups, scale_dtype = 1, 1, abi.dtype_code(weight.dtype)
    if not data.is_contiguous():
        raise ValueError("the table is not contiguous.")
    return abi.Embedding(
        ids.data_ptr(),
        abi.tensor(y),
        ids.numel(),
        columns,
        groups,
        scale_rows,
        data.data_ptr(),
        abi.pointer(scale),
        bits,
        scale_dtype,
    )
