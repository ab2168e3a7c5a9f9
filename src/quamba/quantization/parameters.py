"""Small parameters, and weights that stay float, in the numbers that the recipe stores them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    for i, block in enumerate(model.blocks):
        round_block(block, plan, i)
    if plan.recipe.parameters != "float32":
        later = _weights_to_quantize(plan)
        for name, parameter in model.named_parameters():
            if name not in later and not name.startswith("backbone.layers."):
                parameter.data = round_to_float16(name, parameter)


def round_block(block: Block, plan: Plan, i: int) -> None:
    """``round_parameters`` for block i."""
    if plan.recipe.parameters == "float32":
        return
    formats = plan.blocks[i]
    if formats.int8_parameters:
        _round_to_int8(block, formats)
    later = _weights_to_quantize(plan)
    for name, parameter in block.named_parameters(prefix=f"backbone.layers.{i}"):
        if name not in later:
            parameter.data = round_to_float16(name, parameter)


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


def round_to_float16(name: str, parameter: Tensor) -> Tensor:
    """The numbers that float16 has, in the dtype they came in."""
    rounded = parameter.detach().to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise QuambaError(
            f"'{name}' holds {float(parameter.detach().abs().max()):.3g}, more than float16 can; use a recipe"
            " with parameters = 'float32'."
        )
    return rounded.to(parameter.dtype)
