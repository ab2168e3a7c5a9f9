"""Put number formats into the leaves of a float model."""

from __future__ import annotations

from torch import Tensor, nn

from quamba.calibration.sites import BlockScales
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.models.lm import Block
from quamba.models.mamba1 import MambaMixer
from quamba.quantization.rtn import absmax_scale, mse_scale, round_to_nearest
from quamba.recipes.plan import BlockPlan
from quamba.recipes.skeleton import set_flags


def set_block_formats(block: Block, plan: BlockPlan, scales: BlockScales) -> None:
    """Activation scales, conv weights and the state's format; the projections' weights come after.

    Where x has one scale a channel, x_proj takes them into its columns, sum_k (w_k s_k) q_k, so that its
    integers still add up.
    """
    set_flags(block, plan)
    mixer = block.mixer
    for leaf, scale in scales.activations.items():
        block.get_submodule(leaf).out_scale = scale
    if plan.conv is not None:
        mixer.conv1d.set_weight(nearest(mixer.conv1d.float_weight, plan.conv))
    if plan.folds_x_scale and isinstance(mixer, MambaMixer):
        folded = mixer.x_proj.float_weight * scales.activations["mixer.conv1d"]
        mixer.x_proj.weight = nn.Parameter(folded, requires_grad=False)
    mixer.ssm.state_scale, mixer.ssm.state_group = scales.state_scale, scales.state_group


def nearest(weight: Tensor, format: WeightFormat, scale: str = "absmax") -> QuantizedWeight:
    """Round to nearest with the scales of least maximum error ("absmax") or least squared error ("mse")."""
    choose = mse_scale if scale == "mse" else absmax_scale
    return round_to_nearest(weight, format, scale=choose(weight, format))
