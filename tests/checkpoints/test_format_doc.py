"""docs/format.md against the code: its tables are read, and every tensor must be in one row of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from quamba.checkpoints.float import read_float_config
from quamba.checkpoints.quantized import DTYPES, FORMAT_VERSION, MODEL_TYPES
from quamba.formats.packing import pack_int4
from quamba.formats.weight import WeightFormat
from quamba.models.config import FAMILIES, Mamba2Config, ModelConfig
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import HeadGroups, Override, Precision, Recipe, load_recipe, shipped_names
from quamba.recipes.skeleton import skeleton


@dataclass(frozen=True)
class Row:
    """A row of the document: which names it is about in which model, and what they are."""

    name: re.Pattern[str]
    model: str
    shapes: tuple[str, ...]
    dtype: str
    sizes: tuple[tuple[str, str], ...] = ()


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first column has this heading, without backticks."""
    lines = text.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    body = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in body]


def pattern(name: str) -> re.Pattern[str]:
    """``{i}`` is a number, ``{a,b}`` a or b."""
    parts = re.split(r"(\{[^}]*\})", name)
    return re.compile("".join(_alternatives(p) if p.startswith("{") else re.escape(p) for p in parts))


def _alternatives(braces: str) -> str:
    inside = braces.strip("{}")
    return r"\d+" if inside == "i" else f"(?:{'|'.join(inside.split(','))})"


def rows_of(text: str) -> list[Row]:
    matrices, others = text.split("## Other tensors")
    rows = []
    for matrix, model, n, k in table(matrices, "matrix"):
        for tensor, shape, dtype, _ in table(matrices, "tensor"):
            name = pattern(tensor.replace("{matrix}", matrix))
            rows.append(Row(name, model, (shape,), dtype, (("N", n), ("K", k))))
    for tensor, model, shapes, dtype, _ in table(others, "tensor"):
        rows.append(Row(pattern(tensor), model, tuple(shapes.split(" or ")), dtype))
    return rows


def letters(config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """The section "Letters", and S."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("d_inner", "conv_dim", *(["nheads"] if isinstance(config, Mamba2Config) else [])):
        sizes[name] = getattr(config, name)
    groups = plan.group_heads
    S = 1 if groups is None else config.ngroups * groups.heads * groups.channels  # type: ignore[union-attr]
    return {**sizes, "V": config.padded_vocab_size, "S": S}


def fits(row: Row, name: str, tensor: torch.Tensor, sizes: dict[str, Any], family: str) -> bool:
    if row.model not in ("both", family) or not row.name.fullmatch(name):
        return False
    dtype = "float32" if row.dtype == "dtype" else row.dtype
    if str(tensor.dtype) != f"torch.{dtype}":
        return False
    known = dict(sizes)
    for letter, expression in row.sizes:
        known[letter] = eval(expression, {}, known)
    if "N, G" in row.shapes[0]:
        groups = tensor.shape[1] if tensor.ndim == 2 else 0
        least = 1 if row.dtype == "float16" else 2  # one float32 scale a row is in another row of the table
        return groups >= least and tensor.shape[0] == known["N"] and known["K"] % groups == 0
    return any([int(size) for size in eval(shape, {}, known)] == list(tensor.shape) for shape in row.shapes)


ZOO_RECIPES = ("zoo-w8a8", "zoo-w4a8", "zoo-w4a16")


def in_tiny_groups(recipe: Recipe) -> Recipe:
    """With groups of columns, heads and channels that tiny models have more than one of."""
    int4 = dataclasses.replace(recipe.int4, group_size=16)
    groups = HeadGroups(heads=2, channels=2) if recipe.group_heads else None
    return recipe.replace(int4=int4, group_heads=groups)


def plans() -> dict[str, Plan]:
    """Both families in every format that leads to tensors of another name, shape or dtype."""
    w4a8, fp16 = Precision(weights="int4", activations="int8", state="int8"), Precision()
    w8a8 = Precision(weights="int8", activations="int8", state="fp32")
    group16 = {"int4": WeightFormat(4, "group", 16), "embedding_int4": WeightFormat(4, "group", 16)}
    recipes = {
        "w4a8": Recipe(name="t", blocks=w4a8, embedding="int4", head=w4a8, **group16),
        "mixed": Recipe(
            name="t",
            blocks=w8a8,
            overrides=(Override(blocks=(1,), precision=fp16),),
            embedding="int8",
            int8=WeightFormat(8, "tensor"),
            conv_scales="tensor",
            rotate=False,
        ),
        "groups": Recipe(
            name="t",
            blocks=w4a8,
            int4=WeightFormat(4, "channel"),
            group_heads=HeadGroups(heads=2, channels=2),
        ),
        "per tensor": Recipe(name="t", blocks=w4a8, activation_scales="tensor", **group16),
        "float": Recipe(name="t", blocks=Precision(state="int8")),
        "scale bits": Recipe(
            name="t",
            blocks=w8a8,
            overrides=(Override(blocks=(1,), precision=w4a8),),
            embedding="int8",
            int4=WeightFormat(4, "group", 16, scale_bits=32),
            int8=WeightFormat(8, "tensor", scale_bits=16),
            embedding_int8=WeightFormat(8, "channel", scale_bits=16),
        ),
        "split": Recipe(name="t", blocks=w8a8, int8=WeightFormat(8, "split", scale_bits=16)),
        "float16 parameters": Recipe(name="t", blocks=w8a8, parameters="float16"),
        "int8 parameters": Recipe(name="t", blocks=w8a8, parameters="int8"),
        **{name: in_tiny_groups(load_recipe(name)) for name in ZOO_RECIPES},
    }
    configs = {
        "mamba": tiny_config("mamba", bias=True),
        "falcon": tiny_config("mamba", bcdt_rms_eps=1e-6, conv_bias=False),
        "mamba2": tiny_config("mamba2", bias=True),
        "mamba2 other": tiny_config("mamba2", ngroups=2, D_has_hdim=True, tie_embeddings=False),
    }
    found = {
        f"{m} {r}": resolve(recipe, config) for m, config in configs.items() for r, recipe in recipes.items()
    }
    for family in FAMILIES:
        found[f"{family} layer norm"] = resolve(recipes["float"], tiny_config(family, rms_norm=False))
    return found


PLANS = plans()


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(text: str) -> list[Row]:
    return rows_of(text)


@pytest.mark.parametrize("name", PLANS)
def test_every_tensor_is_in_one_row(rows, name):
    plan = PLANS[name]
    sizes = letters(plan.config, plan)
    for key, tensor in skeleton(plan).named_tensors().items():
        found = [row for row in rows if fits(row, key, tensor, sizes, plan.config.family)]
        assert len(found) == 1, f"{key} {tensor.dtype} {list(tensor.shape)} fits {len(found)} rows"


def test_every_row_is_about_some_tensor(rows):
    seen = set()
    for plan in PLANS.values():
        sizes = letters(plan.config, plan)
        for key, tensor in skeleton(plan).named_tensors().items():
            seen.update(i for i, row in enumerate(rows) if fits(row, key, tensor, sizes, plan.config.family))
    # Products of two tables: no single model stores a convolution or dt_proj in all formats.
    unseen = {row.name.pattern for i, row in enumerate(rows) if i not in seen and not row.sizes}
    assert unseen == set()
    suffixes = {(row.dtype, row.shapes) for i, row in enumerate(rows) if i in seen and row.sizes}
    assert suffixes == {(row.dtype, row.shapes) for row in rows if row.sizes}


def test_a_tensor_that_the_tables_do_not_know_is_found(rows):
    plan = PLANS["mamba2 groups"]
    sizes = letters(plan.config, plan)
    known = torch.empty(64)
    name = "backbone.layers.0.mixer.norm.weight"
    assert sum(fits(row, name, known, sizes, "mamba2") for row in rows) == 1
    for key, tensor, family in (
        (f"{name}s", known, "mamba2"),
        (name, known, "mamba"),
        (name, known.half(), "mamba2"),
        (name, torch.empty(65), "mamba2"),
    ):
        assert not any(fits(row, key, tensor, sizes, family) for row in rows)


def example_lines(recipe: Recipe, config: ModelConfig) -> set[tuple[str, str, str]]:
    """Name, dtype and shape of what is outside the blocks and in block 0."""
    return {
        (name, str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape)))
        for name, tensor in skeleton(resolve(recipe, config)).named_tensors().items()
        if not re.match(r"backbone\.layers\.[1-9]", name)
    }


def test_the_example_is_the_demo_model(text, assets):
    introduction, listing, *_ = text.split("## Example")[1].split("```")
    lines = listing.strip().splitlines()
    config = read_float_config(assets / "models" / "mamba2-demo")
    recipe = load_recipe("w4a8")
    expected = example_lines(recipe, config)
    assert {tuple(line.split(maxsplit=2)) for line in lines} == expected
    assert len(lines) == len(expected)

    more = re.findall(r"`(ssm\.\w+)`, (\w+) `(\[.*?\])`", introduction)
    int8_state = recipe.replace(blocks=dataclasses.replace(recipe.blocks, state="int8"))
    prefix = "backbone.layers.0.mixer."
    assert {(prefix + name, dtype, shape) for name, dtype, shape in more} == (
        example_lines(int8_state, config) - expected
    )
    assert len(more) == 2


def test_granularities_are_documented(text):
    granularities = {line.granularity for plan in PLANS.values() for line in formats(plan)}
    assert granularities == {"tensor", "channel", "split", "group", "two_level"}
    for name in granularities:
        assert f'"{name}"' in text
    assert "`scale_bits`" in text


def formats(plan: Plan) -> list[WeightFormat]:
    found = [plan.embedding, plan.head]
    for block in plan.blocks:
        found += [block.conv, *block.weights.values()]
    return [format for format in found if format is not None]


def test_the_default_state_is_the_documented_one(text):
    assert re.search(r'a cached state is\s+fp16 unless the recipe says `state = "int8"` or `"fp32"`', text)
    assert Precision().state == "fp16"
    assert {name: load_recipe(name).blocks.state for name in shipped_names()} == {
        "quamba1-w8a8": "int8",
        "w4a16": "fp16",
        "w4a8": "fp16",
        "w8a8": "fp16",
        "zoo-w4a16": "fp16",
        "zoo-w4a8": "int8",
        "zoo-w8a8": "int8",
    }
    sentence = re.search(r"shipped recipes (.*?) ask for", text, re.DOTALL)
    named = set(re.findall(r"`([\w-]+)`", sentence.group(1)))
    assert named == {name for name in shipped_names() if load_recipe(name).blocks.state == "int8"}


def test_the_drawn_byte(text):
    codes, byte = re.search(r"codes (\[.*?\])  ->  0b[01_]+  =  (0x\w\w)", text).groups()
    packed = pack_int4(torch.tensor(eval(codes), dtype=torch.int8))
    assert packed.tolist() == [int(byte, 16)]


def test_the_configuration_tables(text):
    keys = {row[0]: row[1] for row in table(text, "key")}
    assert list(keys) == ["model_type", "dtype", "eos_token_id", "family", "quantization_config"]
    assert all(name in keys["dtype"] for name in DTYPES)
    assert all(name in keys["model_type"] for name in MODEL_TYPES.values())
    inner = {row[0]: row[1] for row in table(text, "key of quantization_config")}
    assert inner["format_version"] == str(FORMAT_VERSION)
    assert f"format, version {FORMAT_VERSION}\n" in text
    assert {"quant_method", "quamba_version", "source", "calibration", "recipe"} < set(inner)
