"""Every switch of the two families once, as tiny configs; calibration text and recipes for them."""

from __future__ import annotations

import torch
from tiny_models import tiny_config

from quamba.calibration.data import CalibrationSet, CalibrationSpec
from quamba.models.config import ModelConfig
from quamba.recipes.recipe import HeadGroups, Precision, Recipe, Solver, load_recipe

RMS_VARIANTS = {
    "mamba": tiny_config("mamba"),
    "mamba-bias-untied": tiny_config("mamba", bias=True, conv_bias=False, tie_embeddings=False),
    "mamba-narrow": tiny_config("mamba", d_conv=2, expand=1, d_state=5, dt_rank=1, n_layer=1),
    "mamba-no-fp32-residual": tiny_config("mamba", residual_in_fp32=False),
    "falcon": tiny_config("mamba", bcdt_rms_eps=1e-6, conv_bias=False),
    "mamba2": tiny_config("mamba2"),
    "mamba2-bias-untied": tiny_config("mamba2", bias=True, conv_bias=False, tie_embeddings=False),
    "mamba2-groups2": tiny_config("mamba2", ngroups=2, headdim=4),
    "mamba2-groups8": tiny_config("mamba2", ngroups=8, d_conv=3, chunk_size=5),
    "mamba2-D-has-hdim": tiny_config("mamba2", D_has_hdim=True, residual_in_fp32=False),
    "mamba2-norm-first": tiny_config("mamba2", norm_before_gate=True, ngroups=2),
    "mamba2-dt-limit": tiny_config("mamba2", dt_limit=(0.05, 0.3)),
}
VARIANTS = {
    **RMS_VARIANTS,
    "mamba-layer-norm": tiny_config("mamba", rms_norm=False),
    "mamba2-layer-norm": tiny_config("mamba2", rms_norm=False),
}


def random_ids(config: ModelConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def calibration_set(
    config: ModelConfig, *, num: int = 10, seqlen: int = 40, batch_size: int = 4, ragged: bool = True
) -> CalibrationSet:
    """Random tokens; with ``ragged`` some sequences are shorter, so that batches are padded."""
    lengths = [seqlen - (3 * i if ragged and i % 3 == 0 else 0) for i in range(num)]
    sequences = [random_ids(config, length, seed=100 + i) for i, length in enumerate(lengths)]
    spec = CalibrationSpec(num=num, seqlen=seqlen, batch_size=batch_size)
    return CalibrationSet(sequences, spec, "random tokens", "0" * 64)


def fitting_groups(config: ModelConfig) -> HeadGroups | None:
    """Head groups as in the shipped recipes, as far as a tiny model has heads and channels for them."""
    if config.family == "mamba":
        return None
    return HeadGroups(
        heads=min(4, config.nheads // config.ngroups),
        channels=min(4, config.headdim),
    )


def fitting(recipe: Recipe, config: ModelConfig) -> Recipe:
    return recipe.replace(group_heads=fitting_groups(config)) if recipe.group_heads else recipe


def shipped(name: str, config: ModelConfig, **changes: object) -> Recipe:
    """A shipped recipe whose head groups fit a tiny model."""
    return fitting(load_recipe(name), config).replace(**changes)


def with_state(recipe: Recipe, state: str) -> Recipe:
    """The recipe with this SSM state in its blocks, where a test is about states of that dtype."""
    blocks = Precision(weights=recipe.blocks.weights, activations=recipe.blocks.activations, state=state)
    return recipe.replace(blocks=blocks)


def rounded(recipe: Recipe) -> Recipe:
    """The same formats without GPTQ, where a test is not about the solver."""
    return recipe.replace(solver=Solver(kind="rtn"))
