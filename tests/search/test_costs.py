"""What blocks cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from search_fixtures import LABELS, Banks

from quamba.errors import QuambaError
from quamba.profiling.size import measure_size, step_bytes
from quamba.quantization.pipeline import Silent
from quamba.search import costs
from quamba.search.budget import Budget
from quamba.search.costs import TimeSpec, limits_of, time_limit, weight_limit

FAMILIES = ("mamba", "mamba2")
MIX = ("W4A16", "W8A8", "FP16", "W4A8")


def indices(labels: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(LABELS.index(label) for label in labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_add_up_to_the_models(family: str, banks: Banks) -> None:
    bank = banks(family)
    limit = weight_limit(bank, LABELS, 1e9)
    for labels in (MIX, ("W4A8",) * 4, ("FP16",) * 4):
        assert limit.of(indices(labels)) == measure_size(bank.assemble(labels)).weight_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_steps(family: str, banks: Banks) -> None:
    """Bytes of a step by the bandwidth: 2 GB/s are 2e6 bytes a millisecond."""
    bank = banks(family)
    spec = TimeSpec(how="predicted", batch_size=3, bandwidth_gb_per_s=2.0)
    limit = time_limit(bank, LABELS, "tpot", 1.0, spec, Silent())
    assert limit.of(indices(MIX)) == pytest.approx(step_bytes(bank.assemble(MIX), 3) / 2e6)


def test_prompts_are_not_predicted(banks: Banks) -> None:
    with pytest.raises(QuambaError, match="ttft cannot be predicted from bytes"):
        time_limit(banks("mamba2"), LABELS, "ttft", 1.0, TimeSpec(how="predicted"), Silent())


@pytest.mark.parametrize("mode", ["tpot", "ttft"])
def test_measured_times_are_kept(
    mode: str, banks: Banks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed search must find the same costs."""
    spec = TimeSpec(prompt_len=4, repeats=2, max_seconds=1.0)
    arguments = (Budget({}, {mode: 5.0}), banks("mamba2"), ("W4A8", "W4A16"), spec, tmp_path / "times.json")
    (first,) = limits_of(*arguments, "models", Silent())
    assert first.most == 5.0 and first.unit == "ms"
    assert len(first.cost) == 4 and all(value > 0 for value in first.cost[0])
    monkeypatch.setattr(costs, "measure", None)
    assert limits_of(*arguments, "models", Silent()) == (first,)
    with pytest.raises(TypeError):
        limits_of(*arguments, "other models", Silent())
