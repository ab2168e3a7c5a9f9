"""Tiny models, and banks of their blocks, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from search_fixtures import LABELS, LAYERS, Banks, Tiny, base_recipe
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, random_ids

from quamba.checkpoints.upstream import write_state_spaces
from quamba.quantization.pipeline import Silent
from quamba.search.blocks import BlockBank, bank_folders, fill_bank, plan_bank, read_bank


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def of(family: str) -> Tiny:
        if family not in made:
            config = tiny_config(family, n_layer=LAYERS)
            network = tiny_model(config)
            source = tmp_path_factory.mktemp("search") / f"{family}-tiny"
            write_state_spaces(source, config, network.named_tensors())
            sequences = [random_ids(config, length, seed=length) for length in (21, 33, 21)]
            made[family] = Tiny(source, network, calibration_set(config), sequences)
        return made[family]

    return of


@pytest.fixture(scope="session")
def banks(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Banks:
    """banks(family, base recipe's name, labels, **changes of the recipe) -> the bank"""
    root = tmp_path_factory.mktemp("banks")
    made: dict[object, BlockBank] = {}

    def of(
        family: str,
        name: str = "w4a8",
        labels: tuple[str, ...] = LABELS,
        state: str = "fp16",
        **changes: Any,
    ) -> BlockBank:
        key = (family, name, labels, state, *changes)
        if key not in made:
            model, base = tiny(family), base_recipe(name, state).replace(**changes)
            plan = plan_bank(base, labels, model.network.config)
            folders = bank_folders(root / family, plan, "tiny")
            fill_bank(
                folders, plan, model.network, model.calibration, str(model.source), root / "work", Silent()
            )
            made[key] = read_bank(folders, plan, base, model.network)
        return made[key]

    return of
