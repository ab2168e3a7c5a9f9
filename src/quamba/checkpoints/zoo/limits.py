"""What the published format, and the code that reads it, can hold of the plans that there are."""

from __future__ import annotations

import math
from typing import Any

from quamba.checkpoints.zoo.config import HYBRID_LABELS, LABELS, ZooConfig
from quamba.checkpoints.zoo.layout import GROUP_SIZE, GROUPS
from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.recipes.plan import BlockPlan, Plan, projections

#: Switches of the models that the published code passes over or has no place for, as they must be.
_SWITCHES: dict[str, Any] = {
    "rms_norm": True,
    "bias": False,
    "conv_bias": True,
    "norm_eps": 1e-5,
    "bcdt_rms_eps": None,
    "D_has_hdim": False,
    "norm_before_gate": False,
    "dt_limit": (0.0, math.inf),
}
#: Sizes for which the published rotation kernels launch anything, m * 2^k.
_ROTATIONS = sorted(
    [2**k for k in range(3, 16)] + [m * 2**k for m in (12, 40) for k in (2, *range(4, 11))],
)
#: Widths that the published kernels multiply with.
_INT8_COLUMNS, _ONE_ROW_COLUMNS = 16, 32
#: Width of int8 convolutions, and what divides their channels of x and those of B in Mamba2.
_CONV_WIDTH, _CONV_CHANNELS = 4, 128
_EMBEDDING_COLUMNS = {"int8": 16, "int4": 32}
_PLAIN_INT8 = WeightFormat(8, "tensor")


def zoo_config_of(plan: Plan) -> ZooConfig:
    """The published ``config.json`` that says what the plan does.

    Raises QuambaError, in one sentence with the nearest choice, where the format has no place for it or
    where the published code is known to compute something else.
    """
    _check_switches(plan.config)
    layers = tuple(block.label for block in plan.blocks)
    hybrid = _check_labels(layers, plan.config)
    recipe = f"quantize with recipe 'zoo-{'w4a8' if hybrid else layers[0].lower()}'"
    config = ZooConfig(
        model=plan.config,
        layers=layers,
        hybrid=hybrid,
        embedding=_embedding(plan, recipe),
        head=_head(plan),
    )
    if not plan.rotate:
        raise QuambaError(f"The model is not rotated, as every published model is; {recipe}.")
    for i, block in enumerate(plan.blocks):
        _check_block(f"Block {i}", block, plan.config, recipe)
    _check_scales(plan, recipe)
    _check_ends(config, recipe)
    _check_sizes(config)
    return config


def _check_switches(model: ModelConfig) -> None:
    for name, expected in _SWITCHES.items():
        value = getattr(model, name, expected)
        if value != expected:
            raise QuambaError(
                f"The model has {name} {value}, expected {expected} in the published format; keep this model"
                " in our own format."
            )


def _check_labels(layers: tuple[str, ...], model: ModelConfig) -> bool:
    """Whether blocks differ, in the one way that is allowed."""
    labels = sorted(set(layers))
    if len(labels) == 1 and labels[0] in LABELS:
        return False
    if set(labels) == set(HYBRID_LABELS) and model.family == "mamba2":
        return True
    choices = ", ".join(LABELS)
    mixed = ", or a mix of W4A8 and W4A16" if model.family == "mamba2" else ""
    raise QuambaError(
        f"The model has {' and '.join(labels)} blocks, expected all blocks in one of {choices}{mixed};"
        " quantize with recipe 'zoo-w8a8', 'zoo-w4a8' or 'zoo-w4a16'."
    )


def _embedding(plan: Plan, recipe: str) -> str:
    format = plan.embedding
    if format is None:
        return "float"
    expected = WeightFormat(format.bits, "channel", scale_bits=16)
    if not _same(format, expected):
        raise QuambaError(f"The embedding has {_scales(format)}, expected {_scales(expected)}; {recipe}.")
    return f"int{format.bits}"


def _head(plan: Plan) -> str:
    if plan.head is None:
        return "FP16"
    return f"W{plan.head.bits}A{8 if plan.int8_head_input else 16}"


def _check_block(name: str, block: BlockPlan, model: ModelConfig, recipe: str) -> None:
    integers = block.int8_activations
    state = "int8" if integers else "fp16"
    if block.state != state:
        raise QuambaError(
            f"{name} caches its SSM state in {block.state}, expected {state} in {block.label} blocks of the"
            f" published format; {recipe}."
        )
    if integers and not block.int8_parameters:
        raise QuambaError(
            f"{name} has A_log, D and biases in floats, expected int8 in {block.label} blocks of the"
            f" published format; {recipe}."
        )
    if block.conv is not None and block.conv.granularity == "channel":
        raise QuambaError(
            f"The convolution of {name.lower()} has a scale a channel, expected one for each of x, B and C;"
            f" {recipe}."
        )
    for leaf in projections(model):
        _check_weight(f"{leaf} of {name.lower()}", leaf, block.weights.get(leaf), block, model, recipe)


def _check_weight(
    what: str, leaf: str, format: WeightFormat | None, block: BlockPlan, model: ModelConfig, recipe: str
) -> None:
    if leaf == "dt_proj":
        expected = _PLAIN_INT8 if block.int8_activations else None
    else:
        expected = _expected(block.label)
    columns_have_scales = leaf == "in_proj" and isinstance(model, Mamba2Config) and expected == _PLAIN_INT8
    if columns_have_scales and format is not None and format.granularity in ("channel", "split"):
        expected = WeightFormat(8, format.granularity)
    if not _same(format, expected):
        raise QuambaError(
            f"The weight of {what} has {_scales(format)}, expected {_scales(expected)}; {recipe}."
        )


def _expected(label: str) -> WeightFormat:
    if label == "W8A8":
        return _PLAIN_INT8
    return WeightFormat(4, "two_level" if label == "W4A8" else "group", GROUP_SIZE)


def _same(one: WeightFormat | None, other: WeightFormat | None) -> bool:
    """Equal but for fields that are written out in one and left to their default in the other."""
    if one is None or other is None:
        return one is other
    return (one.bits, one.granularity, one.group_size, one.scale_dtype) == (
        other.bits,
        other.granularity,
        other.group_size,
        other.scale_dtype,
    )


def _scales(format: WeightFormat | None) -> str:
    if format is None:
        return "floats"
    size = f" of {format.group_size}" if format.group_size else ""
    dtype = str(format.scale_dtype).removeprefix("torch.")
    return f"{format.bits} bits with {dtype} scales of granularity '{format.granularity}'{size}"


def _check_scales(plan: Plan, recipe: str) -> None:
    """What the recipe says of activation scales; the writer looks at the scales themselves."""
    if not any(block.int8_activations for block in plan.blocks):
        return
    if plan.recipe.activation_scales == "channel":
        raise QuambaError(
            "The model has activation scales of single channels, expected one for each of z, x, B, C and dt"
            f" (activation_scales 'tensor'); {recipe}."
        )
    groups = plan.group_heads
    if groups is not None and (groups.heads, groups.channels) != GROUPS:
        raise QuambaError(
            f"The model has {groups.heads} x {groups.channels} groups of heads and channels, expected"
            f" {GROUPS[0]} x {GROUPS[1]}; {recipe}."
        )


def _check_ends(config: ZooConfig, recipe: str) -> None:
    """The embedding and the head beside such blocks."""
    if config.hybrid:
        if (config.embedding, config.head) != ("int4", "W4A8"):
            raise QuambaError(
                f"The model has the embedding in {config.embedding} and the head in {config.head}, expected"
                f" int4 and W4A8 where blocks differ; {recipe}."
            )
    # The published code takes the class of the final norm from that of the blocks.
    elif config.head != "FP16" and config.head[-2:] != config.layers[0][-2:]:
        raise QuambaError(
            f"The head is in {config.head} behind {config.layers[0]} blocks, expected {config.layers[0]} or"
            f" a float head; {recipe}."
        )
    elif config.head not in (*LABELS, "FP16"):
        raise QuambaError(f"The head is in {config.head}, expected one of {', '.join(LABELS)}; {recipe}.")


def _check_sizes(config: ZooConfig) -> None:
    model = config.model
    for name in ("d_model", "d_inner"):
        size = getattr(model, name)
        if size not in _ROTATIONS:
            nearest = min(_ROTATIONS, key=lambda n: abs(n - size))
            raise QuambaError(
                f"{name} is {size}, which the published code does not rotate, expected 2^k, 12 * 2^k or"
                f" 40 * 2^k with a kernel such as {nearest}; keep this model in our own format."
            )
    if config.embedding != "float":
        _check_multiple(
            "d_model", model.d_model, _EMBEDDING_COLUMNS[config.embedding], "an integer embedding"
        )
    labels = {*config.layers, config.head}
    for name, users in (("d_model", labels), ("d_inner", set(config.layers))):
        if any(label.startswith("W4") for label in users):
            _check_four_bits(name, getattr(model, name))
    if "W8A8" in labels:
        wide = isinstance(model, Mamba2Config) and config.layers[0] == "W8A8"
        multiple = _ONE_ROW_COLUMNS if wide else _INT8_COLUMNS
        _check_multiple("d_model", model.d_model, multiple, "int8 weights")
        _check_multiple("d_inner", model.d_inner, _INT8_COLUMNS, "int8 weights")
    if any(label != "W4A16" for label in config.layers):
        _check_integer_mixer(model)


def _check_integer_mixer(model: ModelConfig) -> None:
    """Sizes of blocks with int8 activations."""
    if model.d_conv != _CONV_WIDTH:
        raise QuambaError(
            f"d_conv is {model.d_conv}, expected {_CONV_WIDTH} for int8 convolutions of the published code;"
            " keep this model in our own format."
        )
    if isinstance(model, MambaConfig):
        _check_multiple("dt_rank", model.dt_rank, _INT8_COLUMNS, "int8 weights")
        return
    for name, size in (("d_inner", model.d_inner), ("ngroups * d_state", model.ngroups * model.d_state)):
        _check_multiple(name, size, _CONV_CHANNELS, "int8 convolutions")


def _check_four_bits(name: str, size: int) -> None:
    # Matrices of one group of columns have another layout there, which no published file uses.
    if size <= GROUP_SIZE:
        raise QuambaError(
            f"{name} is {size}, expected more than {GROUP_SIZE} for 4-bit weights of the published format;"
            " quantize with recipe 'zoo-w8a8'."
        )
    _check_multiple(name, size, GROUP_SIZE, "4-bit weights")


def _check_multiple(name: str, size: int, multiple: int, what: str) -> None:
    if size % multiple:
        raise QuambaError(
            f"{name} is {size}, expected a multiple of {multiple} for {what} of the published format; keep"
            " this model in our own format."
        )
