"""What a projection of a step reads: floats, int8 codes, or 16 bits as two int8.

Wide codes: a block of 32 neighbours has a float32 scale, max|x| / 32512, and each x two int8,
x = scale * (256 high + low). That is 2^-16 of the largest in the block, where float16 has 2^-11 of each; and
four products take an instruction a half, where products of float16 would first unpack the weights.

Split: the even inputs of a row come before the odd ones, as a word of int4 codes, shifted, has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
_LARGEST = tl.constexpr(32512.0)  # 127 * 256


@dataclass(frozen=True)
class Vector:
    """A row a sequence.

    values      (B, C) float or int8, rows evenly spaced; wide codes (B, 2, C) int8, the high halves first
    wide_scale  (B, C / 32) float32 of wide codes
    split       of int8 values: even inputs, then odd ones (of each half)
    """

    values: Tensor
    wide_scale: Tensor | None = None
    split: bool = False

    @classmethod
    def codes(cls, batch: int, channels: int, device: torch.device, split: bool) -> Vector:
        return cls(torch.zeros(batch, channels, dtype=torch.int8, device=device), None, split)

    @classmethod
    def wide(cls, batch: int, channels: int, device: torch.device, split: bool) -> Vector:
        halves = torch.zeros(batch, 2, channels, dtype=torch.int8, device=device)
        scale = torch.zeros(batch, channels // BLOCK, dtype=torch.float32, device=device)
        return cls(halves, scale, split)

    @classmethod
    def floats(cls, batch: int, channels: int, device: torch.device, dtype: torch.dtype) -> Vector:
        return cls(torch.zeros(batch, channels, dtype=dtype, device=device))

    @property
    def is_float(self) -> bool:
        return self.values.dtype != torch.int8

    @property
    def is_wide(self) -> bool:
        return self.wide_scale is not None


@dataclass(frozen=True)
class Normed:
    """What the RMSNorm of the residual stream makes of it, for a projection that computes it as it reads
    (``normed.py``).

    residual  (B, C) float, contiguous, C a multiple of 32
    weight    (C,) float, or None
    scale     () of int8 codes; None: wide codes
    """

    residual: Tensor
    weight: Tensor | None
    scale: Tensor | None
    eps: float

    is_float = False

    @property
    def is_wide(self) -> bool:
        return self.scale is None


@triton.jit
def place(c: tl.tensor, CHANNELS: tl.constexpr, SPLIT: tl.constexpr) -> tl.tensor:
    """Where channel c of a row is."""
    return c % 2 * (CHANNELS // 2) + c // 2 if SPLIT else c


@triton.jit
def wide_step(largest: tl.tensor) -> tl.tensor:
    """The scale of blocks whose largest absolute values these are."""
    return tl.maximum(largest, 1e-30) * (1.0 / _LARGEST)


@triton.jit
def wide_codes(x: tl.tensor):
    """(high, low, scale) of x (blocks, 32) float32: int8, int8, float32 (blocks,)."""
    scale = wide_step(tl.max(tl.abs(x), axis=1))
    ratio = x * tl.div_rn(1.0, scale)[:, None]
    code = (ratio + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    low = ((code + 128) & 255) - 128
    return ((code - low) >> 8).to(tl.int8), low.to(tl.int8), scale
