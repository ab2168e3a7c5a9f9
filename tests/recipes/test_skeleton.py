"""The empty tree has the very names, shapes, dtypes and flags of a quantized model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from variants import RMS_VARIANTS, calibration_set, random_ids, rounded, shipped, with_state

from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import Override, Precision, Recipe
from quamba.recipes.skeleton import skeleton

FLAGS = ("input_scale_folded", "enabled", "state_dtype")


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    w8a8 = with_state(shipped("w8a8", config), "int8")
    return {
        **{name: rounded(shipped(name, config)) for name in ("w8a8", "w4a8", "w4a16", "quamba1-w8a8")},
        "w8a8-int8-state": w8a8,
        "w4a8-int8-state": with_state(rounded(shipped("w4a8", config)), "int8"),
        "float": Recipe(name="float", blocks=Precision()),
        "embedding-only": Recipe(name="table", blocks=Precision(), embedding="int8"),
        "head-only": Recipe(name="head", blocks=Precision(), head=Precision(weights="int4")),
        "int8-state-of-floats": Recipe(name="state", blocks=Precision(state="int8")),
        "mixed": w8a8.replace(overrides=(Override(blocks=(0,), precision=Precision()),)),
        "unrotated": w8a8.replace(rotate=False, group_heads=None),
    }


def meta(model: MambaLM) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in model.named_tensors().items()}


def flags(model: MambaLM) -> dict[str, object]:
    return {
        f"{path}.{flag}": getattr(module, flag)
        for path, module in model.named_modules()
        for flag in FLAGS
        if hasattr(module, flag)
    }


@pytest.mark.parametrize("recipe", sorted(recipes(RMS_VARIANTS["mamba2"])))
@pytest.mark.parametrize("name", ["mamba", "mamba-bias-untied", "falcon", "mamba2", "mamba2-groups2"])
def test_skeleton_filled_is_the_model(name: str, recipe: str) -> None:
    config = RMS_VARIANTS[name]
    wanted = recipes(config)[recipe]
    model, plan, _ = quantize_model(tiny_model(config), wanted, calibration_set(config))
    empty = skeleton(resolve(wanted, config))
    assert plan == resolve(wanted, config)
    assert meta(empty) == meta(model)
    assert flags(empty) == flags(model)
    assert all(t.is_meta for t in empty.named_tensors().values())
    empty.load_tensors(model.named_tensors())
    ids = random_ids(config, 2, 11)
    assert torch.equal(empty(ids), model(ids))
    filled, original = empty.new_cache(2), model.new_cache(2)
    assert torch.equal(empty(ids, filled), model(ids, original))
    assert torch.equal(empty(ids[:, :1], filled), model(ids[:, :1], original))
