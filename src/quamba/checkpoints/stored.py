"""Quantized models as they lie in folders, ours and published ones alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from quamba.checkpoints.quantized import (
    StoredModel,
    is_quantized,
    read_plan,
    read_quantization_config,
    read_quantized,
)
from quamba.checkpoints.zoo.read import is_zoo, read_zoo, read_zoo_plan
from quamba.recipes.plan import Plan

__all__ = ["StoredFormat", "StoredModel", "read_stored", "read_stored_plan", "stored_format"]

StoredFormat = Literal["quamba", "zoo"]


def stored_format(folder: str | Path) -> StoredFormat | None:
    """Whose format the quantized model in a folder has, by its config.json alone; None for anything else."""
    if is_quantized(folder):
        return "quamba"
    return "zoo" if is_zoo(folder) else None


def read_stored(folder: str | Path, source: str = "") -> StoredModel:
    """A quantized model of either format. ``source`` names a published one; ours carries its own."""
    return read_zoo(folder, source) if is_zoo(folder) else read_quantized(folder)


def read_stored_plan(folder: str | Path) -> tuple[Plan, dict[str, Any]]:
    """What a quantized folder holds, without its weights, and what else its config.json says of the model."""
    if is_zoo(folder):
        return read_zoo_plan(folder), {}
    return read_plan(folder), read_quantization_config(folder)
