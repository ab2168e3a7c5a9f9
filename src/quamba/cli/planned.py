"""The plan of a model, from config files only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quamba.errors import QuambaError

if TYPE_CHECKING:
    from pathlib import Path

    from quamba.recipes.plan import Plan
    from quamba.recipes.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """format  of a quantized model, as ``stored_format`` has it; None for a float one
    stored  what its files say besides the plan
    """

    plan: Plan
    format: str | None
    stored: dict[str, Any]


def read_plan(model: str, recipe: str | None, pretrained_dir: str | None) -> Planned:
    """Of a quantized MODEL as it is stored; of a float one what the recipe would do, nothing without one."""
    from quamba.checkpoints.source import CHECKPOINT_FILES
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.checkpoints.stored import read_stored_plan, stored_format
    from quamba.cli.store import find_model
    from quamba.recipes.recipe import load_recipe

    source = find_model(model, pretrained_dir)
    folder = resolve_source(source, patterns=("config.json",))
    format = stored_format(folder)
    if format is None:
        return Planned(_float_plan(folder, None if recipe is None else load_recipe(recipe)), None, {})
    if recipe is not None:
        raise QuambaError(f"'{model}' is quantized already, expected a float model with --recipe.")
    if format == "zoo":  # whether it has head groups is written in its weight file alone
        folder = resolve_source(source, patterns=CHECKPOINT_FILES)
    plan, stored = read_stored_plan(folder)
    return Planned(plan, format, stored)


def _float_plan(folder: Path, recipe: Recipe | None) -> Plan:
    from quamba.checkpoints.float import read_float_config
    from quamba.recipes.plan import resolve
    from quamba.recipes.recipe import Precision, Recipe

    return resolve(recipe or Recipe(name="float", blocks=Precision()), read_float_config(folder))
