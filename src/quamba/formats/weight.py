"""Quantized weight matrices: int8 or int4 codes with one scale per tensor, row or group of columns.

``real = scale * code`` always; there is no zero point. Linears ``[out_features, in_features]`` and embedding
tables ``[vocab, d_model]`` are stored alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quamba.errors import QuambaError, nearest, one_of
from quamba.formats.packing import INT4_MAX, INT4_MIN, pack_int4, unpack_int4

Granularity = Literal["tensor", "channel", "group"]
_GRANULARITIES = ("tensor", "channel", "group")


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix ``[N, K]`` is stored.

    bits         8: codes in [-127, 127], one int8 each; 4: codes in [-8, 7], two to a byte
    granularity  "tensor": scale [1, 1]; "channel": one a row, [N, 1]; "group": one a row and group of
                 ``group_size`` consecutive columns, [N, K // group_size]
    group_size   for "group" only, else None; a matrix narrower than one group is one group

    Group scales are float16, the other two float32.
    """

    bits: Literal[4, 8]
    granularity: Granularity
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise one_of("The number of weight bits", self.bits, ("4", "8"))
        if self.granularity not in _GRANULARITIES:
            raise one_of("The weight granularity", self.granularity, _GRANULARITIES)
        if self.granularity != "group":
            if self.group_size is not None:
                raise QuambaError(
                    f"group_size is {self.group_size!r} with granularity '{self.granularity}', expected None;"
                    " only granularity 'group' has a group size."
                )
        elif not isinstance(self.group_size, int) or self.group_size <= 0:
            raise QuambaError(
                f"group_size is {self.group_size!r} with granularity 'group', expected a positive integer"
                " such as 128."
            )

    @property
    def qmin(self) -> int:
        return INT4_MIN if self.bits == 4 else -127

    @property
    def qmax(self) -> int:
        return INT4_MAX if self.bits == 4 else 127

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.granularity == "group" else torch.float32

    @property
    def smallest_scale(self) -> float:
        """The floor that keeps scales positive: 2^-24 (the least float16) or the least normal float32."""
        return 2.0**-24 if self.scale_dtype == torch.float16 else torch.finfo(torch.float32).tiny

    def group_width(self, in_features: int) -> int:
        """Columns that share a scale: the group size, or all of them.

        Raises QuambaError if in_features is larger than, and no multiple of, the group size.
        """
        size = self.group_size
        if size is None or in_features <= size:
            return in_features
        if in_features % size:
            raise QuambaError(
                f"group_size {size} does not divide in_features {in_features}; "
                f"the nearest group size that does is {_nearest_divisor(in_features, size)}."
            )
        return size

    def n_groups(self, in_features: int) -> int:
        """Scales in one row."""
        return in_features // self.group_width(in_features)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a matrix of this shape."""
        if self.granularity == "tensor":
            return 1, 1
        return shape[0], self.n_groups(shape[1])

    def data_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored codes of a matrix of this shape; QuambaError if 4 bits do not fit it."""
        if self.bits == 8:
            return shape
        if shape[1] % 2:
            raise QuambaError(
                f"A weight of 4 bits needs an even number of columns, not {shape[1]}; use 8 bits."
            )
        return shape[0], shape[1] // 2

    @property
    def data_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits == 4 else torch.int8

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that ``from_dict`` reads back to an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> WeightFormat:
        """Inverse of ``to_dict``; unknown and missing keys are errors."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise QuambaError(f"Unknown weight format field '{key}'.{nearest(key, known)}")
        missing = [name for name in ("bits", "granularity") if name not in fields]
        if missing:
            raise QuambaError(f"The weight format lacks {' and '.join(missing)}.")
        return cls(**fields)


class QuantizedWeight(nn.Module):
    """A weight matrix ``[N, K]`` as integers: ``real[n, k] = scale[n, k // group] * code[n, k]``.

    Buffers, hence keys below the name of the leaf's ``weight`` (``...in_proj.weight.data``):
      data   int8 [N, K], or for 4 bits uint8 [N, K // 2] packed as in ``formats/packing.py``
      scale  [1, 1] or [N, 1] float32, or [N, groups] float16 (``WeightFormat.scale_shape``); positive

    ``.to(dtype)``, ``.half()`` and the like move it but change neither buffer's dtype.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, scale: Tensor, format: WeightFormat) -> None:
        super().__init__()
        self.format = format
        rows, columns = data.shape
        self.shape: tuple[int, int] = (rows, columns * 2 if format.bits == 4 else columns)
        _require("data", data, format.data_shape(self.shape), format.data_dtype)
        _require("scale", scale, format.scale_shape(self.shape), format.scale_dtype)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, format: WeightFormat) -> QuantizedWeight:
        """From unpacked codes, int8 [N, K], and scales already in their stored shape and dtype."""
        if codes.dtype != torch.int8:
            raise TypeError(f"codes are {codes.dtype}, expected torch.int8")
        data = pack_int4(codes) if format.bits == 4 else codes.contiguous()
        return cls(data, scale, format)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], format: WeightFormat, device: torch.device | str | None = None
    ) -> QuantizedWeight:
        """Uninitialised buffers of the right shapes, to be filled from a checkpoint; also on "meta"."""
        data = torch.empty(format.data_shape(shape), dtype=format.data_dtype, device=device)
        scale = torch.empty(format.scale_shape(shape), dtype=format.scale_dtype, device=device)
        return cls(data, scale, format)

    def codes(self) -> Tensor:
        """int8 [N, K], unpacked."""
        return unpack_int4(self.data) if self.format.bits == 4 else self.data

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * code`` computed in dtype: [N, K]."""
        return apply_scale(self.codes(), self.scale, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + self.scale.nbytes

    def extra_repr(self) -> str:
        size = "" if self.format.group_size is None else f" of {self.format.group_size}"
        return f"{self.shape[0]}x{self.shape[1]}, int{self.format.bits} per {self.format.granularity}{size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # nn.Module.to(dtype) casts every float buffer; the scale's dtype is part of the format, so only
        # the device of what fn returns is followed.
        self.data = fn(self.data)
        scale = fn(self.scale)
        self.scale = scale if scale.dtype == self.scale.dtype else self.scale.to(scale.device)
        return self


def apply_scale(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale[n, k // group] * code[n, k]`` in dtype.

    codes    [N, K], any dtype
    scale    [N or 1, G], G divides K
    returns  [N, K] dtype
    """
    rows, columns = codes.shape
    grouped = codes.to(dtype).view(rows, scale.shape[1], columns // scale.shape[1])
    return (grouped * scale.to(dtype)[..., None]).view(rows, columns)


def _require(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise QuambaError(
            f"The {name} of a quantized weight is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {dtype} {list(shape)}."
        )


def _nearest_divisor(number: int, target: int) -> int:
    divisors = {d for i in range(1, math.isqrt(number) + 1) if number % i == 0 for d in (i, number // i)}
    return min(divisors, key=lambda d: (abs(d - target), -d))
