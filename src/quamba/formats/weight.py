"""Quantized weight matrices: int8 or int4 codes with one scale per tensor, row or group of columns.

``real = scale * code`` always; there is no zero point. Linears ``[out_features, in_features]`` and embedding
tables ``[vocab, d_model]`` are stored alike.

With two levels of scales the codes of a group become int8 first, and the integers of a whole row are summed
with no scale between the groups (QQQ, Zhang et al. 2024; the published W4A8 models)::

    real[n, k] = channel_scale[n] * w8[n, k],   w8[n, k] = round_half_even(scale[n, k // group] * code[n, k])

Where the scales of groups are small *multiples* of a number of their row, both views are one: the real
weights are those of scales alone, and the integers of a row are exact without rounding (as in progressive
quantization; Lin et al. 2024, QServe)::

    scale[n, g] = multiple[n, g] * unit[n],   real[n, k] = unit[n] * (multiple[n, k // group] * code[n, k])
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

Granularity = Literal["tensor", "channel", "split", "group", "two_level"]
_GRANULARITIES = ("tensor", "channel", "split", "group", "two_level")
_GROUPED = ("group", "two_level")
#: Times the code -8 the least int8.
MOST_MULTIPLES = 16
_SCALE_DTYPES = {16: torch.float16, 32: torch.float32}


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix ``[N, K]`` is stored.

    bits         8: codes in [-127, 127], one int8 each; 4: codes in [-8, 7], two to a byte
    granularity  "tensor": scale [1, 1]; "channel": one a row, [N, 1]; "split": as "channel", but the rows of
                 one part of the output (z, x, B, C or dt) share theirs; "group": one a row and group of
                 ``group_size`` consecutive columns, [N, K // group_size]; "two_level" (4 bits): as "group",
                 relative to a scale of the row, so that codes times group scale are integers of 8 bits
    group_size   for "group" and "two_level", else None; a matrix narrower than one group is one group
    scale_bits   16 or 32: float16 or float32 scales; None: 16 for scales of groups, 32 for all others
    parts        for "split": rows of each part, all of them together; a recipe leaves it None, its plan knows
    multiples    for "group" of 4 bits with scales of 16: the scales of a row are 1 to so many times one
                 number, 2 to 16, so that multiples times codes are integers of 8 bits; None: any scales

    The scale of a row beside those of its groups is always float32.
    """

    bits: Literal[4, 8]
    granularity: Granularity
    group_size: int | None = None
    scale_bits: Literal[16, 32] | None = None
    parts: tuple[int, ...] | None = None
    multiples: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise one_of("The number of weight bits", self.bits, ("4", "8"))
        if self.granularity not in _GRANULARITIES:
            raise one_of("The weight granularity", self.granularity, _GRANULARITIES)
        if self.scale_bits not in (None, *_SCALE_DTYPES):
            raise one_of("The number of scale bits", self.scale_bits, ("16", "32"))
        if self.granularity == "two_level" and (self.bits != 4 or self.scale_bits == 32):
            raise QuambaError(
                f"Granularity 'two_level' has {self.bits} bits and scale_bits {self.scale_bits}, expected 4"
                " bits and scale_bits 16."
            )
        if self.parts is not None:
            object.__setattr__(self, "parts", tuple(self.parts))
            if self.granularity != "split":
                raise QuambaError(
                    f"A weight format of granularity '{self.granularity}' has parts, expected none; only"
                    " granularity 'split' has parts."
                )
        self._check_group_size()
        self._check_multiples()

    def _check_group_size(self) -> None:
        if self.granularity not in _GROUPED:
            if self.group_size is not None:
                raise QuambaError(
                    f"group_size is {self.group_size!r} with granularity '{self.granularity}', expected None;"
                    " only granularities 'group' and 'two_level' have a group size."
                )
        elif not isinstance(self.group_size, int) or self.group_size <= 0:
            raise QuambaError(
                f"group_size is {self.group_size!r} with granularity '{self.granularity}', expected a"
                " positive integer such as 128."
            )

    def _check_multiples(self) -> None:
        if self.multiples is None:
            return
        if self.granularity != "group" or self.bits != 4 or self.scale_bits == 32:
            raise QuambaError(
                f"A weight format of {self.bits} bits, granularity '{self.granularity}' and scale_bits"
                f" {self.scale_bits} has multiples, expected 4 bits, granularity 'group' and scale_bits 16."
            )
        if not isinstance(self.multiples, int) or not 2 <= self.multiples <= MOST_MULTIPLES:
            raise QuambaError(
                f"multiples is {self.multiples!r}, expected an integer from 2 to {MOST_MULTIPLES}: times the"
                f" code {INT4_MIN} it must be an integer of 8 bits."
            )

    @property
    def qmin(self) -> int:
        return INT4_MIN if self.bits == 4 else -127

    @property
    def qmax(self) -> int:
        return INT4_MAX if self.bits == 4 else 127

    @property
    def scale_dtype(self) -> torch.dtype:
        if self.scale_bits is not None:
            return _SCALE_DTYPES[self.scale_bits]
        return torch.float16 if self.granularity in _GROUPED else torch.float32

    @property
    def one_level(self) -> WeightFormat:
        """What codes and scales are chosen in: for "two_level" the groups alone, else the format itself."""
        return dataclasses.replace(self, granularity="group") if self.granularity == "two_level" else self

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

    @property
    def row_parts(self) -> list[int]:
        """``parts`` of a format that a plan has placed."""
        assert self.parts is not None, "only a plan knows the parts of granularity 'split'"
        return list(self.parts)

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
      data           int8 [N, K], or for 4 bits uint8 [N, K // 2] packed as in ``formats/packing.py``
      scale          [1, 1], [N, 1] or [N, groups] (``WeightFormat.scale_shape``, ``scale_dtype``)
      channel_scale  [N, 1] float32, of granularity "two_level" (else None)

    Scales are positive where we choose them; published embedding tables may have others.
    ``.to(dtype)``, ``.half()`` and the like move it but change no buffer's dtype.
    """

    data: Tensor
    scale: Tensor
    channel_scale: Tensor | None

    def __init__(
        self, data: Tensor, scale: Tensor, format: WeightFormat, channel_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.format = format
        rows, columns = data.shape
        self.shape: tuple[int, int] = (rows, columns * 2 if format.bits == 4 else columns)
        _require("data", data, format.data_shape(self.shape), format.data_dtype)
        _require("scale", scale, format.scale_shape(self.shape), format.scale_dtype)
        if (channel_scale is not None) != (format.granularity == "two_level"):
            raise TypeError(f"channel_scale does not go with granularity '{format.granularity}'")
        if channel_scale is not None:
            _require("channel_scale", channel_scale, (rows, 1), torch.float32)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("channel_scale", channel_scale)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, format: WeightFormat) -> QuantizedWeight:
        """From unpacked codes, int8 [N, K], and scales of ``format.one_level``, in shape and dtype as stored.

        For "two_level" they are taken apart: the row's scale is max_k |scale * code| / 127, in 11 significant
        bits and rounded up, and those of its groups are divided by it.
        """
        if codes.dtype != torch.int8:
            raise TypeError(f"codes are {codes.dtype}, expected torch.int8")
        data = pack_int4(codes) if format.bits == 4 else codes.contiguous()
        if format.granularity != "two_level":
            return cls(data, scale, format)
        reach = apply_scale(codes, scale, torch.float32).abs().amax(1, keepdim=True)
        row = round_significant(reach / 127, up=True)
        row = torch.where(reach > 0, row, scale[:, :1].float())
        # Only a group whose codes are all 0 can have more than 127, and it may have any scale.
        group = (scale.float() / row).clamp(max=127)
        return cls(data, group.to(format.scale_dtype), format, row)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], format: WeightFormat, device: torch.device | str | None = None
    ) -> QuantizedWeight:
        """Uninitialised buffers of the right shapes, to be filled from a checkpoint; also on "meta"."""
        data = torch.empty(format.data_shape(shape), dtype=format.data_dtype, device=device)
        scale = torch.empty(format.scale_shape(shape), dtype=format.scale_dtype, device=device)
        row = None
        if format.granularity == "two_level":
            row = torch.empty(shape[0], 1, dtype=torch.float32, device=device)
        return cls(data, scale, format, row)

    def codes(self) -> Tensor:
        """int8 [N, K], unpacked."""
        return unpack_int4(self.data) if self.format.bits == 4 else self.data

    def integers(self) -> tuple[Tensor, Tensor]:
        """What integer products take: int8 [N, K] and their scales, [1, 1], [N, 1] or [N, groups].

        The codes themselves, except with two levels: w8 of the module's docstring and the scales of the rows.
        """
        if self.channel_scale is None:
            return self.codes(), self.scale
        w8 = apply_scale(self.codes(), self.scale, torch.float32)  # exact: 4 bits times 11
        return w8.round_().clamp_(-128, 127).to(torch.int8), self.channel_scale

    def row_unit(self) -> Tensor:
        """``row_unit`` of the scales of a format with ``multiples``, worked out once."""
        kept: tuple[Tensor, Tensor] | None = vars(self).get("_row_unit")
        if kept is None or kept[0] is not self.scale:  # moved, or read from a file
            kept = self.scale, row_unit(self.scale, self.format)
            object.__setattr__(self, "_row_unit", kept)  # beside the buffers: it is saved nowhere
        return kept[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values, ``scale * integer`` computed in dtype: [N, K]."""
        return apply_scale(*self.integers(), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        size = "" if self.format.group_size is None else f" of {self.format.group_size}"
        whole = "" if self.format.multiples is None else f", multiples to {self.format.multiples}"
        shape = f"{self.shape[0]}x{self.shape[1]}"
        return f"{shape}, int{self.format.bits} per {self.format.granularity}{size}{whole}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # nn.Module.to(dtype) casts every float buffer; the scale's dtype is part of the format, so only
        # the device of what fn returns is followed.
        self.data = fn(self.data)
        self.scale = keep_dtype(fn, self.scale)
        if self.channel_scale is not None:
            self.channel_scale = keep_dtype(fn, self.channel_scale)
        return self


def keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)`` where fn moves it; where it casts, only its device is followed."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def row_unit(scale: Tensor, format: WeightFormat) -> Tensor:
    """Of a format with ``multiples``, the largest number that all scales of a row are multiples of.

    scale    [N, G] float16
    returns  [N, 1] float32; ``scale / row_unit`` is 1 to ``multiples``, exactly
    Raises QuambaError where a row has none.
    """
    most = format.multiples
    assert most is not None, "only a format with multiples says so"
    scale = scale.float()
    least = scale.amin(1, keepdim=True)
    unit, found = least, torch.zeros_like(least, dtype=torch.bool)
    # The least scale is one of the multiples. A quotient that is no integer is at least 1/16 from one, so
    # that rounding cannot make it one.
    for multiple in range(1, most + 1):
        times = scale / (least / multiple)
        fits = ((times == times.round()) & (times <= most)).all(1, keepdim=True) & (least > 0)
        unit = torch.where(fits & ~found, least / multiple, unit)
        found |= fits
    if not bool(found.all()):
        row = int((~found).view(-1).nonzero()[0])
        raise QuambaError(
            f"The scales of row {row} of a quantized weight are not 1 to {most} times one number, as its"
            " format says; the file is damaged, or was not written by quamba."
        )
    return unit


def round_significant(x: Tensor, *, up: bool = False, bits: int = 11) -> Tensor:
    """Positive float32 x rounded to the 11 significant bits of float16, or fewer, to nearest or up; any
    exponent."""
    dropped = 24 - bits
    add = (1 << dropped) - 1 if up else 1 << (dropped - 1)
    return ((x.view(torch.int32) + add) & -(1 << dropped)).view(torch.float32)


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
