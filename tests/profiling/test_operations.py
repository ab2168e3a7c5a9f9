"""Operations by hand, and which of them are on integers."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, rounded, shipped

from quamba.profiling.operations import prefill_operations
from quamba.quantization.pipeline import quantize_model


def test_a_mamba2_prefill_by_hand() -> None:
    found = prefill_operations(tiny_model(tiny_config("mamba2")), batch_size=2, prompt_len=5)
    tokens, layers = 10, 2
    assert found.total == {
        "projections": tokens * layers * 2 * (32 * 168 + 64 * 32),
        "conv": tokens * layers * 2 * 4 * 96,
        "scan": tokens * layers * 5 * 64 * 16,
        "rotation": 0,
        "head": 2 * 2 * 32 * 64,
    }
    assert found.count == sum(found.total.values())
    assert found.integer_share == 0


def test_a_mamba_prefill_by_hand() -> None:
    found = prefill_operations(tiny_model(tiny_config("mamba")), batch_size=1, prompt_len=3)
    assert found.total["projections"] == 3 * 2 * 2 * (32 * 128 + 64 * 20 + 4 * 64 + 64 * 32)
    assert found.total["scan"] == 3 * 2 * 7 * 64 * 8


@pytest.mark.parametrize(
    ("recipe", "integer"),
    [("w8a8", ["projections", "conv", "head"]), ("w4a8", ["projections", "conv", "head"]), ("w4a16", [])],
)
def test_integer_operations(recipe: str, integer: list[str]) -> None:
    config = tiny_config("mamba2")
    small, _, _ = quantize_model(
        tiny_model(config), rounded(shipped(recipe, config)), calibration_set(config)
    )
    found = prefill_operations(small, batch_size=1, prompt_len=4)
    plain = prefill_operations(tiny_model(config), batch_size=1, prompt_len=4)
    assert [kind for kind, count in found.integer.items() if count] == integer
    assert {**found.total, "rotation": 0} == plain.total
    assert found.total["rotation"] == 4 * 2 * 64 * (6 + 1)  # log2(64) additions and one product each
    assert all(found.integer[kind] == found.total[kind] for kind in integer)


def test_the_hooks_are_gone_afterwards() -> None:
    network = tiny_model(tiny_config("mamba2"))
    prefill_operations(network, 1, 4)
    assert not any(module._forward_pre_hooks for module in network.modules())
