"""Parameters in the numbers that a recipe stores them in."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from variants import RMS_VARIANTS, calibration_set, rounded, shipped

from quamba.errors import QuambaError
from quamba.formats.parameter import QuantizedParameter
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.parameters import round_parameters
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Override, Precision, Recipe

LOST = 1.00037  # float32 that float16 cannot hold


def prepared(config: ModelConfig, recipe: Recipe) -> tuple[MambaLM, dict[str, Tensor], Plan]:
    """A model after ``round_parameters``, and the tensors that it had before."""
    model, plan = tiny_model(config), resolve(recipe, config)
    model.untie()
    for parameter in model.parameters():
        parameter.data *= LOST
    before = {name: tensor.clone() for name, tensor in model.named_tensors().items()}
    round_parameters(model, plan)
    return model, before, plan


def kinds(model: MambaLM, before: dict[str, Tensor]) -> dict[str, set[str]]:
    """Names of what is "same", "half" (rounded to float16, its dtype kept) and "int8"; block 1 is "other"."""
    found: dict[str, set[str]] = {"same": set(), "half": set(), "int8": set()}
    after = model.named_tensors()
    for name, value in before.items():
        if f"{name}.data" in after:
            kind = "int8"
        elif torch.equal(after[name], value):
            kind = "same"
        else:
            assert torch.equal(after[name], value.half().float()), name
            assert after[name].dtype == value.dtype
            kind = "half"
        found[kind].add(name.replace("backbone.layers.0.", "").replace("backbone.layers.1.", "other "))
    return found


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", "quamba1-w8a8"])
def test_float32_parameters_stay(variant: str, recipe: str) -> None:
    config = RMS_VARIANTS[variant]
    model, before, _ = prepared(config, shipped(recipe, config))
    found = kinds(model, before)
    assert (found["half"], found["int8"]) == (set(), set())


MATRICES = {
    "mamba": {"mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight"},
    "mamba2": {"mixer.in_proj.weight", "mixer.out_proj.weight"},
}
TABLES = {"backbone.embedding.weight", "lm_head.weight"}
NORMS = {"norm.weight", "backbone.norm_f.weight"}


def in_both_blocks(names: set[str]) -> set[str]:
    return names | {f"other {name}" for name in names if not name.startswith(("backbone", "lm_head"))}


@pytest.mark.parametrize("recipe", ["zoo-w8a8", "zoo-w4a8"])
@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_int8_parameters(variant: str, recipe: str) -> None:
    config = RMS_VARIANTS[variant]
    model, before, _ = prepared(config, shipped(recipe, config))
    found = kinds(model, before)
    int8 = {"mixer.ssm.A_log", "mixer.ssm.D", "mixer.conv1d.bias"}
    half = NORMS | ({"mixer.norm.weight", "mixer.ssm.dt_bias"} if variant == "mamba2" else set())
    int8 |= {"mixer.ssm.dt_bias"} if variant == "mamba" else set()
    assert found["int8"] == in_both_blocks(int8)
    assert found["half"] == in_both_blocks(half)
    assert found["same"] == in_both_blocks(MATRICES[variant] | {"mixer.conv1d.weight"}) | TABLES


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_float16_parameters(variant: str) -> None:
    config = RMS_VARIANTS[variant]
    model, before, _ = prepared(config, shipped("zoo-w4a16", config, embedding="float", head=Precision()))
    found = kinds(model, before)
    assert found["int8"] == set()
    stay_float = {"mixer.dt_proj.weight"}
    assert found["same"] == in_both_blocks(MATRICES[variant] - stay_float)
    small = {
        "mixer.ssm.A_log",
        "mixer.ssm.D",
        "mixer.ssm.dt_bias",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
    }
    small |= stay_float if variant == "mamba" else {"mixer.norm.weight"}
    assert found["half"] == in_both_blocks(small | NORMS) | TABLES


def test_blocks_with_float_activations_have_float_parameters() -> None:
    config = RMS_VARIANTS["mamba2"]
    overrides = (Override(blocks=(1,), precision=Precision(weights="int4", activations="float")),)
    model, before, _ = prepared(config, shipped("zoo-w4a8", config, overrides=overrides))
    found = kinds(model, before)
    assert found["int8"] == {"mixer.ssm.A_log", "mixer.ssm.D", "mixer.conv1d.bias"}
    assert {"other mixer.ssm.A_log", "other mixer.conv1d.weight", "other mixer.conv1d.bias"} <= found["half"]
    assert {"other mixer.in_proj.weight", "mixer.conv1d.weight"} <= found["same"]


@pytest.mark.parametrize(("variant", "parts"), [("mamba", None), ("mamba2", (64, 16, 16))])
def test_int8_codes_are_those_of_the_unrounded_values(variant: str, parts: tuple[int, ...] | None) -> None:
    config = RMS_VARIANTS[variant]
    model, before, plan = prepared(config, shipped("zoo-w8a8", config))
    assert plan.blocks[0].conv is not None and plan.blocks[0].conv.parts == parts
    for i, block in enumerate(model.blocks):
        names = {"ssm.A_log": None, "ssm.D": None, "conv1d.bias": parts}
        for name, split in names.items():
            stored = block.mixer.get_submodule(name)
            assert isinstance(stored, QuantizedParameter)
            expected = QuantizedParameter.from_float(before[f"backbone.layers.{i}.mixer.{name}"], split)
            assert torch.equal(stored.data, expected.data)
            assert torch.equal(stored.scale, expected.scale)


def test_a_convolution_without_bias_has_none() -> None:
    config = RMS_VARIANTS["mamba2-bias-untied"]
    model, _, _ = prepared(config, shipped("zoo-w8a8", config))
    assert model.blocks[0].mixer.conv1d.bias is None


def test_a_parameter_beyond_float16_is_refused() -> None:
    config = RMS_VARIANTS["mamba2"]
    model = tiny_model(config)
    model.blocks[1].mixer.ssm.dt_bias.data[2] = -7e4
    with pytest.raises(
        QuambaError, match=r"'backbone\.layers\.1\.mixer\.ssm\.dt_bias' holds 7e\+04, more than"
    ):
        round_parameters(model, resolve(shipped("zoo-w8a8", config), config))


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_scales_are_those_of_the_rounded_parameters(variant: str) -> None:
    """Calibration watches the model that has them."""
    config = RMS_VARIANTS[variant]
    scales = []
    for parameters in ("float32", "int8"):
        recipe = rounded(shipped("zoo-w8a8", config, parameters=parameters))
        model, _, _ = quantize_model(tiny_model(config), recipe, calibration_set(config))
        scales.append(model.blocks[0].mixer.rotate.out_scale)
    assert not torch.equal(scales[0], scales[1])
    assert torch.allclose(scales[0], scales[1], rtol=0.05)
