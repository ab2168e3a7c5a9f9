"""Norms: of the residual stream, of Falcon Mamba's B, C and dt, and Mamba2's gated one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.formats.activation import Activation
from quamba.modules.leaf import Leaf, parameter_or_empty


class AddNorm(Leaf):
    """Adds the residual, normalises, and gives (normalised, new residual).

    RMSNorm, or LayerNorm with ``layer_norm``. ``weight`` is None once folded into the next projection.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, d_model: int, eps: float, *, layer_norm: bool = False, residual_in_fp32: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.layer_norm, self.residual_in_fp32 = eps, layer_norm, residual_in_fp32
        self.weight = parameter_or_empty(d_model)
        self.bias = parameter_or_empty(d_model) if layer_norm else None

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Activation, Tensor]:
        wide = self.residual_in_fp32 and x.dtype != torch.float64
        y, residual = self.kernels.add_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            center=self.layer_norm,
            residual_dtype=torch.float32 if wide else x.dtype,
            out_scale=self.out_scale,
            out_dtype=self.compute_dtype,
        )
        return self.give(y), residual


class UnitNorm(Leaf):
    """RMSNorm without weights over the last dimension."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Activation) -> Activation:
        y = self.kernels.rms_norm(x, eps=self.eps, out_scale=self.out_scale, out_dtype=self.compute_dtype)
        return self.give(y)


class GatedNorm(Leaf):
    """Mamba2's norm of the scan output y, gated by z; float out (the rotation after it quantizes)."""

    weight: nn.Parameter | None

    def __init__(self, d_inner: int, eps: float, *, ngroups: int, norm_before_gate: bool) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, d_inner // ngroups, norm_before_gate
        self.weight = parameter_or_empty(d_inner)

    def forward(self, y: Tensor, z: Activation) -> Tensor:
        return self.kernels.gated_rms_norm(
            y,
            z,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
            out_dtype=self.compute_dtype,
        )
