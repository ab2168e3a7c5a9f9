"""The structs of ``native/quamba_cpu.h``, and tensors as they describe them."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

import torch

from quamba.formats.activation import Activation, Quantized

ABI = 1

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_ROUNDING = {"half_even": 0, "half_away": 1}
_OVERFLOW = {"saturate": 0, "wrap": 1}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("batch_stride", c_int64),
        ("token_stride", c_int64),
        ("dtype", c_int32),
        ("scale_step", c_int32),
    )


class Op(ctypes.Structure):
    """The arguments of an op. What they point to is kept alive by ``keep``."""

    kind: ClassVar[int]


def _tensors(*names: str) -> list[tuple[str, Any]]:
    return [(name, Tensor) for name in names]


def _fields(type: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, type) for name in names]


class Linear(Op):
    kind = 0
    _fields_ = (
        *_tensors("x", "y"),
        *_fields(c_int64, "rows", "columns", "outputs", "groups", "scale_rows"),
        *_fields(c_void_p, "weight", "scale", "channel_scale", "row_unit", "bias", "x_scale"),
        *_fields(c_int32, "bits", "scale_dtype"),
    )


class Embedding(Op):
    kind = 1
    _fields_ = (
        ("ids", c_void_p),
        ("y", Tensor),
        *_fields(c_int64, "rows", "columns", "groups", "scale_rows"),
        *_fields(c_void_p, "weight", "scale"),
        *_fields(c_int32, "bits", "scale_dtype"),
    )


class AddNorm(Op):
    kind = 2
    _fields_ = (
        *_tensors("x", "residual", "sum", "y"),
        *_fields(c_int64, "rows", "columns"),
        *_fields(c_void_p, "weight", "bias"),
        ("eps", c_float),
        ("center", c_int32),
    )


class GatedNorm(Op):
    kind = 3
    _fields_ = (
        *_tensors("y", "z", "out"),
        *_fields(c_int64, "rows", "columns", "group_size", "paley_order"),
        *_fields(c_void_p, "weight", "paley"),
        ("eps", c_float),
        *_fields(c_int32, "norm_before_gate", "rotate", "rounding", "overflow"),
    )


class Conv(Op):
    kind = 4
    _fields_ = (
        *_tensors("x", "y", "state"),
        *_fields(c_int64, "batch", "length", "channels", "width"),
        *_fields(c_void_p, "weight", "bias", "product_scale", "mask"),
        *_fields(c_int32, "product_step", "rounding"),
    )


class State(ctypes.Structure):
    _fields_ = (
        *_fields(c_void_p, "data", "scale", "group"),
        *_fields(c_int64, "scale_rows", "scale_columns"),
        *_fields(c_int32, "dtype", "unused"),
    )


class Ssd(Op):
    kind = 5
    _fields_ = (
        *_tensors("x", "dt", "B", "C", "y"),
        ("state", State),
        *_fields(c_int64, "batch", "length", "heads", "headdim", "groups", "d_state"),
        *_fields(c_void_p, "A", "D", "dt_bias", "mask"),
        *_fields(c_float, "dt_min", "dt_max"),
    )


class SelectiveScan(Op):
    kind = 6
    _fields_ = (
        *_tensors("u", "dt", "z", "B", "C", "y"),
        ("state", State),
        *_fields(c_int64, "batch", "length", "channels", "d_state"),
        *_fields(c_void_p, "A", "D", "dt_bias", "mask"),
    )


class Quantize(Op):
    kind = 7
    _fields_ = (
        *_tensors("x", "y"),
        *_fields(c_int64, "rows", "columns"),
        *_fields(c_int32, "rounding", "overflow"),
    )


OPS: tuple[type[Op], ...] = (Linear, Embedding, AddNorm, GatedNorm, Conv, Ssd, SelectiveScan, Quantize)


def dtype_code(dtype: torch.dtype) -> int:
    return _DTYPES[dtype]


def rounding_code(rounding: str) -> int:
    return _ROUNDING[rounding]


def overflow_code(overflow: str) -> int:
    return _OVERFLOW[overflow]


def supported(*tensors: Activation | torch.Tensor | None) -> bool:
    """Whether all of them have a dtype the kernels read; float64 has not."""
    return all(
        (t.codes if isinstance(t, Quantized) else t).dtype in _DTYPES for t in tensors if t is not None
    )


def tensor(x: torch.Tensor, scale: torch.Tensor | None = None) -> Tensor:
    """(tokens, C) or (batch, length, C) with channels next to each other; scale () or (C,) float32."""
    batch_stride = x.stride(0) if x.ndim == 3 else 0
    step = 0 if scale is None or scale.ndim == 0 else 1
    return Tensor(
        x.data_ptr(),
        None if scale is None else scale.data_ptr(),
        batch_stride,
        x.stride(-2),
        _DTYPES[x.dtype],
        step,
    )


def activation(x: Activation) -> Tensor:
    return tensor(x.codes, x.scale) if isinstance(x, Quantized) else tensor(x)


def with_unit_channels(x: Activation) -> Activation:
    """Itself if its channels are next to each other, else a copy for which they are."""
    codes = x.codes if isinstance(x, Quantized) else x
    if codes.stride(-1) == 1 or codes.shape[-1] == 1:
        return x
    return Quantized(codes.contiguous(), x.scale) if isinstance(x, Quantized) else codes.contiguous()


def as_rows(x: Activation) -> Activation:
    """(..., C) as (tokens, C), copied only where strides ask for it."""
    if isinstance(x, Quantized):
        return with_unit_channels(Quantized(x.codes.reshape(-1, x.codes.shape[-1]), x.scale))
    return with_unit_channels(x.reshape(-1, x.shape[-1]))


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous float32; itself if it is."""
    return None if x is None else x.to(torch.float32).contiguous()
