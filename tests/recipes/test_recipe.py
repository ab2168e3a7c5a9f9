"""Recipes as files: what comes back, and one sentence for everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat
from quamba.recipes.recipe import (
    HeadGroups,
    Override,
    Precision,
    Recipe,
    Solver,
    load_recipe,
    precision,
    shipped_names,
)

BASE = {"name": "mine", "blocks": "W4A8"}


def test_shipped_names() -> None:
    assert shipped_names() == [
        "quamba1-w8a8",
        "w4a16",
        "w4a8",
        "w8a8",
        "zoo-w4a16",
        "zoo-w4a8",
        "zoo-w8a8",
    ]


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_what_the_shipped_recipes_say() -> None:
    w8a8, w4a8, w4a16 = (load_recipe(name) for name in ("w8a8", "w4a8", "w4a16"))
    assert w8a8.blocks == Precision(weights="int8", activations="int8", state="fp16")
    assert w4a8.blocks == w4a8.head == Precision(weights="int4", activations="int8", state="fp16")
    assert w4a16.blocks == w4a16.head == Precision(weights="int4", activations="float", state="fp16")
    assert (w8a8.embedding, w4a8.embedding, w4a16.embedding) == ("int8", "int4", "int4")
    assert (w8a8.solver.kind, w4a8.solver.kind, w4a16.solver.kind) == ("rtn", "gptq", "gptq")
    assert w8a8.group_heads == w4a8.group_heads == HeadGroups(heads=4, channels=4)
    assert w4a8.int4 == WeightFormat(4, "group", 128, multiples=16)
    quamba1 = load_recipe("quamba1-w8a8")
    assert quamba1.blocks == Precision(weights="int8", activations="int8", state="int8")
    assert quamba1.embedding == quamba1.head.weights == "float"
    assert quamba1.int8.granularity == quamba1.conv_scales == quamba1.activation_scales == "tensor"
    assert quamba1.alpha == 0.9995


def test_what_the_zoo_recipes_say() -> None:
    w8a8, w4a8, w4a16 = (load_recipe(f"zoo-{name}") for name in ("w8a8", "w4a8", "w4a16"))
    assert [r.blocks.label for r in (w8a8, w4a8, w4a16)] == ["W8A8", "W4A8", "W4A16"]
    assert [r.head.label for r in (w8a8, w4a8, w4a16)] == ["W8A8", "W4A8", "W4A16"]
    assert [r.blocks.state for r in (w8a8, w4a8, w4a16)] == ["int8", "int8", "fp16"]
    assert (w8a8.embedding, w4a8.embedding, w4a16.embedding) == ("int8", "int4", "int4")
    assert (w8a8.solver.kind, w4a8.solver.kind, w4a16.solver.kind) == ("rtn", "gptq", "gptq")
    assert w8a8.solver.scale == "absmax"
    assert (w8a8.parameters, w4a8.parameters, w4a16.parameters) == ("int8", "int8", "float16")
    assert (w4a8.dt_proj, w4a16.dt_proj) == ("int8", "float")
    for recipe in (w8a8, w4a8, w4a16):
        assert (recipe.rounding, recipe.overflow, recipe.rotate) == ("half_away", "saturate", True)
        assert recipe.percentile_alpha is None
    for recipe in (w8a8, w4a8):
        assert recipe.int8 == WeightFormat(8, "split")
        assert (recipe.conv_scales, recipe.activation_scales) == ("split", "tensor")
        assert recipe.group_heads == HeadGroups(heads=4, channels=4)
    assert w4a8.int4 == WeightFormat(4, "two_level", 128)
    assert w4a8.embedding_int4 == w4a16.embedding_int4 == WeightFormat(4, "channel", scale_bits=16)
    assert w8a8.embedding_int8 == WeightFormat(8, "channel", scale_bits=16)


def test_a_full_recipe_round_trips() -> None:
    recipe = Recipe(
        name="full",
        blocks=Precision(weights="int4", activations="int8", state="fp32"),
        overrides=(
            Override(blocks=(0, 5), precision=Precision(weights="int8", activations="int8", state="int8")),
            Override(blocks=(1,), precision=Precision()),
        ),
        embedding="int4",
        head=Precision(weights="int8"),
        int4=WeightFormat(4, "two_level", 64, scale_bits=16),
        int8=WeightFormat(8, "split", parts=(2, 3)),
        embedding_int4=WeightFormat(4, "group", 32, scale_bits=32),
        embedding_int8=WeightFormat(8, "tensor", scale_bits=16),
        dt_proj="float",
        conv_scales="split",
        parameters="int8",
        rounding="half_away",
        overflow="wrap",
        activation_scales="tensor",
        percentile_alpha=0.999,
        rotate=False,
        group_heads=HeadGroups(heads=2, channels=3),
        solver=Solver(kind="gptq", damping=0, act_order=False, scale="absmax", refinements=0, samples=7),
    )
    plain = Recipe(name="plain", blocks=Precision())
    for field in dataclasses.fields(Recipe):
        if field.name != "version":
            assert getattr(recipe, field.name) != getattr(plain, field.name), field.name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"dt_proj": "float"},
        {"conv_scales": "split"},
        {"parameters": "float16"},
        {"parameters": "int8"},
        {"rounding": "half_away"},
        {"overflow": "wrap"},
        {"solver": {"kind": "unknown"}},
        {"embedding_int8": {"bits": 8, "granularity": "group", "group_size": 64, "scale_bits": 16}},
        {"int4": {"bits": 4, "granularity": "two_level", "group_size": 128}},
    ],
    ids=str,
)
def test_fields_of_published_models_round_trip(changes: dict[str, object]) -> None:
    recipe = Recipe.from_dict({**BASE, **changes})
    assert recipe != Recipe.from_dict(BASE)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'version = 1\nname = "mine"\nblocks = "W8A8"\nhead = "w4a16"\npercentile_alpha = 1\n'
        '[[overrides]]\nblocks = [2]\nprecision = "FP16"\n'
    )
    recipe = load_recipe(path)
    assert recipe.head.label == "W4A16"
    assert recipe.alpha == 1.0
    assert recipe.overrides == (Override(blocks=(2,), precision=Precision()),)


@pytest.mark.parametrize(
    ("changes", "alpha"),
    [
        ({}, 1.0),  # one channel has no tail to cut
        ({"activation_scales": "tensor"}, 0.9995),
        ({"group_heads": {}}, 0.99999),
        ({"percentile_alpha": 0.75, "group_heads": {}}, 0.75),
    ],
)
def test_default_percentile(changes: dict[str, object], alpha: float) -> None:
    assert Recipe.from_dict({**BASE, **changes}).alpha == alpha


@pytest.mark.parametrize(
    ("weights", "activations", "label"), [(8, 8, "W8A8"), (4, 8, "W4A8"), (4, 16, "W4A16")]
)
def test_published_pairs(weights: int, activations: int, label: str) -> None:
    found = precision(weights, activations)
    assert (found.label, found.state) == (label, "fp16")
    assert Recipe.from_dict({"name": "x", "blocks": label}).blocks == found
    for state in ("int8", "fp16", "fp32"):
        given = precision(weights, activations, state)
        assert (given.label, given.state) == (label, state)


def test_labels() -> None:
    assert Precision().label == "FP16"
    assert Precision(weights="int8").label == "W8A16"


WRONG = [
    ({"embeding": "int8"}, "Unknown recipe field 'embeding'. Did you mean 'embedding'?"),
    ({"blocks": 3}, "The recipe's precision is 3, expected a table of fields."),
    ({"blocks": "W4A9"}, "Did you mean 'W4A8'?"),
    ({"blocks": {"weight": "int8"}}, "Unknown precision field 'weight'. Did you mean 'weights'?"),
    ({"blocks": {"weights": "int9"}}, "expected one of 'int4', 'int8', 'float'"),
    ({"blocks": {"weights": "int8", "state": "f16"}}, "Did you mean 'fp16'?"),
    ({"blocks": {"weights": "float", "activations": "int8"}}, "have no kernel"),
    ({"name": 5}, "The recipe's name is 5"),
    ({"name": ""}, "The recipe's name is ''"),
    ({"version": 2}, "reads version 1"),
    ({"overrides": 3}, "expected a list of tables"),
    ({"overrides": [3]}, "override is 3, expected a table"),
    ({"overrides": [{"blocks": [0]}]}, "precision is None"),
    ({"overrides": [{"blocks": 0, "precision": "W8A8"}]}, "expected a list of block numbers such as [0, 5]"),
    ({"overrides": [{"blocks": [-1], "precision": "W8A8"}]}, "expected a list of block numbers"),
    ({"overrides": [{"blocks": [True], "precision": "W8A8"}]}, "expected a list of block numbers"),
    ({"overrides": [{"block": [1], "precision": "W8A8"}]}, "Did you mean 'blocks'?"),
    ({"embedding": "int3"}, "The embedding precision is 'int3'"),
    ({"dt_proj": "fp16"}, "The precision of dt_proj is 'fp16', expected one of 'int4', 'int8', 'float'."),
    ({"conv_scales": "group"}, "conv_scales is 'group'"),
    ({"parameters": "float8"}, "parameters is 'float8'"),
    ({"rounding": "half_evn"}, "Did you mean 'half_even'?"),
    ({"overflow": "clamp"}, "overflow is 'clamp', expected one of 'saturate', 'wrap'."),
    ({"embedding_int8": {"bits": 4, "granularity": "channel"}}, "int8 format says bits = 4, expected 8"),
    ({"embedding_int8": {"bits": 8, "granularity": "split"}}, "An embedding table has granularity 'split'"),
    (
        {"embedding_int4": {"bits": 4, "granularity": "two_level", "group_size": 128}},
        "An embedding table has granularity 'two_level'",
    ),
    (
        {"embedding_int4": {"bits": 4, "granularity": "group", "group_size": 128, "multiples": 16}},
        "The int4 format of an embedding table has multiples 16, expected none",
    ),
    ({"activation_scales": "row"}, "activation_scales is 'row'"),
    ({"int4": "group"}, "The recipe's int4 is 'group', expected a table of fields."),
    ({"int4": {"bits": 8, "granularity": "channel"}}, "says bits = 8, expected 4"),
    ({"int8": {"bits": 8}}, "lacks granularity"),
    ({"int4": {"bits": 4, "granularity": "group"}}, "expected a positive integer such as 128"),
    ({"int4": {"bits": 4, "granularity": "group", "groupsize": 1}}, "Did you mean 'group_size'?"),
    ({"percentile_alpha": 1.5}, "percentile_alpha is 1.5"),
    ({"percentile_alpha": 0.5}, "percentile_alpha is 0.5"),
    ({"percentile_alpha": math.nan}, "percentile_alpha is nan"),
    ({"percentile_alpha": "0.9"}, "percentile_alpha is '0.9'"),
    ({"percentile_alpha": True}, "percentile_alpha is True"),
    ({"rotate": "no"}, "rotate is 'no', expected true or false."),
    ({"group_heads": 4}, "expected a table of fields"),
    ({"group_heads": {"heads": 0}}, "The number of head groups is 0"),
    ({"group_heads": {"channels": 2.5}}, "The number of channel groups is 2.5"),
    ({"group_heads": {"head": 2}}, "Did you mean 'heads'?"),
    ({"solver": "gptq"}, "expected a table of fields"),
    ({"solver": {"kind": "gtpq"}}, "Did you mean 'gptq'?"),
    ({"solver": {"scale": "max"}}, "The solver's scale is 'max'"),
    ({"solver": {"damping": -1}}, "damping is -1, expected a number of at least 0."),
    ({"solver": {"damping": math.inf}}, "damping is inf"),
    ({"solver": {"refinements": -1}}, "refinements is -1, expected an integer of at least 0."),
    ({"solver": {"samples": 0}}, "samples is 0, expected an integer of at least 1."),
    ({"solver": {"act_order": "yes"}}, "act_order is 'yes', expected true or false."),
    ({"solver": {"propagate_error": 1}}, "propagate_error is 1"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=lambda value: str(value)[:60])
def test_one_sentence_for_each_mistake(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(QuambaError) as caught:
        Recipe.from_dict({**BASE, **changes})
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize("key", ["name", "blocks"])
def test_required_fields(key: str) -> None:
    with pytest.raises(QuambaError, match=f"The recipe lacks '{key}'"):
        Recipe.from_dict({k: v for k, v in BASE.items() if k != key})


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match=r"'w4a9'.*Did you mean 'w4a8'\?"):
        load_recipe("w4a9")
    with pytest.raises(QuambaError, match="does not exist"):
        load_recipe(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(QuambaError, match="is not valid TOML"):
        load_recipe(broken)
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(QuambaError, match="is not valid TOML"):
        load_recipe(broken)


def test_unsupported_pairs() -> None:
    with pytest.raises(QuambaError, match="choose 8 and 8, 4 and 8, or 4 and 16"):
        precision(8, 16)
