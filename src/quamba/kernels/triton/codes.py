"""Weights as codes with one level of scales, for kernels that know no other, or with one scale a row."""

from __future__ import annotations

from torch import Tensor

from quamba.formats.weight import QuantizedWeight

#: Where a weight with two levels of scales keeps its int8 numbers.
_INT8 = "_int8_codes"
#: Where a weight whose scales are multiples keeps the number of every row.
_UNITS = "_row_units"


def codes_and_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """Codes as they are stored, scales (N, groups) or (1, 1), and bits.

    Of two levels of scales, the int8 numbers [N, K] that codes and inner scales give, with the outer scale:
    made once, on the device where the weight is, and twice the size of the codes.
    """
    if weight.channel_scale is None:
        return weight.data, weight.scale, weight.format.bits
    kept: tuple[Tensor, Tensor] | None = vars(weight).get(_INT8)
    if kept is None or kept[0].device != weight.data.device:
        kept = weight.integers()
        object.__setattr__(weight, _INT8, kept)  # beside the buffers: it is saved nowhere
    return kept[0], kept[1], 8


def row_units(weight: QuantizedWeight) -> Tensor:
    """``weight.row_unit()``, worked out once on the device where it is; only for a format with multiples."""
    kept: Tensor | None = vars(weight).get(_UNITS)
    if kept is None or kept.device != weight.data.device:
        kept = weight.row_unit()
        object.__setattr__(weight, _UNITS, kept)
    return kept
