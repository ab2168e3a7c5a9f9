"""Small parameters, and weights that stay float, in the numbers that the recipe stores them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quamba.errors import QuambaError
from quamba.formats.parameter import QuantizedParameter
from quamba.models.lm import Block, MambaLM
from quamba.recipes.plan import BlockPlan, Plan
from quamba.recipes.skeleton import int8_parameters, set_parameter


def round_parameters(model: MambaLM, plan: Plan) -> None:
    """Bring a float model's parameters into the recipe's format; weights to be quantized stay as they are.

    In place. Comes after every rewrite of the model, and before calibration, so that scales are made from
    what the rounded parameters give. What is rounded to float16 keeps its dtype.
    Raises QuambaError for a parameter that float16 cannot hold.
    """
    if plan.recipe.parameters == "float32":
        return
    for block, formats in zip(model.blocks, plan.blocks, strict=True):
        if formats.int8_parameters:
            _round_to_int8(block, formats)
    later = _weights_to_quantize(plan)
    for name, parameter in model.named_parameters():
        if name not in later:
            parameter.data = _round_to_float16(name, parameter)


def _round_to_int8(block: Block, plan: BlockPlan) -> None:
    for module, name in int8_parameters(block):
        parts: Sequence[int] | None = None
        if name == "bias" and plan.conv is not None:
            parts = plan.conv.parts
        set_parameter(module, name, QuantizedParameter.from_float(getattr(module, name), parts))


def _weights_to_quantize(plan: Plan) -> set[str]:
    names = {
        f"backbone.layers.{i}.mixer.{name}.weight" for i, b in enumerate(plan.blocks) for name in b.weights
    }
    names |= {
        f"backbone.layers.{i}.mixer.conv1d.weight" for i, b in enumerate(plan.blocks) if b.conv is not None
    }
    if plan.embedding is not None:
        names.add("backbone.embedding.weight")
    if plan.head is not None:
        names.add("lm_head.weight")
    return names


def _round_to_float16(name: str, parameter: nn.Parameter) -> torch.Tensor:
    rounded = parameter.data.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise QuambaError(
            f"'{name}' holds {float(parameter.data.abs().max()):.3g}, more than float16 can; use a recipe"
            " with parameters = 'float32'."
        )
    return rounded.to(parameter.dtype)
