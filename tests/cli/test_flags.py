"""What the published flags mean."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_models import tiny_config

from quamba.cli.flags import QuantizeFlags, read_hybrid_blocks, recipe_from_flags, with_state
from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import HeadGroups, Precision, Recipe, Solver, load_recipe

MAMBA2, MAMBA = tiny_config("mamba2"), tiny_config("mamba")


def test_no_flags_are_w8a8_with_float_tables() -> None:
    recipe, notes = recipe_from_flags(QuantizeFlags(), MAMBA2)
    assert recipe == Recipe(
        name="w8a8",
        blocks=Precision(weights="int8", activations="int8", state="fp16"),
        solver=Solver(kind="rtn"),
    )
    assert notes == []


def test_plain_w8a8_flags_on_mamba1_are_the_first_papers_recipe() -> None:
    recipe, (note,) = recipe_from_flags(QuantizeFlags(), MAMBA)
    assert recipe == load_recipe("quamba1-w8a8")
    assert recipe.blocks == Precision(weights="int8", activations="int8", state="int8")
    assert "recipe quamba1-w8a8" in note
    assert "--recipe w8a8' is more accurate" in note


@pytest.mark.parametrize("state", ["int8", "fp16", "fp32", None])
@pytest.mark.parametrize("alpha", [0.99, 1.0, None])
def test_percentile_and_state_change_the_first_papers_recipe(alpha: float | None, state: str | None) -> None:
    flags = QuantizeFlags(percentile_alpha=alpha, state_dtype=state)
    recipe, (note,) = recipe_from_flags(flags, MAMBA)
    assert recipe == load_recipe("quamba1-w8a8").replace(
        percentile_alpha=0.9995 if alpha is None else alpha,
        blocks=Precision(weights="int8", activations="int8", state=state or "int8"),
    )
    assert "recipe quamba1-w8a8" in note


PLAIN = Recipe(name="w8a8", blocks=Precision(weights="int8", activations="int8", state="fp16"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"w_bits": 4},
            {
                "name": "w4a8",
                "blocks": Precision(weights="int4", activations="int8"),
                "int4": WeightFormat(4, "group", 128, multiples=16),
            },
        ),
        (
            {"w_bits": 4, "a_bits": 16},
            {"name": "w4a16", "blocks": Precision(weights="int4", activations="float")},
        ),
        ({"group_heads": True}, {}),
        ({"apply_gptq": True}, {"solver": Solver(kind="gptq")}),
        ({"quantize_embedding": True}, {"embedding": "int8"}),
        ({"quantize_lm_head": True}, {"head": PLAIN.blocks}),
    ],
    ids=lambda value: "-".join(value) or "nothing",
)
def test_any_other_flag_leaves_the_first_papers_recipe(
    given: dict[str, object], expected: dict[str, object]
) -> None:
    recipe, notes = recipe_from_flags(QuantizeFlags(**given), MAMBA)
    assert recipe == PLAIN.replace(**expected)
    assert recipe.blocks.state == "fp16"
    assert recipe.percentile_alpha is None
    assert not any("quamba1" in note for note in notes)


def test_hybrid_blocks_leave_the_first_papers_recipe(tmp_path: Path) -> None:
    flags = dataclasses.replace(_hybrid(tmp_path, ["W8A8", "W8A8"]), group_heads=False)
    recipe, notes = recipe_from_flags(flags, MAMBA)
    assert (recipe.name, recipe.blocks, recipe.overrides) == ("w4ax", PLAIN.blocks, ())
    assert (recipe.activation_scales, recipe.conv_scales) == ("channel", "channel")
    assert notes == []


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16"])
def test_the_flags_of_the_zoo_are_the_shipped_recipes(name: str) -> None:
    w_bits, a_bits = int(name[1]), int(name[3:])
    flags = QuantizeFlags(
        w_bits=w_bits,
        a_bits=a_bits,
        apply_gptq=w_bits == 4,
        group_heads=a_bits == 8,
        quantize_embedding=True,
        quantize_lm_head=True,
    )
    assert recipe_from_flags(flags, MAMBA2)[0] == load_recipe(name)


@pytest.mark.parametrize(
    ("a_bits", "config", "reason"), [(16, MAMBA2, "16-bit activations"), (8, MAMBA, "only Mamba2")]
)
def test_head_groups_are_ignored_aloud(a_bits: int, config: object, reason: str) -> None:
    recipe, (note,) = recipe_from_flags(QuantizeFlags(w_bits=4, a_bits=a_bits, group_heads=True), config)
    assert recipe.group_heads is None
    assert reason in note


def test_an_unsupported_pair_is_refused() -> None:
    with pytest.raises(QuambaError, match="w_bits 8 with a_bits 16 is no supported pair"):
        recipe_from_flags(QuantizeFlags(a_bits=16), MAMBA2)


def test_state_and_percentile_reach_the_recipe() -> None:
    flags = QuantizeFlags(w_bits=4, state_dtype="fp32", percentile_alpha=0.999)
    recipe, _ = recipe_from_flags(flags, MAMBA2)
    assert (recipe.blocks.state, recipe.percentile_alpha) == ("fp32", 0.999)


def _hybrid(tmp_path: Path, labels: object) -> QuantizeFlags:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(labels))
    return QuantizeFlags(hybrid_blocks=True, hybrid_blocks_config=str(path), group_heads=True)


def test_hybrid_blocks_become_overrides(tmp_path: Path) -> None:
    config = tiny_config("mamba2", n_layer=4)
    labels = ["W4A8", "W4A16", "W4A8", "W8A8"]
    recipe, notes = recipe_from_flags(_hybrid(tmp_path, labels), config)
    assert [block.label for block in resolve(recipe, config).blocks] == labels
    assert {block.state for block in resolve(recipe, config).blocks} == {"fp16"}
    assert (recipe.name, recipe.embedding, recipe.head.label) == ("w4ax", "int4", "W4A8")
    assert recipe.group_heads == HeadGroups()
    assert notes == []


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "plain"])
@pytest.mark.parametrize(
    ("embedding", "head"), [("float", "FP16"), ("int8", "W8A8"), ("int4", "W4A16"), ("float", "W4A8")]
)
def test_embedding_and_head_are_independent_of_the_blocks(
    tmp_path: Path, embedding: str, head: str, hybrid: bool
) -> None:
    given = _hybrid(tmp_path, ["W4A16", "W8A8"]) if hybrid else QuantizeFlags(quantize_lm_head=True)
    flags = dataclasses.replace(given, embedding_precision=embedding, head_precision=head)
    for config in (MAMBA, MAMBA2):
        recipe, _ = recipe_from_flags(flags, config)
        assert (recipe.embedding, recipe.head.label) == (embedding, head)
        assert recipe.name == ("w4ax" if hybrid else "w8a8")


def test_one_of_the_two_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    flags = dataclasses.replace(_hybrid(tmp_path, ["W4A16", "W8A8"]), head_precision="W8A8")
    recipe, _ = recipe_from_flags(flags, MAMBA2)
    assert (recipe.embedding, recipe.head.label) == ("int4", "W8A8")


@pytest.mark.parametrize("state", ["int8", "fp32"])
def test_the_state_flag_reaches_every_hybrid_block(tmp_path: Path, state: str) -> None:
    flags = dataclasses.replace(_hybrid(tmp_path, ["W4A8", "W4A16"]), state_dtype=state)
    plan = resolve(recipe_from_flags(flags, MAMBA2)[0], MAMBA2)
    assert [block.state for block in plan.blocks] == [state, state]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["W4A8"], "has 1 entries, expected 2"),
        (["W4A8"] * 3, "has 3 entries, expected 2"),
        (["W4A8", "W4A6"], "Entry 1 .* is 'W4A6', expected one of .* Did you mean 'W4A"),
        ({"0": "W4A8"}, "holds a JSON dict, expected a list"),
    ],
)
def test_a_wrong_hybrid_configuration_is_refused(tmp_path: Path, labels: object, sentence: str) -> None:
    with pytest.raises(QuambaError, match=sentence):
        recipe_from_flags(_hybrid(tmp_path, labels), MAMBA2)


def test_hybrid_flags_need_each_other() -> None:
    with pytest.raises(QuambaError, match="--hybrid_blocks needs --hybrid_blocks_config FILE"):
        recipe_from_flags(QuantizeFlags(hybrid_blocks=True), MAMBA2)
    with pytest.raises(QuambaError, match="expected --hybrid_blocks with it"):
        recipe_from_flags(QuantizeFlags(hybrid_blocks_config="c.json"), MAMBA2)


def test_the_published_hybrid_configuration(repo_root: Path) -> None:
    path = repo_root / "configs" / "hybrid" / "mamba2-8b" / "hybrid_blocks_config.json"
    labels = read_hybrid_blocks(path, 56)
    sixteen = [0, 4, 5, 9, 10, 17, 21, 22, 28, 33, 35, 48, 49, 54]
    assert [i for i, label in enumerate(labels) if label == "W4A16"] == sixteen
    assert labels.count("W4A8") == 42


def test_with_state_changes_overrides_too() -> None:
    recipe = Recipe.from_dict(
        {"name": "x", "blocks": "W4A8", "overrides": [{"blocks": [0], "precision": "W4A16"}]}
    )
    changed = with_state(recipe, "fp32")
    assert (changed.blocks.state, changed.overrides[0].precision.state) == ("fp32", "fp32")
    assert with_state(recipe, None) is recipe
