"""A plan as a module tree: every leaf with its formats, every tensor with its shape and dtype, no values.

``quantization/`` fills such a tree from a float model, ``checkpoints/`` from a folder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.formats.parameter import QuantizedParameter
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.models.lm import Block, MambaLM
from quamba.models.mamba1 import MambaMixer
from quamba.recipes.plan import BlockPlan, Plan, projections
from quamba.recipes.sites import SCALAR_SITES, block_segments

STATE_DTYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}


def set_flags(block: Block, plan: BlockPlan) -> None:
    """What a block's leaves know of their formats besides tensors."""
    mixer = block.mixer
    mixer.ssm.state_dtype = STATE_DTYPES[plan.state]
    mixer.conv1d.rounding = mixer.rotate.rounding = plan.rounding
    mixer.rotate.overflow = plan.overflow
    if plan.int8_activations:
        mixer.conv1d.state_dtype = torch.int8
    if isinstance(mixer, MambaMixer):
        mixer.x_proj.input_scale_folded = plan.folds_x_scale


def int8_parameters(block: Block) -> list[tuple[nn.Module, str]]:
    """The module and name of each parameter that ``BlockPlan.int8_parameters`` is about."""
    mixer = block.mixer
    found: list[tuple[nn.Module, str]] = [(mixer.ssm, "A_log"), (mixer.ssm, "D")]
    if isinstance(mixer, MambaMixer):
        found.append((mixer.ssm, "dt_bias"))
    if mixer.conv1d.bias is not None:
        found.append((mixer.conv1d, "bias"))
    return found


def set_parameter(module: nn.Module, name: str, value: QuantizedParameter) -> None:
    """Put int8 where a float parameter was."""
    delattr(module, name)  # a module cannot be assigned over a parameter
    setattr(module, name, value)


def skeleton(plan: Plan) -> MambaLM:
    """The model of ``plan`` on the meta device."""
    with torch.device("meta"):
        model = MambaLM(plan.config).eval()
        if plan.folds_norms or plan.embedding is not None:
            model.untie()
        for i, block in enumerate(model.blocks):
            _shape_block(block, plan, i)
        if plan.folds_norms:
            model.backbone.norm_f.weight = None
        if plan.int8_head_input:
            model.backbone.norm_f.out_scale = _scale()
        if plan.embedding is not None:
            model.backbone.embedding.set_weight(_empty_like(model.backbone.embedding.weight, plan.embedding))
        if plan.head is not None:
            model.lm_head.set_weight(_empty_like(model.lm_head.weight, plan.head))
    return model


def _shape_block(block: Block, plan: Plan, i: int) -> None:
    config, formats = plan.config, plan.blocks[i]
    set_flags(block, formats)
    mixer = block.mixer
    mixer.rotate.enabled = plan.rotate
    if plan.folds_norms:
        block.norm.weight = None
    for name, shape in projections(config).items():
        if name in formats.weights:
            getattr(mixer, name).set_weight(QuantizedWeight.empty(shape, formats.weights[name]))
    if formats.conv is not None:
        mixer.conv1d.set_weight(_empty_like(mixer.conv1d.weight, formats.conv))
    if formats.int8_parameters:
        for module, name in int8_parameters(block):
            shape = getattr(module, name).shape
            split = name == "bias" and formats.conv is not None and formats.conv.parts is not None
            set_parameter(module, name, QuantizedParameter.empty(shape, per_channel=split))
    if formats.int8_activations:
        with torch.device("cpu"):  # torch.arange on meta imports sympy: half a second of every start
            outputs = block_segments(plan, None)
        for leaf, segments in outputs.items():
            size = sum(len(s.groups) for s in segments)
            block.get_submodule(leaf).out_scale = _scale() if leaf in SCALAR_SITES else _scale(size)
    if formats.state == "int8":
        states = config.d_state if plan.scales_each_state_index else 1
        mixer.ssm.state_scale = _scale(plan.state_groups, states)
        if plan.group_heads is not None:
            mixer.ssm.state_group = torch.empty(config.d_inner, dtype=torch.int32)


def _scale(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _empty_like(weight: nn.Parameter | QuantizedWeight, format: WeightFormat) -> QuantizedWeight:
    rows, columns = weight.shape
    return QuantizedWeight.empty((rows, columns), format)
