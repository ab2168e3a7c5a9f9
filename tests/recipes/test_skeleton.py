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

FLAGS = ("input_scale_folded", "enabled", "state_dtype", "rounding", "overflow")


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    w8a8 = with_state(shipped("w8a8", config), "int8")
    return {
        **{name: rounded(shipped(name, config)) for name in ("w8a8", "w4a8", "w4a16", "quamba1-w8a8")},
        **{f"zoo-{name}": rounded(shipped(f"zoo-{name}", config)) for name in ("w8a8", "w4a8", "w4a16")},
        "w8a8-int8-state": w8a8,
        "w4a8-int8-state": with_state(rounded(shipped("w4a8", config)), "int8"),
        "float": Recipe(name="float", blocks=Precision()),
        "embedding-only": Recipe(name="table", blocks=Precision(), embedding="int8"),
        "head-only": Recipe(name="head", blocks=Precision(), head=Precision(weights="int4")),
        "int8-state-of-floats": Recipe(name="state", blocks=Precision(state="int8")),
        "zoo-mixed": rounded(shipped("zoo-w4a8", config)).replace(
            overflow="wrap",
            overrides=(Override(blocks=(1,), precision=Precision(weights="int4", activations="float")),),
        ),
        "float16-parameters": w8a8.replace(parameters="float16"),
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


BLOCK = "backbone.layers.0.mixer"


def zoo_keys(name: str, recipe: str) -> dict[str, tuple[list[int], torch.dtype]]:
    """What of a block is stored otherwise than in w8a8, w4a8 and w4a16."""
    config = RMS_VARIANTS[name]
    tensors = skeleton(resolve(shipped(recipe, config), config)).named_tensors()
    return {
        key.removeprefix(f"{BLOCK}."): (list(t.shape), t.dtype)
        for key, t in tensors.items()
        if key.startswith(f"{BLOCK}.") and not key.endswith("out_scale")
    }


MAMBA_SHAPES = {"in_proj": [128, 32], "x_proj": [20, 64], "dt_proj": [64, 4], "out_proj": [32, 64]}
MAMBA2_SHAPES = {"in_proj": [168, 32], "out_proj": [32, 64]}
INT8, UINT8, HALF, SINGLE = torch.int8, torch.uint8, torch.float16, torch.float32
PARAMETERS_MAMBA = {
    "conv1d.weight.data": ([64, 4], INT8),
    "conv1d.weight.scale": ([1, 1], SINGLE),
    "conv1d.bias.data": ([64], INT8),
    "conv1d.bias.scale": ([], SINGLE),
    "ssm.A_log.data": ([64, 8], INT8),
    "ssm.A_log.scale": ([], SINGLE),
    "ssm.D.data": ([64], INT8),
    "ssm.D.scale": ([], SINGLE),
    "ssm.dt_bias.data": ([64], INT8),
    "ssm.dt_bias.scale": ([], SINGLE),
    "ssm.state_scale": ([1, 1], SINGLE),
}
PARAMETERS_MAMBA2 = {
    "conv1d.weight.data": ([96, 4], INT8),
    "conv1d.weight.scale": ([96, 1], SINGLE),
    "conv1d.bias.data": ([96], INT8),
    "conv1d.bias.scale": ([96], SINGLE),
    "ssm.A_log.data": ([8], INT8),
    "ssm.A_log.scale": ([], SINGLE),
    "ssm.D.data": ([8], INT8),
    "ssm.D.scale": ([], SINGLE),
    "ssm.dt_bias": ([8], SINGLE),
    "ssm.state_scale": ([16, 16], SINGLE),
    "ssm.state_group": ([64], torch.int32),
    "norm.weight": ([64], SINGLE),
}
KEYS = {
    ("mamba", "zoo-w8a8"): {
        **PARAMETERS_MAMBA,
        **{f"{n}.weight.data": (shape, INT8) for n, shape in MAMBA_SHAPES.items()},
        **{f"{n}.weight.scale": ([1, 1], SINGLE) for n in MAMBA_SHAPES},
    },
    ("mamba", "zoo-w4a8"): {
        **PARAMETERS_MAMBA,
        **{f"{n}.weight.data": ([s[0], s[1] // 2], UINT8) for n, s in MAMBA_SHAPES.items() if n != "dt_proj"},
        **{f"{n}.weight.scale": ([s[0], 1], HALF) for n, s in MAMBA_SHAPES.items() if n != "dt_proj"},
        **{
            f"{n}.weight.channel_scale": ([s[0], 1], SINGLE)
            for n, s in MAMBA_SHAPES.items()
            if n != "dt_proj"
        },
        "dt_proj.weight.data": ([64, 4], INT8),
        "dt_proj.weight.scale": ([1, 1], SINGLE),
    },
    ("mamba", "zoo-w4a16"): {
        **{f"{n}.weight.data": ([s[0], s[1] // 2], UINT8) for n, s in MAMBA_SHAPES.items() if n != "dt_proj"},
        **{f"{n}.weight.scale": ([s[0], 1], HALF) for n, s in MAMBA_SHAPES.items() if n != "dt_proj"},
        "dt_proj.weight": ([64, 4], SINGLE),
        "conv1d.weight": ([64, 4], SINGLE),
        "conv1d.bias": ([64], SINGLE),
        "ssm.A_log": ([64, 8], SINGLE),
        "ssm.D": ([64], SINGLE),
        "ssm.dt_bias": ([64], SINGLE),
    },
    ("mamba2", "zoo-w8a8"): {
        **PARAMETERS_MAMBA2,
        "in_proj.weight.data": ([168, 32], INT8),
        "in_proj.weight.scale": ([168, 1], SINGLE),
        "out_proj.weight.data": ([32, 64], INT8),
        "out_proj.weight.scale": ([1, 1], SINGLE),
    },
    ("mamba2", "zoo-w4a8"): {
        **PARAMETERS_MAMBA2,
        **{f"{n}.weight.data": ([s[0], s[1] // 2], UINT8) for n, s in MAMBA2_SHAPES.items()},
        **{f"{n}.weight.scale": ([s[0], 1], HALF) for n, s in MAMBA2_SHAPES.items()},
        **{f"{n}.weight.channel_scale": ([s[0], 1], SINGLE) for n, s in MAMBA2_SHAPES.items()},
    },
    ("mamba2", "zoo-w4a16"): {
        **{f"{n}.weight.data": ([s[0], s[1] // 2], UINT8) for n, s in MAMBA2_SHAPES.items()},
        **{f"{n}.weight.scale": ([s[0], 1], HALF) for n, s in MAMBA2_SHAPES.items()},
        "conv1d.weight": ([96, 4], SINGLE),
        "conv1d.bias": ([96], SINGLE),
        "ssm.A_log": ([8], SINGLE),
        "ssm.D": ([8], SINGLE),
        "ssm.dt_bias": ([8], SINGLE),
        "norm.weight": ([64], SINGLE),
    },
}


@pytest.mark.parametrize(("name", "recipe"), KEYS)
def test_tensors_of_a_block_in_the_zoo_recipes(name: str, recipe: str) -> None:
    assert zoo_keys(name, recipe) == KEYS[name, recipe]
