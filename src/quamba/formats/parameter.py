"""Small parameters in int8: A_log, D, dt_bias and the biases of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quamba.errors import QuambaError
from quamba.formats.weight import keep_dtype

_SMALLEST = torch.finfo(torch.float32).tiny


class QuantizedParameter(nn.Module):
    """A small parameter (A_log, D, dt_bias, a bias) in int8: ``real = scale * data``.

    Buffers: data int8 of any shape (..., C), scale float32 () or (C,), which keep their dtypes as those of
    ``QuantizedWeight`` do.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__()
        if (
            data.dtype != torch.int8
            or scale.dtype != torch.float32
            or scale.shape not in ((), data.shape[-1:])
        ):
            raise QuambaError(
                f"A parameter of integers has codes {data.dtype} {list(data.shape)} and a scale {scale.dtype}"
                f" {list(scale.shape)}, expected int8 codes and a float32 scale, one or one for each of the"
                " last dimension."
            )
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    @classmethod
    def from_float(cls, value: Tensor, parts: Sequence[int] | None = None) -> QuantizedParameter:
        """Round to nearest with scale max|value| / 127: one, or one for each part of the last dimension."""
        value = value.float()
        pieces = [value] if parts is None else list(value.split(list(parts), dim=-1))
        scales = [piece.abs().amax().clamp(min=_SMALLEST) / 127 for piece in pieces]
        codes = [(piece / scale).round() for piece, scale in zip(pieces, scales, strict=True)]
        one = torch.stack(scales)
        scale = one[0] if parts is None else one.repeat_interleave(torch.tensor(parts, device=one.device))
        return cls(torch.cat(codes, dim=-1).to(torch.int8), scale)

    @classmethod
    def empty(cls, shape: Sequence[int], *, per_channel: bool = False) -> QuantizedParameter:
        data = torch.empty(*shape, dtype=torch.int8)
        return cls(data, torch.empty(shape[-1:] if per_channel else (), dtype=torch.float32))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.data.to(dtype) * self.scale.to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedParameter:
        self.data, self.scale = fn(self.data), keep_dtype(fn, self.scale)
        return self


Parameter = nn.Parameter | QuantizedParameter


def as_tensor(parameter: Parameter, dtype: torch.dtype = torch.float32) -> Tensor:
    """The real values; of a float parameter in its own dtype, of integers in ``dtype``."""
    return parameter.dequantize(dtype) if isinstance(parameter, QuantizedParameter) else parameter
