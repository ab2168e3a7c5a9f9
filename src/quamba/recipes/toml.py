"""A recipe as the text of a TOML file that ``load_recipe`` reads back to an equal recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quamba.recipes.recipe import Recipe

_FIRST = ("version", "name")


def recipe_toml(recipe: Recipe, comment: str = "") -> str:
    """Every field but those that are None, which is their default; ``comment`` in front, a line each."""
    fields = recipe.to_dict()
    names = [*_FIRST, *(name for name in fields if name not in _FIRST)]
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{name} = {_value(fields[name])}" for name in names if fields[name] is not None]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key} = {_value(part)}" for key, part in value.items() if part is not None)
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str | bool):
        return json.dumps(value)
    if isinstance(value, Sequence):
        if any(isinstance(part, Mapping) for part in value):
            return "[\n" + "".join(f"  {_value(part)},\n" for part in value) + "]"
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
