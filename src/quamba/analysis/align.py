"""Bring the float model into the coordinates of the quantized one, so that their tensors can be subtracted.

Quantizing rewrites a model into one of the same function: norm weights move into projections, heads and
channels are reordered, the residual stream and the input of out_proj are rotated. The float model goes
through the same rewrites here. How channels were reordered is in the report of the quantization; for models
without one (published checkpoints) it is found by comparing rows of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba.analysis.sites import Need
from quamba.errors import QuambaError
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.reference.hadamard import hadamard
from quamba.models.config import Mamba2Config, ModelConfig
from quamba.models.lm import MambaLM
from quamba.models.mamba2 import Mamba2Mixer
from quamba.modules.leaf import WeightedLeaf
from quamba.recipes.plan import Plan
from quamba.recipes.report import Report
from quamba.transforms.fuse_norm import fuse_norms
from quamba.transforms.head_grouping import ChannelOrder
from quamba.transforms.reorder import reorder
from quamba.transforms.rotate import rotate

#: Layer -> order of heads and channels, empty where nothing was reordered; None where it is not known.
Orders = Mapping[int, ChannelOrder] | None


@dataclass(frozen=True)
class Aligned:
    """network   the reference in the other model's coordinates
    left_out  what could not be brought there, and why
    """

    network: MambaLM
    left_out: dict[Need, str] = field(default_factory=dict)


def channel_orders(plan: Plan | None, report: Report | None) -> Orders:
    """How the heads and channels of a model were reordered, as far as its own files tell."""
    if plan is None or plan.group_heads is None:
        return {}
    if report is None or len(report.head_groups) != len(plan.blocks):
        return None
    return {i: ChannelOrder.from_dict(fields) for i, fields in enumerate(report.head_groups)}


def check_pair(config: ModelConfig, reference: ModelConfig) -> None:
    """Refuse two models that are not one architecture."""
    mine, theirs = config.to_dict(), reference.to_dict()
    if mine["family"] == theirs["family"]:  # how the table is padded and shared does not change the sizes
        mine["vocab_size"], theirs["vocab_size"] = config.padded_vocab_size, reference.padded_vocab_size
    for key in mine:
        if key in ("tie_embeddings", "pad_vocab_size_multiple", "residual_in_fp32"):
            continue
        if mine[key] != theirs[key]:
            raise QuambaError(
                f"The two models differ in {key} ({mine[key]} and {theirs[key]}), expected the float model"
                " that the quantized one was made from."
            )


@torch.no_grad()
def align(network: MambaLM, orders: Orders, reference: MambaLM, reference_orders: Orders = None) -> Aligned:
    """The reference itself where it needs no rewriting, else a rewritten copy in float32 or wider.

    A reference that is quantized cannot be rewritten: then both must have been made alike, and what needs
    a rewrite that only one of them has is left out.
    """
    folded, rotated = _is_folded(network), _is_rotated(network)
    if not _is_plain(reference):
        return Aligned(reference, _differences(network, orders, reference, reference_orders))
    if not folded and not rotated and orders == {}:
        return Aligned(reference)
    left_out: dict[Need, str] = {}
    dtype = torch.promote_types(reference.lm_head.compute_dtype, torch.float32)
    reference = copy.deepcopy(reference).set_compute_dtype(dtype)
    if folded:
        fuse_norms(reference)
    if orders is None:
        orders = find_orders(network, reference)
    if orders is None:
        left_out["order"] = (
            "the order of heads and channels is in no quantization_report.json, and weights do not show it"
        )
    for i, order in (orders or {}).items():
        mixer = reference.blocks[i].mixer
        assert isinstance(mixer, Mamba2Mixer)
        reorder(mixer, order)
    if rotated:
        rotate(reference)
    return Aligned(reference, left_out)


def find_orders(network: MambaLM, reference: MambaLM) -> Orders:
    """The order of heads and channels, by the likeness of in_proj's rows of z and x; None if there is none.

    reference  float, of the original order and not rotated, its norms folded if those of the network are
    """
    config = network.config
    if not isinstance(config, Mamba2Config):
        return {}
    orders = {}
    for i, (block, other) in enumerate(zip(network.blocks, reference.blocks, strict=True)):
        mine = real_weight(block.mixer.in_proj, torch.float32)
        theirs = other.mixer.in_proj.float_weight.float()
        if _is_rotated(network):
            theirs = hadamard(theirs)
        alike = _rows_of_channels(mine, config) @ _rows_of_channels(theirs, config).T
        # After 4 bits the cosine of a row with its own is 0.99. The nearest rows of another model, or of
        # weights that are rotated otherwise, are no permutation.
        order = _order(alike.argmax(dim=1).cpu(), config)
        if order is None:
            return None
        orders[i] = order
    return orders


def real_weight(leaf: WeightedLeaf, dtype: torch.dtype) -> Tensor:
    """The weight as floats."""
    weight = leaf.weight
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def _rows_of_channels(weight: Tensor, config: Mamba2Config) -> Tensor:
    """One unit vector a channel from in_proj's rows of z and x: [d_inner, 2 * d_model]."""
    z, x = weight[: 2 * config.d_inner].chunk(2)
    return F.normalize(torch.cat([z, x], dim=1), dim=1)


def _order(channels: Tensor, config: Mamba2Config) -> ChannelOrder | None:
    """The order of these channels in one group, if heads stay together."""
    groups, heads = config.ngroups, config.nheads // config.ngroups
    try:
        return ChannelOrder(
            head_perm=channels.view(-1, config.headdim)[:, 0] // config.headdim,
            channel_perm=channels,
            head_group_range=torch.full((groups, 1), heads),
            dim_group_range=torch.full((groups, 1, 1), config.headdim),
        )
    except QuambaError:
        return None


def _differences(
    network: MambaLM, orders: Orders, reference: MambaLM, reference_orders: Orders
) -> dict[Need, str]:
    found: dict[Need, str] = {}
    if _is_rotated(network) != _is_rotated(reference):
        found["rotation"] = "only one of the models is rotated, and a quantized reference cannot be rewritten"
    if _is_folded(network) != _is_folded(reference):
        found["norms"] = "only one of the models has its norms' weights in the projections"
    if orders is None or reference_orders is None:
        found["order"] = "the order of heads and channels of one of two quantized models is not known"
    elif _permutations(orders) != _permutations(reference_orders):
        found["order"] = "the two quantized models have their heads and channels in different orders"
    return found


def _permutations(orders: Mapping[int, ChannelOrder]) -> dict[int, list[int]]:
    return {i: order.channel_perm.tolist() for i, order in orders.items()}


def _is_rotated(network: MambaLM) -> bool:
    return network.blocks[0].mixer.rotate.enabled


def _is_folded(network: MambaLM) -> bool:
    return network.backbone.norm_f.weight is None


def _is_plain(network: MambaLM) -> bool:
    """Whether this is a float model as it was read."""
    leaves = [leaf for leaf in network.modules() if isinstance(leaf, WeightedLeaf)]
    floats = all(isinstance(leaf.weight, nn.Parameter) for leaf in leaves)
    return floats and not _is_rotated(network) and not _is_folded(network)
