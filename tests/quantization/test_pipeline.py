"""The whole job on tiny models: every precision, what is integer afterwards, and how much it may cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from rounding import sqnr_db
from tiny_models import tiny_config, tiny_model
from variants import RMS_VARIANTS, calibration_set, fitting_groups, random_ids, rounded, shipped, with_state

from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.modules.leaf import Leaf
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.plan import Plan
from quamba.recipes.recipe import Recipe, Solver, load_recipe, shipped_names
from quamba.recipes.report import Report


def run(config: ModelConfig, recipe: Recipe, **data: object) -> tuple[MambaLM, Plan, Report]:
    return quantize_model(tiny_model(config), recipe, calibration_set(config, **data))


def cost_db(model: MambaLM) -> float:
    """SQNR of the logits against those of the float model."""
    ids = random_ids(model.config, 8, 40, seed=5)
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    return sqnr_db(tiny_model(model.config)(ids), logits)


# What the logits of random two-layer models lose. Each floor is 2 dB below what was seen, at its lowest over
# rounding and GPTQ, with and without head groups; a scale that is off by a tenth, a state that is forgotten
# or a rotation that is not undone costs more.
FLOORS_DB = {
    ("mamba", "w8a8"): 33.9,
    ("mamba", "w4a8"): 16.1,
    ("mamba", "w4a16"): 16.2,
    ("falcon", "w8a8"): 27.6,
    ("falcon", "w4a8"): 12.2,
    ("falcon", "w4a16"): 12.7,
    ("mamba2", "w8a8"): 23.5,
    ("mamba2", "w4a8"): 9.9,
    ("mamba2", "w4a16"): 10.0,
    ("mamba2-groups2", "w8a8"): 21.6,
    ("mamba2-groups2", "w4a8"): 10.4,
    ("mamba2-groups2", "w4a16"): 10.5,
}


def combinations() -> list[tuple[str, str, str, bool]]:
    names = ("mamba", "falcon", "mamba2", "mamba2-groups2")
    cases = itertools.product(names, ("w8a8", "w4a8", "w4a16"), ("rtn", "gptq"), (False, True))
    return [c for c in cases if not c[3] or (c[0].startswith("mamba2") and c[1] != "w4a16")]


def combined(config: ModelConfig, precision: str, solver: str, grouped: bool) -> Recipe:
    """With int8 states behind int8 activations, so that their scales too are combined with all the rest."""
    groups = fitting_groups(config) if grouped else None
    recipe = load_recipe(precision).replace(solver=Solver(kind=solver), group_heads=groups)
    return with_state(recipe, "int8") if precision.endswith("a8") else recipe


@pytest.mark.parametrize(("name", "precision", "solver", "grouped"), combinations())
def test_every_combination(name: str, precision: str, solver: str, grouped: bool) -> None:
    config = RMS_VARIANTS[name]
    model, plan, report = run(config, combined(config, precision, solver, grouped))
    assert cost_db(model) > FLOORS_DB[name, precision]
    state_scales = [block.mixer.ssm.state_scale for block in model.blocks]
    assert all((scale is not None) == precision.endswith("a8") for scale in state_scales)
    assert (len(report.head_groups) == config.n_layer) == (plan.group_heads is not None) == grouped
    lines = {line["name"]: line for line in report.layers if line["name"] != "embedding"}
    per_block = (
        ["in_proj", "x_proj", "dt_proj", "out_proj"] if config.family == "mamba" else ["in_proj", "out_proj"]
    )
    assert list(lines) == [
        *(f"layers.{i}.mixer.{projection}" for i in range(config.n_layer) for projection in per_block),
        "lm_head",
    ]
    bits = int(precision[1])
    for projection, line in lines.items():
        assert line["bits"] == (8 if projection.endswith("dt_proj") else bits)
        assert ("relative_loss" in line) == (solver == "gptq")
        if solver == "gptq":
            assert 0 < line["relative_loss"] <= line["relative_loss_rtn"], projection


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("variant", ["mamba", "mamba-bias-untied", "mamba2-bias-untied", "mamba2-D-has-hdim"])
def test_shipped_recipes(name: str, variant: str) -> None:
    config = RMS_VARIANTS[variant]
    model, _, report = run(config, shipped(name, config))
    assert cost_db(model) > {"w8a8": 22.8, "quamba1-w8a8": 24.5}.get(name, 11.0)
    assert report.to_dict()["recipe"] == shipped(name, config).to_dict()
    assert report.calibration["fingerprint"] == calibration_set(config).fingerprint
    assert set(report.seconds) == {"head grouping", "activation scales", "embedding", "weights"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_the_given_model_stays_as_it_is(variant: str, recipe: str) -> None:
    config = RMS_VARIANTS[variant]
    model = tiny_model(config)
    tensors = {name: value.clone() for name, value in model.named_tensors().items()}
    ids = random_ids(config, 2, 9)
    expected = model(ids)
    quantize_model(model, shipped(recipe, config), calibration_set(config))
    assert all(torch.equal(value, tensors[name]) for name, value in model.named_tensors().items())
    assert model.tied
    assert not model.blocks[0].mixer.rotate.enabled
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("variant", ["mamba", "mamba2-groups2"])
@pytest.mark.parametrize(("recipe", "state"), [("w8a8", "int8"), ("w4a8", "int8"), ("w4a16", "fp16")])
def test_repeats_bit_for_bit(variant: str, recipe: str, state: str) -> None:
    config = RMS_VARIANTS[variant]
    wanted = with_state(shipped(recipe, config), state)
    (first, _, one), (second, _, two) = (run(config, wanted) for _ in range(2))
    again = second.named_tensors()
    assert all(torch.equal(value, again[name]) for name, value in first.named_tensors().items())
    assert (one.layers, one.head_groups) == (two.layers, two.head_groups)


@pytest.mark.parametrize("variant", ["mamba", "mamba2-groups2"])
@pytest.mark.parametrize("recipe", ["w8a8", "quamba1-w8a8"])
def test_batch_size_does_not_change_scales(variant: str, recipe: str) -> None:
    """Up to the order of float32 sums in the float model's products."""
    config = RMS_VARIANTS[variant]
    wanted = with_state(shipped(recipe, config), "int8")
    first, _, _ = run(config, wanted, batch_size=1)
    second, _, _ = run(config, wanted, batch_size=10)
    again = second.named_tensors()
    for name, value in first.named_tensors().items():
        if name.endswith("out_scale") or name.endswith("state_scale"):
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=0)
        if name.endswith("state_group"):
            assert torch.equal(again[name], value)


def seen_between_leaves(model: MambaLM, ids: torch.Tensor) -> dict[str, torch.dtype]:
    """Leaf of block 0, or norm_f, -> dtype of what it gives."""
    found: dict[str, torch.dtype] = {}
    modules = {
        **dict(model.blocks[0].named_modules()),
        "norm_f": model.backbone.norm_f,
        "lm_head": model.lm_head,
    }
    handles = []
    for path, module in modules.items():
        if isinstance(module, Leaf):

            def note(module: torch.nn.Module, args: object, output: object, path: str = path) -> None:
                x = output[0] if isinstance(output, tuple) and not isinstance(output, Quantized) else output
                found[path] = x.codes.dtype if isinstance(x, Quantized) else x.dtype

            handles.append(module.register_forward_hook(note))
    model(ids)
    for handle in handles:
        handle.remove()
    return found


INT8_LEAVES = {
    "mamba": {
        "norm",
        "mixer.in_proj",
        "mixer.conv1d",
        "mixer.x_proj",
        "mixer.dt_proj",
        "mixer.rotate",
        "norm_f",
    },
    "falcon": {
        "norm",
        "mixer.in_proj",
        "mixer.conv1d",
        "mixer.dt_norm",
        "mixer.B_norm",
        "mixer.C_norm",
        "mixer.dt_proj",
        "mixer.rotate",
        "norm_f",
    },
    "mamba2": {"norm", "mixer.in_proj", "mixer.conv1d", "mixer.rotate", "norm_f"},
}


@pytest.mark.parametrize("variant", INT8_LEAVES)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_activations_really_are_int8(variant: str, recipe: str) -> None:
    config = RMS_VARIANTS[variant]
    model, _, _ = run(config, shipped(recipe, config))
    found = seen_between_leaves(model, random_ids(config, 2, 7))
    expected = INT8_LEAVES[variant] if recipe.endswith("a8") else set()
    assert {path for path, dtype in found.items() if dtype == torch.int8} == expected
    assert {dtype for path, dtype in found.items() if path not in expected} == {torch.float32}


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    ("recipe", "asked", "state"),
    [
        ("w8a8", None, "fp16"),
        ("w4a8", None, "fp16"),
        ("w4a16", None, "fp16"),
        ("quamba1-w8a8", None, "int8"),
        ("w8a8", "int8", "int8"),
        ("w4a8", "int8", "int8"),
        ("w4a16", "int8", "int8"),
        ("quamba1-w8a8", "fp16", "fp16"),
    ],
)
def test_cached_states_have_the_recipes_dtype(
    variant: str, recipe: str, asked: str | None, state: str
) -> None:
    config = RMS_VARIANTS[variant]
    wanted = shipped(recipe, config)
    model, _, _ = run(config, wanted if asked is None else with_state(wanted, asked))
    cache = model.new_cache(2)
    for length in (5, 1):
        assert model(random_ids(config, 2, length), cache).isfinite().all()
    for layer in cache.layers:
        assert layer.ssm_state.dtype == {"int8": torch.int8, "fp16": torch.float16}[state]
        assert layer.conv_state.dtype == (torch.int8 if recipe.endswith("a8") else torch.float32)
        assert layer.ssm_state.any()


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_weights_are_packed_in_memory(variant: str, recipe: str) -> None:
    config = RMS_VARIANTS[variant]
    model, _, _ = run(config, shipped(recipe, config))
    weights = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.layers.1.mixer.in_proj.weight"} <= set(
        weights
    )
    assert ("backbone.layers.0.mixer.conv1d.weight" in weights) == recipe.endswith("a8")
    for path, weight in weights.items():
        four = recipe.startswith("w4") and "conv1d" not in path and "dt_proj" not in path
        assert weight.data.dtype == (torch.uint8 if four else torch.int8)
        assert weight.data.numel() == weight.shape[0] * weight.shape[1] // (2 if four else 1)
    floats = {name for name, p in model.named_parameters() if p.ndim == 2 and "A_log" not in name}
    assert floats == (
        set() if recipe.endswith("a8") else {f"backbone.layers.{i}.mixer.conv1d.weight" for i in (0, 1)}
    )


def test_recipes_without_calibration_need_none() -> None:
    config = RMS_VARIANTS["mamba2"]
    recipe = rounded(load_recipe("w4a16"))
    model, _, report = quantize_model(tiny_model(config), recipe, None)
    assert cost_db(model) > FLOORS_DB["mamba2", "w4a16"]
    assert report.calibration == {}


def test_no_work_is_done_for_a_recipe_that_does_not_fit() -> None:
    config = tiny_config("mamba2", ngroups=8)

    class Untouched:
        def batches(self) -> None:
            raise AssertionError("calibration was read")

    with pytest.raises(QuambaError, match="groups of heads"):
        quantize_model(tiny_model(config), load_recipe("w8a8"), Untouched())


def test_progress_is_told_of_every_sequence_and_layer() -> None:
    told: dict[str, list[int]] = {}

    class Listener:
        def stage(self, name: str, total: int) -> None:
            self.current = told.setdefault(name, [total, 0])

        def step(self, count: int = 1) -> None:
            self.current[1] += count

    config = RMS_VARIANTS["mamba2"]
    quantize_model(tiny_model(config), shipped("w8a8", config), calibration_set(config), Listener())
    assert told.keys() >= {"Head statistics", "Activation scales", "Weights"}
    assert all(done == total for total, done in told.values()), told
