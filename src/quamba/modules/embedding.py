"""The token embedding."""

from __future__ import annotations

from torch import Tensor

from quamba.modules.leaf import WeightedLeaf, parameter_or_empty


class Embedding(WeightedLeaf):
    """ids (B, L) int64 -> (B, L, d_model) float. ``weight`` is a float table or a QuantizedWeight."""

    def __init__(self, rows: int, d_model: int) -> None:
        super().__init__()
        self.weight = parameter_or_empty(rows, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.kernels.embedding(ids, self.weight, out_dtype=self.compute_dtype)
