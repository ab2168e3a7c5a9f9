"""The whole search on tiny models: seeds, resuming, a kill, several processes, what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from search_fixtures import Tiny, base_recipe

from quamba.errors import QuambaError
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.recipe import load_recipe
from quamba.search import blocks
from quamba.search.budget import Budget
from quamba.search.costs import TimeSpec
from quamba.search.objective import ObjectiveSpec
from quamba.search.result import pareto, rows, write_result
from quamba.search.search import Outcome, SearchSpec, search

FAMILIES = ("mamba", "mamba2")


def spec(**changes: Any) -> SearchSpec:
    asked = SearchSpec(
        base=base_recipe("w4a8"), precisions=("W4A16",), budget=Budget({"W4A16": 2}), method="evolutionary"
    )
    return dataclasses.replace(asked, **changes)


def searched(tiny: Tiny, folder: Path, **changes: Any) -> Outcome:
    asked = spec(**changes)
    return search(str(tiny.source), tiny.network, tiny.calibration, tiny.sequences, asked, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_finds_what_fits(family: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """6 choices: evolutionary and auto try them all, and no method is better than that."""
    found = {
        method: searched(tiny(family), tmp_path / "s", method=method)
        for method in ("ranking", "greedy", "integer", "evolutionary", "exhaustive", "auto")
    }
    best = found["exhaustive"]
    assert best.evaluations == 6
    assert best.score == min(c.score for c in best.candidates if c.labels.count("W4A16") == 2)
    for method, outcome in found.items():
        assert outcome.chosen.count("W4A16") == 2
        assert outcome.score >= best.score
        if method in ("evolutionary", "auto"):
            assert outcome.chosen == best.chosen


def test_budgets_of_weights(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"precisions": ("W8A8", "FP16"), "method": "auto"}
    all_int4 = searched(tiny("mamba2"), tmp_path / "s", budget=Budget({}, {"weights": 1e9}), **changes)
    least = all_int4.problem.limits[0].of((0, 0, 0, 0))
    most = least + 5000.0
    outcome = searched(tiny("mamba2"), tmp_path / "s", budget=Budget({}, {"weights": most}), **changes)
    assert least < outcome.costs["weights"] <= most < all_int4.costs["weights"]
    assert all_int4.score < outcome.score < outcome.uniform["W4A8"]
    with pytest.raises(QuambaError, match="keeps the budget: weights is at least"):
        searched(tiny("mamba2"), tmp_path / "s", budget=Budget({}, {"weights": least - 1}), **changes)


def test_budgets_of_time(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """At 1 GB/s; the time of all blocks at W8A8 is too much."""
    timing = TimeSpec(how="predicted", bandwidth_gb_per_s=1.0)
    changes: dict[str, Any] = {"precisions": ("W8A8",), "time": timing, "method": "greedy"}
    wide = searched(tiny("mamba"), tmp_path / "s", budget=Budget({}, {"tpot": 1e3}), **changes)
    ends = [wide.problem.limits[0].of((p,) * 4) for p in (0, 1)]
    most = (ends[0] + ends[1]) / 2
    outcome = searched(tiny("mamba"), tmp_path / "s", budget=Budget({}, {"tpot": most}), **changes)
    assert ends[0] < outcome.costs["tpot"] <= most
    assert 1 <= outcome.chosen.count("W8A8") <= 2


def test_blocks_are_quantized_once(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = []

    def counting(network: Any, recipe: Any, *arguments: Any, **named: Any) -> Any:
        recipes.append(recipe.blocks.label)
        return quantize_model(network, recipe, *arguments, **named)

    monkeypatch.setattr(blocks, "quantize_model", counting)
    first = searched(
        tiny("mamba2"), tmp_path / "s", precisions=("W4A16", "FP16"), budget=Budget({"W4A16": 1, "FP16": 1})
    )
    assert recipes == ["W4A8"]
    again = searched(
        tiny("mamba2"), tmp_path / "s", precisions=("W4A16", "FP16"), budget=Budget({"W4A16": 1, "FP16": 1})
    )
    assert recipes == ["W4A8"]
    assert first.to_dict() == again.to_dict()
    other = Tiny(
        **{
            **vars(tiny("mamba2")),
            "calibration": dataclasses.replace(tiny("mamba2").calibration, fingerprint="1"),
        }
    )
    searched(other, tmp_path / "s")
    assert recipes == ["W4A8", "W4A8"]


def test_scores_of_another_objective_are_others(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    kl = searched(tiny("mamba2"), tmp_path / "s")
    ppl = searched(tiny("mamba2"), tmp_path / "s", objective=ObjectiveSpec(kind="perplexity"))
    assert kl.score < 10 < ppl.score
    shorter = dataclasses.replace(tiny("mamba2"), sequences=tiny("mamba2").sequences[:1])
    assert searched(shorter, tmp_path / "s").score != kl.score


@pytest.mark.slow
def test_two_processes_give_what_one_does(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    one = searched(tiny("mamba2"), tmp_path / "one", method="exhaustive")
    two = searched(tiny("mamba2"), tmp_path / "two", method="exhaustive", devices=("cpu", "cpu"))
    assert two.chosen == one.chosen
    mine = {c.labels: c.score for c in one.candidates}
    assert {c.labels: c.score for c in two.candidates} == pytest.approx(mine, rel=1e-5)


def test_what_is_written(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "s"
    outcome = searched(tiny("mamba2"), folder, method="exhaustive")
    written = write_result(outcome, folder, pictures=True)
    assert sorted(path.name for path in written) == [
        "candidates.csv", "hybrid_blocks_config.json", "pareto.png", "recipe.toml", "report.html",
        "result.json", "sensitivity.png",
    ]  # fmt: skip
    assert json.loads((folder / "hybrid_blocks_config.json").read_text()) == list(outcome.chosen)
    assert load_recipe(folder / "recipe.toml") == outcome.recipe
    with (folder / "candidates.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(outcome.candidates) == 6 + 1 + 4 + 1
    assert [float(line["score"]) for line in table] == sorted(c.score for c in outcome.candidates)
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] == outcome.score
    assert len(result["candidates"]) == len(table)
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("pareto.png", "sensitivity.png"))
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and page.count("data:image/png;base64,") == 2


def test_the_front(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    points = [(2.0, 1.0), (1.0, 3.0), (1.0, 2.0), (3.0, 1.0), (4.0, 0.5), (1.5, 2.5)]
    assert pareto(points) == {0, 2, 4}
    table = rows(searched(tiny("mamba2"), tmp_path / "s"))
    front = [row for row in table if row.front]
    counts = [row.costs["blocks"] for row in front]
    assert counts == sorted(set(counts), reverse=True) and counts[-1] == 0.0
    assert all(row.costs["blocks"] == row.candidate.labels.count("W4A16") for row in table)
    for row in front:
        assert not any(
            o.costs["blocks"] <= row.costs["blocks"] and o.candidate.score < row.candidate.score
            for o in table
        )


def test_refused(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuambaError, match="is not empty and no folder of a search"):
        searched(tiny("mamba2"), tmp_path)
    with pytest.raises(QuambaError, match="asks for 5 blocks, but the model has 4"):
        searched(tiny("mamba2"), tmp_path / "s", budget=Budget({"W4A16": 5}))
    with pytest.raises(QuambaError, match="counts W8A8, which is not among the precisions"):
        spec(budget=Budget({"W8A8": 1}))
    with pytest.raises(QuambaError, match="one precision to choose from"):
        spec(precisions=(), budget=Budget())
    with pytest.raises(QuambaError, match="has overrides of its own"):
        spec(base=blocks.mixed_recipe(base_recipe("w4a8"), ("W4A8", "W4A16"), "mine"))


_PROGRAM = """
import sys, torch
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_search
from variants import calibration_set
from quamba.search import objective
from quamba.models.lm import MambaLM
from quamba.checkpoints.float import read_float
from search_fixtures import Tiny
from variants import random_ids
source = Path(sys.argv[1])
found = read_float(source)
network = MambaLM.from_tensors(found.config, found.tensors).set_compute_dtype(torch.float32)
sequences = [random_ids(found.config, n, seed=n) for n in (21, 33, 21)]
slow = objective.Divergence.__call__
def slower(self, networks):
    import time
    time.sleep(0.5)
    return slow(self, networks)
objective.Divergence.__call__ = slower
from quamba.search import score
score.TOGETHER = 1
tiny = Tiny(source, network, calibration_set(found.config), sequences)
test_search.searched(tiny, Path(sys.argv[2]), method="exhaustive")
"""


@pytest.mark.slow
def test_killed_and_resumed(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """A process is killed between two candidates; the same search then ends as one that was not."""
    model, folder = tiny("mamba2"), tmp_path / "killed"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", _PROGRAM, str(model.source), str(folder), *paths]
    with subprocess.Popen(command, env=os.environ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            kept = list(folder.glob("candidates-*.jsonl"))
            if kept and kept[0].read_bytes().count(b"\n") >= 2:
                break
            time.sleep(0.02)
        process.kill()
    (kept_file,) = folder.glob("candidates-*.jsonl")
    before = kept_file.read_bytes()
    assert 2 <= before.count(b"\n") < 6
    resumed = searched(model, folder, method="exhaustive")
    assert kept_file.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    whole = searched(model, tmp_path / "whole", method="exhaustive")
    assert (resumed.chosen, resumed.score) == (whole.chosen, whole.score)
    assert {c.labels: c.score for c in resumed.candidates} == {c.labels: c.score for c in whole.candidates}


def test_a_resumed_evolution_is_the_same(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after five candidates; what is asked for depends on scores, and these are kept."""
    from quamba.search import score as module

    def run(folder: Path) -> Outcome:
        changes: dict[str, Any] = {"precisions": ("W4A16", "FP16"), "method": "evolutionary"}
        return searched(tiny("mamba2"), folder, budget=Budget({"W4A16": 1, "FP16": 1}), **changes)

    whole = run(tmp_path / "whole")
    add, count = module.CandidateStore.add, 0

    def interrupted(self: Any, candidate: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        add(self, candidate)

    monkeypatch.setattr(module.CandidateStore, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(module.CandidateStore, "add", add)
    resumed = run(tmp_path / "cut")
    assert [c.labels for c in resumed.candidates] == [c.labels for c in whole.candidates]
    assert {**resumed.to_dict(), "seconds": 0} == {**whole.to_dict(), "seconds": 0}


def test_the_scored_model_is_the_saved_one(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = tiny("mamba2")
    outcome = searched(model, tmp_path / "s")
    from quamba.search.objective import Divergence
    from quamba.search.search import batches

    network = outcome.bank.assemble(outcome.chosen)
    reference = model.network.use_kernels(network.kernels)
    (found,) = Divergence(reference, batches(model.sequences, 8))([network])
    assert found == pytest.approx(outcome.score, rel=1e-6)
    assert torch.isfinite(torch.tensor(outcome.score))
