"""A projection: float, weight-only, or integer, as its weight and its input say."""

from __future__ import annotations

from torch import nn

from quamba.formats.activation import Activation
from quamba.modules.leaf import WeightedLeaf, parameter_or_empty


class Linear(WeightedLeaf):
    """(..., in_features) -> (..., out_features), float or int8 (``kernels/reference/linear.py``).

    input_scale_folded  the columns of ``weight`` contain the per-channel scale of the input's codes
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = parameter_or_empty(out_features, in_features)
        self.bias = parameter_or_empty(out_features) if bias else None
        self.input_scale_folded = False

    def forward(self, x: Activation) -> Activation:
        y = self.kernels.linear(
            x,
            self.weight,
            self.bias,
            out_scale=self.out_scale,
            out_dtype=self.compute_dtype,
            input_scale_folded=self.input_scale_folded,
        )
        return self.give(y)
