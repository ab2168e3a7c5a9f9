"""The rotation of the scan output before out_proj."""

from __future__ import annotations

from torch import Tensor

from quamba.formats.activation import Activation
from quamba.modules.leaf import Leaf


class Rotate(Leaf):
    """y = T_n x, the orthonormal Hadamard-type transform of the last dimension, then quantization.

    With ``enabled`` False it passes x through (and still quantizes if out_scale is set).
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = False

    def forward(self, x: Tensor) -> Activation:
        y = self.kernels.hadamard(x) if self.enabled else x
        return y if self.out_scale is None else self.give(self.kernels.quantize(y, self.out_scale))
