"""Weights as codes with one level of scales, for kernels that know no other."""

from __future__ import annotations

from torch import Tensor

from quamba.formats.weight import QuantizedWeight

#: Where a weight with two levels of scales keeps its int8 numbers.
_INT8 = "_int8_codes"


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
