"""The rotation of the scan output before out_proj."""

from __future__ import annotations

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
        quantize = self.kernels.hadamard_quantize if self.enabled else self.kernels.quantize
        return self.give(quantize(x, self.out_scale, rounding=self.rounding, overflow=self.overflow))
