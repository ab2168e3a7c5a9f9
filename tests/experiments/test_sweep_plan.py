"""Plans: sizes from configs, recipes compared, order, time."""

from __future__ import annotations

from pathlib import Path

import pytest

from quamba.experiments.plan import estimate_seconds, known_config, make_plan, plan_record
from quamba.experiments.spec import read_sweep
from quamba.experiments.state import RunsFolder
from quamba.models.config import Mamba2Config

MIB = 2**20
SIZES = ("130m", "370m", "1.4b", "2.8b")


def test_a_plan_needs_no_weights(repo_root: Path, here: Path) -> None:
    plan = make_plan(
        read_sweep(repo_root / "configs/experiments/reproduce.toml"), RunsFolder.at(here / "out")
    )
    sizes = {run.name: (run.size_bytes or 0) / MIB for run in plan.runs}
    # The measured ones of the published models, embedding and head in float16 for the first paper.
    assert sizes["quamba2/default/quamba2-2.7b-w8a8"] == pytest.approx(2703.8, rel=0.01)
    assert sizes["quamba2/default/quamba2-8b-converted-w4a8"] == pytest.approx(4245725690 / MIB, rel=0.01)
    assert sizes["quamba1/default/quamba-2.8b-w8a8"] == pytest.approx(2763.1, rel=0.1)
    assert {run.state for run in plan.runs} == {"to do"}
    assert plan.disk_bytes == sum(run.size_bytes or 0 for run in plan.runs)
    assert not (here / "out").exists()


def test_configs_that_are_known_without_a_network(here: Path) -> None:
    config = known_config("./pretrained_models/mamba2-8b-converted")
    assert isinstance(config, Mamba2Config)
    assert (config.d_model, config.ngroups, config.padded_vocab_size, config.tie_embeddings) == (
        4096,
        8,
        256000,
        False,
    )
    assert known_config("state-spaces/mamba-790m") is None
    assert known_config("nowhere") is None


def test_runs_of_one_model_and_calibration_come_together(here: Path) -> None:
    (here / "s.toml").write_text(
        "[defaults]\nquantize = true\n[[grid]]\nset = { pretrained_dir = 'p' }\n[grid.vary]\n"
        "calib_data_num = [8, 16]\nprecision = ['w4a8', 'w8a8']\nmodel = ['x', 'y']\n".replace(
            "calib_data_num = [8, 16]",
            "c = [{ calib_data_num = 8, output_subdir = 'a' }, { calib_data_num = 16, output_subdir = 'b' }]",
        )
    )
    plan = make_plan(read_sweep("s.toml"), RunsFolder.at("out"))
    order = [(run.spec.model, run.spec.options["calib_data_num"]) for run in plan.due(False)]
    assert order == [(m, n) for m in "xy" for n in (8, 8, 16, 16)]


def test_a_stored_model_is_only_evaluated(here: Path) -> None:
    line = 'model = "m", quantize = true, pretrained_dir = "p"'
    (here / "s.toml").write_text(f"[[run]]\nset = {{ {line} }}")
    (here / "p/ut-enyac/m-w8a8").mkdir(parents=True)
    (here / "p/ut-enyac/m-w8a8/config.json").write_text("{}")
    (run,) = make_plan(read_sweep("s.toml"), RunsFolder.at("out")).runs
    assert run.state == "stored"


def test_another_recipe_is_another_run(tiny_models_here: Path) -> None:
    (tiny_models_here / "s.toml").write_text(
        '[[run]]\nname = "a"\nset = { model = "mamba2-tiny", quantize = true }'
    )
    folder = RunsFolder.at("out")
    plan = make_plan(read_sweep("s.toml"), folder)
    spec = plan.runs[0].spec
    from quamba.cli.flags import recipe_from_flags

    recipe = recipe_from_flags(spec.flags, known_config("mamba2-tiny"))[0]  # type: ignore[arg-type]
    result = {"recipe": recipe.to_dict(), "sweep": {"request": spec.request, "seconds": 10}}
    folder.keep_result("a", result)
    (run,) = make_plan(read_sweep("s.toml"), folder).runs
    assert (run.state, run.seconds) == ("done", 10.0)
    folder.keep_result("a", {**result, "recipe": recipe.replace(rotate=False).to_dict()})
    (run,) = make_plan(read_sweep("s.toml"), folder).runs
    assert (run.state, run.reason) == ("to do", "its result is of another recipe than these flags mean now")


def test_time_is_that_of_the_runs_most_alike(repo_root: Path) -> None:
    runs = read_sweep(repo_root / "configs/experiments/demo.toml").runs
    one, w4a8, w8a8 = runs[0], runs[8], runs[12]
    assert (w4a8.flags.label, w8a8.flags.label) == ("w4a8", "w8a8")
    assert estimate_seconds(w8a8, [(one, 10.0)]) == 10.0
    assert estimate_seconds(w8a8, [(one, 10.0), (w4a8, 20.0)]) == 20.0
    assert estimate_seconds(w8a8, [(w4a8, 20.0), (w8a8, 30.0), (runs[13], 50.0)]) == 40.0
    assert estimate_seconds(one, []) is None


def test_what_is_kept_of_a_plan_reads_back(repo_root: Path, here: Path) -> None:
    folder = RunsFolder.at(here / "out")
    plan = make_plan(read_sweep(repo_root / "configs/experiments/reproduce.toml"), folder)
    folder.keep_plan(plan_record(plan))
    runs = folder.plan()["runs"]
    assert [tuple(run["arguments"]) for run in runs] == [run.spec.arguments for run in plan.runs]
    some = make_plan(plan.sweep, folder, ["quamba1/pa-1"])
    assert [run.name for run in some.runs] == [f"quamba1/pa-1/quamba-{s}-w8a8" for s in SIZES]
    assert len(plan_record(some)["runs"]) == 20
    assert runs[0]["expected"][0]["value"] == 40.61
