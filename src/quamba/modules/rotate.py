"""The rotation of the scan output before out_proj."""

from __future__ import annotations

from torch import Tensor

from quamba.formats.activation import Activation, Overflow, Rounding
from quamba.modules.leaf import Leaf
from quamba.modules.norm import GatedNorm


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

    def forward(self, x: Tensor, z: Activation | None = None, norm: GatedNorm | None = None) -> Activation:
        """With a norm, T_n norm(x, z); in one op, unless somebody watches the output of the norm."""
        if norm is not None and z is not None:
            return self._after(norm, x, z)
        if self.out_scale is None:
            return self.kernels.hadamard(x) if self.enabled else x
        quantize = self.kernels.hadamard_quantize if self.enabled else self.kernels.quantize
        return self.give(quantize(x, self.out_scale, rounding=self.rounding, overflow=self.overflow))

    def _after(self, norm: GatedNorm, y: Tensor, z: Activation) -> Activation:
        if not self.enabled or norm._forward_hooks:
            return self.forward(norm(y, z))
        out = self.kernels.gated_norm_hadamard(
            y,
            z,
            norm.weight,
            eps=norm.eps,
            group_size=norm.group_size,
            norm_before_gate=norm.norm_before_gate,
            out_scale=self.out_scale,
            out_dtype=norm.compute_dtype,
            rounding=self.rounding,
            overflow=self.overflow,
        )
        return self.give(out)
