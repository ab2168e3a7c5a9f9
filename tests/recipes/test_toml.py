"""Recipes as TOML text."""

from __future__ import annotations

from pathlib import Path

import pytest

from quamba.recipes.recipe import Override, Precision, load_recipe, shipped_names
from quamba.recipes.toml import recipe_toml


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_come_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(recipe, "one line\nand another"))
    assert load_recipe(path) == recipe
    assert path.read_text().startswith("# one line\n# and another\nversion = 1\nname = ")


def test_overrides_come_back_equal(tmp_path: Path) -> None:
    overrides = (
        Override(blocks=(0, 4), precision=Precision(weights="int4")),
        Override(blocks=(2,), precision=Precision(weights="int8", activations="int8", state="int8")),
    )
    recipe = load_recipe("w4a8").replace(overrides=overrides, name='a "quoted" \\ name')
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(recipe))
    assert load_recipe(path) == recipe
