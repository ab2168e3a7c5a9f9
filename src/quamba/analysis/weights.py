"""How far quantized weights are from the float ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from quamba.analysis.align import real_weight
from quamba.analysis.sites import Need
from quamba.analysis.statistics import Noise
from quamba.formats.weight import QuantizedWeight
from quamba.models.lm import MambaLM
from quamba.models.mamba1 import MambaMixer
from quamba.modules.leaf import WeightedLeaf

_PROJECTIONS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
#: Which rewrites a matrix goes through.
_NEEDS: dict[str, tuple[Need, ...]] = {
    "embedding": ("rotation",),
    "lm_head": ("rotation", "norms"),
    "in_proj": ("rotation", "norms", "order"),
    "conv1d": ("order",),
    "x_proj": (),
    "dt_proj": (),
    "out_proj": ("rotation", "order"),
}


@dataclass(frozen=True)
class WeightReport:
    """snr_db = 10 log10(sum w^2 / sum (w - q)^2) of a matrix of integers; layer None outside the blocks.

    Where the columns of Mamba1's x_proj contain the scales of its input, those of w do too.
    """

    layer: int | None
    name: str
    bits: int
    granularity: str
    snr_db: float


def weight_errors(network: MambaLM, reference: MambaLM, left_out: Mapping[Need, str]) -> list[WeightReport]:
    """Of every quantized matrix of the network, against the aligned reference."""
    found = []
    for (layer, name, leaf), (_, _, other) in zip(_leaves(network), _leaves(reference), strict=True):
        weight = leaf.weight
        if not isinstance(weight, QuantizedWeight) or set(_NEEDS[name]) & left_out.keys():
            continue
        noise = Noise(network.device)
        wanted, got = (real_weight(matrix, torch.float32) for matrix in (other, leaf))
        if name == "x_proj" and layer is not None:
            wanted = wanted * _folded_scale(network, layer)
        noise.update(wanted, got)
        found.append(WeightReport(layer, name, weight.format.bits, weight.format.granularity, noise.snr_db))
    return found


def _leaves(network: MambaLM) -> Iterator[tuple[int | None, str, WeightedLeaf]]:
    yield None, "embedding", network.backbone.embedding
    for i, block in enumerate(network.blocks):
        for name in _PROJECTIONS:
            leaf = getattr(block.mixer, name, None)
            if leaf is not None:
                yield i, name, leaf
    yield None, "lm_head", network.lm_head


def _folded_scale(network: MambaLM, layer: int) -> torch.Tensor | float:
    """The scales of x that the columns of x_proj contain."""
    mixer = network.blocks[layer].mixer
    assert isinstance(mixer, MambaMixer)
    if not mixer.x_proj.input_scale_folded or mixer.conv1d.out_scale is None:
        return 1.0
    return mixer.conv1d.out_scale
