"""Where activations are rounded to int8, and which channels share a scale there.

A site is the output of a leaf. Its channels fall into segments (z, x, B, C, dt); in a segment the
channels share scales by group, and the statistic behind a scale is the absolute maximum or, for x,
a percentile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quamba.models.config import MambaConfig
from quamba.recipes.plan import Plan

# Leaves whose output feeds a product of integers directly: one scale, stored as a scalar.
SCALAR_SITES = ("norm", "mixer.rotate")


@dataclass(frozen=True)
class Segment:
    """Channels [start, start + len(groups)) of a leaf's output; ``groups`` int64, counted from 0."""

    start: int
    groups: Tensor
    alpha: float = 1.0


def block_segments(plan: Plan, x_groups: Tensor | None) -> dict[str, list[Segment]]:
    """Leaf name -> segments, for a block with int8 activations.

    x_groups  (d_inner,) int64, the head group x channel group of each channel of Mamba2's x, or None
    """
    config = plan.config
    per_channel = plan.recipe.activation_scales == "channel"

    def spread(size: int) -> Tensor:
        return torch.arange(size) if per_channel else _one(size)

    if isinstance(config, MambaConfig):
        return _mamba_segments(config, plan.alpha, per_channel)
    x_groups = spread(config.d_inner) if x_groups is None else x_groups
    d_bc = config.ngroups * config.d_state
    bc = torch.arange(d_bc) if per_channel else torch.arange(config.ngroups).repeat_interleave(config.d_state)
    return {
        "norm": _consecutive(_one(config.d_model)),
        "mixer.in_proj": _consecutive(
            spread(config.d_inner), spread(config.d_inner), spread(d_bc), spread(d_bc), spread(config.nheads)
        ),
        "mixer.conv1d": _with_alpha(_consecutive(x_groups, bc, bc), plan.alpha),
        "mixer.rotate": _consecutive(_one(config.d_inner)),
    }


def _mamba_segments(config: MambaConfig, alpha: float, per_channel: bool) -> dict[str, list[Segment]]:
    """With one scale a tensor, the outputs of in_proj (x, z) and of x_proj (dt, B, C) are one tensor each."""
    spread = torch.arange if per_channel else _one
    inner, states, dt = spread(config.d_inner), spread(config.d_state), _one(config.dt_rank)
    xz, selection = [inner, inner], [dt, states, states]
    if not per_channel:
        xz, selection = [torch.cat(xz)], [torch.cat(selection)]
    segments = {
        "norm": _consecutive(_one(config.d_model)),
        "mixer.in_proj": _consecutive(*xz),
        "mixer.conv1d": _with_alpha(_consecutive(inner), alpha),
        "mixer.dt_proj": _consecutive(inner),
        "mixer.rotate": _consecutive(_one(config.d_inner)),
    }
    if config.bcdt_rms_eps is None:
        return {**segments, "mixer.x_proj": _consecutive(*selection)}
    return {
        **segments,
        "mixer.dt_norm": _consecutive(dt),
        "mixer.B_norm": _consecutive(states),
        "mixer.C_norm": _consecutive(states),
    }


def _one(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


def _consecutive(*groups: Tensor) -> list[Segment]:
    segments, start = [], 0
    for g in groups:
        segments.append(Segment(start, g))
        start += len(g)
    return segments


def _with_alpha(segments: list[Segment], alpha: float) -> list[Segment]:
    """The percentile for the first segment, which is x."""
    return [Segment(segments[0].start, segments[0].groups, alpha), *segments[1:]]
