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
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
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
