"""A recipe applied to a model's sizes: what is decided, and what is refused before any work."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config
from variants import RMS_VARIANTS, VARIANTS, shipped

from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat
from quamba.models.config import Mamba2Config, MambaConfig
from quamba.models.lm import MambaLM
from quamba.recipes.plan import projections, resolve
from quamba.recipes.recipe import HeadGroups, Override, Precision, Recipe, load_recipe

W8A8 = Precision(weights="int8", activations="int8", state="int8")
W4A16 = Precision(weights="int4", activations="float", state="fp16")


@pytest.mark.parametrize("name", RMS_VARIANTS)
def test_projections_are_the_linears_of_a_block(name: str) -> None:
    config = RMS_VARIANTS[name]
    mixer = MambaLM.empty(config).blocks[0].mixer
    for projection, shape in projections(config).items():
        assert tuple(getattr(mixer, projection).weight.shape) == shape
    linears = [n for n, m in mixer.named_children() if type(m).__name__ == "Linear"]
    assert sorted(linears) == sorted(projections(config))


def test_overrides_apply_in_order() -> None:
    recipe = Recipe(
        name="x",
        blocks=W4A16,
        overrides=(
            Override(blocks=(0, 1), precision=W8A8),
            Override(blocks=(1,), precision=Precision()),
        ),
    )
    plan = resolve(recipe, tiny_config("mamba2", n_layer=3))
    assert [b.label for b in plan.blocks] == ["W8A8", "FP16", "W4A16"]
    assert [b.int8_activations for b in plan.blocks] == [True, False, False]
    assert [b.conv is None for b in plan.blocks] == [False, True, True]
    assert plan.blocks[1].weights == {}
    assert plan.folds_norms
    assert plan.needs_activation_scales


def test_dt_proj_has_its_own_width() -> None:
    weights = resolve(load_recipe("w4a8"), tiny_config("mamba")).blocks[0].weights
    assert {name: f.bits for name, f in weights.items()} == {
        "in_proj": 4,
        "x_proj": 4,
        "dt_proj": 8,
        "out_proj": 4,
    }
    weights = resolve(load_recipe("w4a8").replace(dt_proj="int4"), tiny_config("mamba")).blocks[0].weights
    assert weights["dt_proj"].bits == 4


SPLIT, TWO_LEVEL = WeightFormat(8, "split"), WeightFormat(4, "two_level", 16)
TENSOR, GROUP = WeightFormat(8, "tensor"), WeightFormat(4, "group", 16)


def test_split_is_for_leaves_of_mamba2_whose_outputs_have_parts() -> None:
    config = tiny_config("mamba2", ngroups=2)
    recipe = Recipe(name="x", blocks=W8A8, head=W8A8, int8=SPLIT, conv_scales="split")
    plan = resolve(recipe, config)
    block = plan.blocks[0]
    # z, x, B, C, dt: d_inner 64, ngroups 2 times d_state 16, nheads 8.
    assert block.weights["in_proj"] == WeightFormat(8, "split", parts=(64, 64, 32, 32, 8))
    assert sum(block.weights["in_proj"].parts or ()) == projections(config)["in_proj"][0]
    assert block.conv == WeightFormat(8, "split", parts=(64, 32, 32))
    assert block.weights["out_proj"] == plan.head == TENSOR
    mamba = resolve(recipe, tiny_config("mamba"))
    assert set(mamba.blocks[0].weights.values()) == {TENSOR}
    assert mamba.blocks[0].conv == mamba.head == TENSOR


def test_split_keeps_the_bits_of_its_scales() -> None:
    recipe = Recipe(name="x", blocks=W8A8, int8=WeightFormat(8, "split", scale_bits=16))
    weights = resolve(recipe, tiny_config("mamba2")).blocks[0].weights
    assert weights["in_proj"].scale_bits == weights["out_proj"].scale_bits == 16
    assert weights["out_proj"].granularity == "tensor"


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_two_levels_are_for_products_of_integers(family: str, activations: str) -> None:
    precision = Precision(weights="int4", activations=activations)
    recipe = Recipe(name="x", blocks=precision, head=precision, int4=TWO_LEVEL, dt_proj="int4")
    plan = resolve(recipe, tiny_config(family, dt_rank=4) if family == "mamba" else tiny_config(family))
    expected = TWO_LEVEL if activations == "int8" else GROUP
    assert set(plan.blocks[0].weights.values()) == {expected}
    assert plan.head == expected


def test_the_head_has_its_own_activations() -> None:
    recipe = Recipe(
        name="x", blocks=W4A16, head=Precision(weights="int4", activations="int8"), int4=TWO_LEVEL
    )
    plan = resolve(recipe, tiny_config("mamba2"))
    assert (plan.head, plan.blocks[0].weights["in_proj"]) == (TWO_LEVEL, GROUP)


def test_dt_proj_may_be_float_behind_float_activations() -> None:
    recipe = load_recipe("w4a16").replace(dt_proj="float")
    assert "dt_proj" not in resolve(recipe, tiny_config("mamba")).blocks[0].weights
    for precision in ("w4a8", "w8a8"):
        assert resolve(load_recipe(precision).replace(dt_proj="float"), tiny_config("mamba2"))
    # The setting is about blocks with 4-bit weights.
    weights = resolve(load_recipe("w8a8").replace(dt_proj="float"), tiny_config("mamba")).blocks[0].weights
    assert weights["dt_proj"].bits == 8


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, (False, True, "half_even", "saturate")),
        ({"parameters": "float16"}, (False, True, "half_even", "saturate")),
        ({"parameters": "int8"}, (True, True, "half_even", "saturate")),
        ({"activation_scales": "tensor"}, (False, False, "half_even", "saturate")),
        ({"rounding": "half_away", "overflow": "wrap"}, (False, True, "half_away", "wrap")),
    ],
    ids=str,
)
def test_flags_of_blocks(changes: dict[str, str], flags: tuple[object, ...]) -> None:
    overrides = (Override(blocks=(1,), precision=W4A16),)
    recipe = load_recipe("w8a8").replace(overrides=overrides, **changes)
    one, other = resolve(recipe, tiny_config("mamba")).blocks
    assert (one.int8_parameters, one.folds_x_scale, one.rounding, one.overflow) == flags
    assert (other.int8_parameters, other.folds_x_scale) == (False, False)
    mamba2 = resolve(recipe, tiny_config("mamba2")).blocks[0]
    assert (mamba2.int8_parameters, mamba2.folds_x_scale) == (flags[0], False)


@pytest.mark.parametrize("bits", [4, 8])
def test_tables_have_their_own_formats(bits: int) -> None:
    format = WeightFormat(bits, "channel", scale_bits=16)
    recipe = Recipe(name="x", blocks=Precision(), embedding=f"int{bits}", **{f"embedding_int{bits}": format})
    assert resolve(recipe, tiny_config("mamba")).embedding == format


def test_groups_are_for_mamba2_with_int8_activations() -> None:
    assert resolve(load_recipe("w8a8"), tiny_config("mamba")).group_heads is None
    assert resolve(load_recipe("w8a8"), tiny_config("mamba")).alpha == 1.0
    assert resolve(load_recipe("quamba1-w8a8"), tiny_config("mamba")).alpha == 0.9995
    plan = resolve(load_recipe("w8a8"), tiny_config("mamba2"))
    assert (plan.group_heads, plan.state_groups, plan.alpha) == (HeadGroups(), 16, 0.99999)
    weight_only = load_recipe("w4a16").replace(group_heads=HeadGroups())
    assert resolve(weight_only, tiny_config("mamba2")).group_heads is None


def test_a_float_plan_changes_nothing() -> None:
    plan = resolve(Recipe(name="float", blocks=Precision()), tiny_config("mamba"))
    assert plan.is_float
    assert not plan.rotate
    assert not plan.needs_calibration
    only_table = resolve(Recipe(name="table", blocks=Precision(), embedding="int8"), tiny_config("mamba"))
    assert not only_table.is_float
    assert not only_table.folds_norms


@pytest.mark.parametrize(
    ("recipe", "activations", "calibration"),
    [("w8a8", True, True), ("w4a8", True, True), ("w4a16", False, True), ("quamba1-w8a8", True, True)],
)
def test_what_needs_calibration(recipe: str, activations: bool, calibration: bool) -> None:
    plan = resolve(load_recipe(recipe), tiny_config("mamba"))
    assert plan.needs_activation_scales is activations
    assert plan.needs_calibration is calibration


@pytest.mark.parametrize(
    "sizes",
    [
        MambaConfig(d_model=768, n_layer=24, vocab_size=50277),
        MambaConfig(d_model=2560, n_layer=64, vocab_size=50277),
        MambaConfig(d_model=4096, n_layer=64, vocab_size=65024, bcdt_rms_eps=1e-6),
        Mamba2Config(d_model=768, n_layer=24, vocab_size=50277),
        Mamba2Config(d_model=1024, n_layer=48, vocab_size=50277),
        Mamba2Config(d_model=1536, n_layer=48, vocab_size=50277),
        Mamba2Config(d_model=2560, n_layer=64, vocab_size=50277),
        Mamba2Config(d_model=4096, n_layer=56, vocab_size=256000, ngroups=8, d_state=128),
    ],
    ids=lambda c: f"{c.family}-{c.d_model}",
)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", "zoo-w8a8", "zoo-w4a8", "zoo-w4a16"])
def test_published_sizes_fit(sizes: MambaConfig | Mamba2Config, recipe: str) -> None:
    assert len(resolve(load_recipe(recipe), sizes).blocks) == sizes.n_layer


REFUSED = {
    "block out of range": (
        tiny_config("mamba"),
        shipped("w8a8", tiny_config("mamba"), overrides=(Override(blocks=(2,), precision=W4A16),)),
        "An override names block 2, but the model has 2 blocks, 0 to 1.",
    ),
    "too many head groups": (
        tiny_config("mamba2"),
        load_recipe("w8a8").replace(group_heads=HeadGroups(heads=9)),
        "group_heads asks for 9 groups of heads, but there are 8 in an SSD group; choose 1 to 8.",
    ),
    "too many head groups for an SSD group": (
        tiny_config("mamba2", ngroups=4),
        load_recipe("w8a8"),
        "asks for 4 groups of heads, but there are 2 in an SSD group; choose 1 to 2.",
    ),
    "too many channel groups": (
        tiny_config("mamba2", headdim=2),
        load_recipe("w8a8"),
        "asks for 4 groups of channels, but there are 2 in a head; choose 1 to 2.",
    ),
    "group size": (
        tiny_config("mamba", d_model=160),
        load_recipe("w4a8"),
        "in_proj: group_size 128 does not divide in_features 160; the nearest group size that does is 160.",
    ),
    "group size of the embedding": (
        tiny_config("mamba", d_model=160),
        Recipe(name="x", blocks=Precision(), embedding="int4"),
        "embedding: group_size 128 does not divide in_features 160;",
    ),
    "odd columns in 4 bits": (
        tiny_config("mamba", d_model=32, dt_rank=3),
        load_recipe("w4a8").replace(dt_proj="int4"),
        "dt_proj: A weight of 4 bits needs an even number of columns, not 3; use 8 bits.",
    ),
    "odd embedding in 4 bits": (
        tiny_config("mamba", d_model=33),
        Recipe(name="x", blocks=Precision(), embedding="int4", embedding_int4=WeightFormat(4, "channel")),
        "embedding: A weight of 4 bits needs an even number of columns, not 33; use 8 bits.",
    ),
    "float dt_proj behind integers": (
        tiny_config("mamba"),
        load_recipe("w4a8").replace(dt_proj="float"),
        "dt_proj is float in blocks with int8 activations, which has no kernel; expected dt_proj 'int8' or",
    ),
    "group size of two levels": (
        tiny_config("mamba", d_model=160),
        load_recipe("zoo-w4a8"),
        "in_proj: group_size 128 does not divide in_features 160; the nearest group size that does is 160.",
    ),
    "rotation of d_model": (
        tiny_config("mamba", d_model=52),
        load_recipe("w8a8"),
        "d_model 52 cannot be rotated:",
    ),
    "rotation of d_inner": (
        tiny_config("mamba", d_model=32, expand=43),
        load_recipe("w8a8"),
        "d_inner 1376 cannot be rotated:",
    ),
    "LayerNorm": (VARIANTS["mamba-layer-norm"], load_recipe("w8a8"), "A model with LayerNorm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence(case: str) -> None:
    config, recipe, sentence = REFUSED[case]
    with pytest.raises(QuambaError) as caught:
        resolve(recipe, config)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert message.endswith(".")


def test_sizes_that_do_not_rotate_can_stay() -> None:
    config = tiny_config("mamba", d_model=52)
    assert not resolve(load_recipe("w8a8").replace(rotate=False), config).rotate
