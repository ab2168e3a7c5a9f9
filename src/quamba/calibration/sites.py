"""From what observers saw to the scales of a block's int8 sites and of its state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quamba.calibration.collect import StateWatch, Watch
from quamba.calibration.observers import Observer, StateObserver, make_observer, make_state_observer
from quamba.recipes.plan import Plan
from quamba.recipes.sites import SCALAR_SITES, Segment, block_segments

INT8_MAX = 127
# A site that never fired still needs a scale above zero.
SMALLEST_MAXIMUM = 1e-5


@dataclass(frozen=True)
class BlockScales:
    """What calibration knows of one block.

    activations  leaf name ("norm", "mixer.in_proj", ...) -> float32 scale, () or (C,)
    state_scale  (K, N) or (K, 1) float32, or None where the state is not int8
    state_group  (d_inner,) int32, or None for K = 1
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    state_scale: Tensor | None = None
    state_group: Tensor | None = None


class BlockObservers:
    """Observers on every site of one block. ``watches`` go to ``collect``; then ``scales`` are read."""

    def __init__(self, plan: Plan, layer: int, x_groups: Tensor | None, device: torch.device) -> None:
        block = plan.blocks[layer]
        self._sites: dict[str, list[tuple[Segment, Observer]]] = {}
        if block.int8_activations:
            for leaf, segments in block_segments(plan, x_groups).items():
                self._sites[leaf] = [(s, make_observer(s.groups.to(device), s.alpha)) for s in segments]
        self._layer = layer
        self._state: StateObserver | None = None
        self._state_groups = x_groups
        if block.state == "int8":
            groups = torch.zeros(plan.config.d_inner, dtype=torch.int64) if x_groups is None else x_groups
            per_state = plan.scales_each_state_index
            alpha = 1.0 if per_state else plan.alpha  # a percentile of one index of one group has no tail
            self._state = make_state_observer(groups.to(device), alpha, per_state=per_state)

    @property
    def watches(self) -> list[Watch]:
        prefix = f"backbone.layers.{self._layer}."
        return [
            Watch(prefix + leaf, slice(s.start, s.start + len(s.groups)), observer)
            for leaf, pairs in self._sites.items()
            for s, observer in pairs
        ]

    @property
    def state_watches(self) -> list[StateWatch]:
        return [] if self._state is None else [StateWatch(self._layer, self._state)]

    def scales(self) -> BlockScales:
        activations = {}
        for leaf, pairs in self._sites.items():
            parts = [_spread(scale_of(observer.value()), s) for s, observer in pairs]
            activations[leaf] = parts[0][0].clone() if leaf in SCALAR_SITES else torch.cat(parts)
        if self._state is None:
            return BlockScales(activations)
        scale = scale_of(self._state.value())
        group = None if self._state_groups is None else self._state_groups.to(torch.int32).to(scale.device)
        return BlockScales(activations, scale, group)


def scale_of(maximum: Tensor) -> Tensor:
    """Real value of one int8 step: maximum / 127, float32, above zero."""
    return maximum.to(torch.float32).clamp(min=SMALLEST_MAXIMUM) / INT8_MAX


def _spread(scale: Tensor, segment: Segment) -> Tensor:
    return scale[segment.groups.to(scale.device)]
