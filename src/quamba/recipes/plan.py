"""A recipe applied to one model's sizes: every decision made, every impossibility refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from quamba.errors import QuambaError
from quamba.formats import hadamard
from quamba.formats.activation import Overflow, Rounding
from quamba.formats.weight import WeightFormat
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.recipes.recipe import HeadGroups, Precision, Recipe


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Formats of one block.

    weights          a projection's name to its format; absent means float
    int8_parameters  A_log, D, conv bias and Mamba1's dt_bias are int8
    folds_x_scale    the columns of Mamba1's x_proj contain the scales of its input codes
    rounding, overflow  as in the recipe
    """

    label: str
    weights: dict[str, WeightFormat]
    conv: WeightFormat | None
    int8_activations: bool
    state: str
    int8_parameters: bool = False
    folds_x_scale: bool = False
    rounding: Rounding = "half_even"
    overflow: Overflow = "saturate"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to a model of ``config``. Built by ``resolve`` only."""

    config: ModelConfig
    recipe: Recipe
    blocks: tuple[BlockPlan, ...]
    embedding: WeightFormat | None
    head: WeightFormat | None
    int8_head_input: bool
    rotate: bool
    group_heads: HeadGroups | None
    alpha: float

    @property
    def needs_activation_scales(self) -> bool:
        return self.int8_head_input or any(b.int8_activations or b.state == "int8" for b in self.blocks)

    @property
    def needs_calibration(self) -> bool:
        return self.needs_activation_scales or self.recipe.solver.kind == "gptq"

    @property
    def folds_norms(self) -> bool:
        """Whether norm weights move into the projections (any quantized projection wants it)."""
        return self.rotate or self.head is not None or any(b.weights for b in self.blocks)

    @property
    def scales_each_state_index(self) -> bool:
        """Whether int8 SSM states have one scale for each of the d_state indices."""
        return self.recipe.activation_scales == "channel" or self.group_heads is not None

    @property
    def state_groups(self) -> int:
        """Channel groups with scales of their own for the SSM state."""
        if self.group_heads is None or not isinstance(self.config, Mamba2Config):
            return 1
        return self.config.ngroups * self.group_heads.heads * self.group_heads.channels

    @property
    def is_float(self) -> bool:
        return not self.folds_norms and self.embedding is None


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features) of a block's projections, in the order data meets them."""
    if isinstance(config, MambaConfig):
        return {
            "in_proj": (2 * config.d_inner, config.d_model),
            "x_proj": (config.dt_rank + 2 * config.d_state, config.d_inner),
            "dt_proj": (config.d_inner, config.dt_rank),
            "out_proj": (config.d_model, config.d_inner),
        }
    return {
        "in_proj": (config.d_inner + config.conv_dim + config.nheads, config.d_model),
        "out_proj": (config.d_model, config.d_inner),
    }


def output_parts(config: ModelConfig, leaf: str) -> tuple[int, ...] | None:
    """Channels of z, x, B, C, dt (in_proj) or x, B, C (conv1d) where Mamba2 scales them apart; else None."""
    if isinstance(config, MambaConfig):
        return None
    d_bc = config.ngroups * config.d_state
    parts = {
        "in_proj": (config.d_inner, config.d_inner, d_bc, d_bc, config.nheads),
        "conv1d": (config.d_inner, d_bc, d_bc),
    }
    return parts.get(leaf)


def resolve(recipe: Recipe, config: ModelConfig) -> Plan:
    """Decide everything, or refuse with what would have worked. No weight is read before this passes."""
    precisions = [recipe.blocks] * config.n_layer
    for override in recipe.overrides:
        for i in override.blocks:
            if i >= config.n_layer:
                raise QuambaError(
                    f"An override names block {i}, but the model has {config.n_layer} blocks,"
                    f" 0 to {config.n_layer - 1}."
                )
            precisions[i] = override.precision
    quantizes = recipe.head.weights != "float" or any(p.weights != "float" for p in precisions)
    if quantizes and not config.rms_norm:
        raise QuambaError(
            "A model with LayerNorm (rms_norm false) cannot be quantized; only RMSNorm models can."
        )
    if recipe.rotate and quantizes:
        for what, size in (("d_model", config.d_model), ("d_inner", config.d_inner)):
            _check_rotation(what, size)
    int8_activations = any(p.activations == "int8" for p in precisions)
    groups = None
    if isinstance(config, Mamba2Config) and int8_activations and recipe.group_heads is not None:
        groups = recipe.group_heads
        _check_groups(groups, config)
    return Plan(
        config=config,
        recipe=recipe,
        blocks=tuple(_block_plan(recipe, p, config) for p in precisions),
        embedding=_table_format(recipe, config),
        head=_weight_format(
            recipe, recipe.head.weights, "lm_head", config, recipe.head.activations == "int8"
        ),
        int8_head_input=recipe.head.activations == "int8",
        rotate=recipe.rotate and quantizes,
        group_heads=groups,
        alpha=recipe.replace(group_heads=groups).alpha,
    )


def _block_plan(recipe: Recipe, precision: Precision, config: ModelConfig) -> BlockPlan:
    int8 = precision.activations == "int8"
    weights = {}
    for name in projections(config):
        bits = recipe.dt_proj if name == "dt_proj" and precision.weights == "int4" else precision.weights
        format = _weight_format(recipe, bits, name, config, int8)
        if format is not None:
            weights[name] = format
    if int8 and precision.weights != "float" and weights.keys() != projections(config).keys():
        raise QuambaError(
            "dt_proj is float in blocks with int8 activations, which has no kernel;"
            " expected dt_proj 'int8' or 'int4'."
        )
    # Conv weights are tiny; they are integers where they meet integers.
    return BlockPlan(
        label=precision.label,
        weights=weights,
        conv=_placed(WeightFormat(8, recipe.conv_scales), "conv1d", config, int8) if int8 else None,
        int8_activations=int8,
        state=precision.state,
        int8_parameters=int8 and recipe.parameters == "int8",
        folds_x_scale=int8 and recipe.activation_scales == "channel" and isinstance(config, MambaConfig),
        rounding=recipe.rounding,
        overflow=recipe.overflow,
    )


def _weight_format(
    recipe: Recipe, bits: str, name: str, config: ModelConfig, int8_activations: bool
) -> WeightFormat | None:
    if bits == "float":
        return None
    format = _placed(recipe.int4 if bits == "int4" else recipe.int8, name, config, int8_activations)
    in_features = config.d_model if name == "lm_head" else projections(config)[name][1]
    return _fitting(format, name, in_features)


def _placed(format: WeightFormat, leaf: str, config: ModelConfig, int8_activations: bool) -> WeightFormat:
    """What "split" and "two_level" mean at one leaf: they fall back to "tensor" and "group" where the output
    has no parts, and where there is no product of integers."""
    if format.granularity == "split":
        parts = output_parts(config, leaf)
        return dataclasses.replace(format, granularity="tensor" if parts is None else "split", parts=parts)
    return format if int8_activations else format.one_level


def _fitting(format: WeightFormat, name: str, in_features: int) -> WeightFormat:
    """The format, if a matrix of so many columns can have it."""
    try:
        format.scale_shape((1, in_features))
        format.data_shape((1, in_features))
    except QuambaError as error:
        raise QuambaError(f"{name}: {error}") from None
    return format


def _table_format(recipe: Recipe, config: ModelConfig) -> WeightFormat | None:
    if recipe.embedding == "float":
        return None
    format = recipe.embedding_int4 if recipe.embedding == "int4" else recipe.embedding_int8
    return _fitting(format, "embedding", config.d_model)


def _check_rotation(what: str, size: int) -> None:
    try:
        hadamard.hadamard_factors(size)
    except QuambaError as error:
        raise QuambaError(
            f"{what} {size} cannot be rotated: {error} Or use a recipe with rotate = false."
        ) from None


def _check_groups(groups: HeadGroups, config: Mamba2Config) -> None:
    heads = config.nheads // config.ngroups
    for what, asked, available, where in (
        ("heads", groups.heads, heads, "an SSD group"),
        ("channels", groups.channels, config.headdim, "a head"),
    ):
        if not 1 <= asked <= available:
            raise QuambaError(
                f"group_heads asks for {asked} groups of {what}, but there are {available} in {where};"
                f" choose 1 to {available}."
            )
