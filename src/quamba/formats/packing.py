"""Canonical packing of 4-bit codes, two to a byte: the layout in memory of the reference and on disk.

Columns 2j and 2j+1 of a row share byte j; each nibble is a two's complement integer in [-8, 7]::

    bit      7   6   5   4 | 3   2   1   0
    byte j   column 2j + 1 | column 2j
             (odd, high)   | (even, low)

    codes [-1, 7]  ->  0b0111_1111  =  0x7F
"""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.errors import QuambaError

INT4_MIN, INT4_MAX = -8, 7


def pack_int4(codes: Tensor) -> Tensor:
    """``byte[..., j] = (codes[..., 2j] & 15) | (codes[..., 2j + 1] & 15) << 4``

    codes    (..., K) int8, values in [-8, 7] (only the low four bits are kept), K even
    returns  (..., K // 2) uint8
    Raises QuambaError for an odd K.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes are {codes.dtype}, expected torch.int8")
    if codes.shape[-1] % 2:
        raise QuambaError(
            "4-bit codes are packed two to a byte, so the last dimension must be even,"
            f" not {codes.shape[-1]}; keep this weight in 8 bits."
        )
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of ``pack_int4``, on any device.

    packed   (..., K // 2) uint8
    returns  (..., K) int8 in [-8, 7], contiguous
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}, expected torch.uint8")
    codes = torch.empty(*packed.shape[:-1], packed.shape[-1], 2, dtype=torch.int8, device=packed.device)
    # A nibble v stands for v - 16 when its top bit is set; (v ^ 8) - 8 is that without a branch.
    codes[..., 0] = ((packed & 15) ^ 8).view(torch.int8) - 8
    codes[..., 1] = ((packed >> 4) ^ 8).view(torch.int8) - 8
    return codes.flatten(-2)
