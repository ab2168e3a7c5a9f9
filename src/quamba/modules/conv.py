"""The causal depthwise convolution with its cached window."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Rounding
from quamba.formats.parameter import Parameter, as_tensor
from quamba.modules.leaf import WeightedLeaf, parameter_or_empty


class CausalConv1d(WeightedLeaf):
    """(B, L, channels) -> silu(conv), same shape; ``weight`` (channels, d_conv).

    state_dtype  what the cached window holds: torch.int8 behind an int8 projection, or None for
                 floats of compute_dtype
    rounding     of the codes it gives
    """

    bias: Parameter | None

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = parameter_or_empty(channels, width)
        self.bias = parameter_or_empty(channels) if bias else None
        self.state_dtype: torch.dtype | None = None
        self.rounding: Rounding = "half_even"

    def new_state(self, batch: int, device: torch.device | str) -> Tensor:
        dtype = self.state_dtype or self.compute_dtype
        return torch.zeros(batch, self.width - 1, self.channels, dtype=dtype, device=device)

    def forward(self, x: Activation, state: Tensor | None, mask: Tensor | None) -> Activation:
        """``state`` (B, d_conv - 1, channels) is read and then overwritten with the last inputs."""
        y = self.kernels.causal_conv1d(
            x,
            self.weight,
            None if self.bias is None else as_tensor(self.bias),
            state=state,
            mask=mask,
            out_scale=self.out_scale,
            out_dtype=self.compute_dtype,
            rounding=self.rounding,
        )
        return self.give(y)
