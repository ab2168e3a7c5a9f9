"""The rotation of the scan output before out_proj."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Overflow, Rounding
from quamba.modules.leaf import Leaf


class Rotate(Leaf):
    """y = T_n x, the orthonormal Hadamard-type transform of the last dimension, then quantization.

    enabled   False: x passes through (and is still quantized if out_scale is set)
    rounding  of its codes, and what happens to values beyond them: ``overflow``
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = False
        self.rounding: Rounding = "half_even"
        self.overflow: Overflow = "saturate"

    def forward(self, x: Tensor) -> Activation:
        if self.out_scale is None:
            return self.kernels.hadamard(x) if self.enabled else x
        # Codes come from float32 sums: rounding these to 16 bits first would move some to the next code.
        y = self.kernels.hadamard(x.to(torch.promote_types(x.dtype, torch.float32))) if self.enabled else x
        codes = self.kernels.quantize(y, self.out_scale, rounding=self.rounding, overflow=self.overflow)
        return self.give(codes)
