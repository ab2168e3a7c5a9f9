"""A tiny model of each family with four blocks, on disk, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quamba.calibration.data import CalibrationSet
from quamba.cli.flags import with_state
from quamba.models.lm import MambaLM
from quamba.recipes.recipe import Recipe, load_recipe
from quamba.search.blocks import BlockBank

LAYERS = 4
LABELS = ("W4A8", "W8A8", "W4A16", "FP16")
Banks = Callable[..., BlockBank]


@dataclass(frozen=True)
class Tiny:
    """A float model, where it lies, and text for it."""

    source: Path
    network: MambaLM
    calibration: CalibrationSet
    sequences: list[torch.Tensor]


def base_recipe(name: str, state: str | None = None) -> Recipe:
    return with_state(load_recipe(name), state)
