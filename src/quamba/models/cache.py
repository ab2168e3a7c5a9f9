"""What a sequence has seen, in constant memory: one conv window and one SSM state a layer."""

from __future__ import annotations

from dataclasses import dataclass

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
        return sum(
            t.numel() * t.element_size() for layer in self.layers for t in (layer.conv_state, layer.ssm_state)
        )

    def reset(self) -> None:
        for layer in self.layers:
            layer.conv_state.zero_()
            layer.ssm_state.zero_()

    def clone(self) -> MambaCache:
        return MambaCache([LayerCache(x.conv_state.clone(), x.ssm_state.clone()) for x in self.layers])

    def select(self, rows: Tensor) -> MambaCache:
        """A cache of the given rows of the batch, int64; rows may repeat."""
        return MambaCache([LayerCache(x.conv_state[rows], x.ssm_state[rows]) for x in self.layers])
