"""What a sequence has seen, in constant memory: one conv window and one SSM state a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """conv_state (B, d_conv - 1, conv_dim) and ssm_state (B, ..., d_state), updated in place."""

    conv_state: Tensor
    ssm_state: Tensor


@dataclass
class MambaCache:
    """Preallocated states of all layers for a batch; zeros mean "nothing read yet"."""

    layers: list[LayerCache]

    @property
    def batch_size(self) -> int:
        return self.layers[0].conv_state.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for states in self._states() for t in states)

    def reset(self) -> None:
        for states in self._states():
            torch._foreach_zero_(states)

    def copy_(self, other: MambaCache) -> MambaCache:
        """Take over the states of another cache of the same formats; the tensors stay where they are."""
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            torch._foreach_copy_(mine, theirs)
        return self

    def clone(self) -> MambaCache:
        empty = [
            LayerCache(torch.empty_like(x.conv_state), torch.empty_like(x.ssm_state)) for x in self.layers
        ]
        return MambaCache(empty).copy_(self)

    def select(self, rows: Tensor) -> MambaCache:
        """A cache of the given rows of the batch, int64; rows may repeat."""
        return MambaCache([LayerCache(x.conv_state[rows], x.ssm_state[rows]) for x in self.layers])

    def _states(self) -> tuple[list[Tensor], list[Tensor]]:
        """All windows, all SSM states: as lists, a GPU takes them in a few launches instead of hundreds."""
        return [layer.conv_state for layer in self.layers], [layer.ssm_state for layer in self.layers]
