"""Networks of published sizes with random weights, for scripts that measure time. Run, it does nothing."""

from __future__ import annotations

import dataclasses

import torch

from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import Precision, Recipe, load_recipe
from quamba.recipes.skeleton import skeleton
from quamba.tuning import networks
from quamba.tuning.networks import compute_dtype, fill

__all__ = ["FLOAT", "MODELS", "PUBLISHED", "compute_dtype", "empty_network", "fill", "recipe"]

MODELS: dict[str, ModelConfig] = {
    **networks.PUBLISHED,
    "mamba-1.4b": MambaConfig(d_model=2048, n_layer=48, vocab_size=50280),
    "mamba2-780m": Mamba2Config(d_model=1536, n_layer=48, vocab_size=50288),
    "mamba2-1.3b": Mamba2Config(d_model=2048, n_layer=48, vocab_size=50288),
    "tiny": Mamba2Config(d_model=64, n_layer=2, vocab_size=256, d_state=16, headdim=16),
    "tiny-mamba": MambaConfig(d_model=64, n_layer=2, vocab_size=256),
}
PUBLISHED = list(networks.PUBLISHED)
FLOAT = "fp16"


def recipe(precision: str, state: str) -> Recipe:
    """A shipped recipe with SSM states of ``state``; "fp16" is a float model, its states always fp16."""
    if precision == FLOAT:
        return Recipe(name=FLOAT, blocks=Precision(), rotate=False)
    shipped = load_recipe(precision)
    return shipped.replace(blocks=dataclasses.replace(shipped.blocks, state=state))


def empty_network(config: ModelConfig, precision: str, state: str, floats: torch.dtype) -> MambaLM:
    """On the meta device."""
    return skeleton(resolve(recipe(precision, state), config)).set_compute_dtype(floats)
