"""``quamba tune``: what it refuses, which model it means, what it prints and writes. The GPU is played."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

pytest.importorskip("triton", reason="triton is missing: pip install triton")

from quamba.cli import tune as cli
from quamba.cli.main import main
from quamba.kernels.triton import launches
from quamba.kernels.triton.gemm import TileLaunch
from quamba.kernels.triton.launch_tables import Gpu
from quamba.recipes.plan import Plan
from quamba.tuning import compilers, networks
from quamba.tuning import tune as tuning
from quamba.tuning.tune import Found, LostError

Run = Callable[..., Result]
Refused = Callable[..., str]
BEFORE, BEST = TileLaunch(64, 16, splits=8), TileLaunch(32, 16, slices=4, stages=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(refused: Refused) -> None:
    sentence = "Launches are measured on an NVIDIA GPU, and torch sees none here."
    assert refused(main, "tune") == sentence
    assert refused(main, "tune", "mamba2-tiny", "--ops", "linear") == sentence


class Played:
    """A GPU and a search that finds ``results``; what it was asked for."""

    def __init__(self) -> None:
        self.results: list[Found] = []
        self.lost = ""
        self.plans: list[Plan] = []
        self.rows: list[int] = []
        self.ops: list[str] = []
        self.compiled: dict[str, Any] = {}

    def random_network(self, plan: Plan, device: torch.device) -> Plan:
        self.plans.append(plan)
        return plan

    def search(
        self, networks: Any, rows: list[int], ops: list[str], *, is_known: Any, **named: Any
    ) -> Iterator[Found]:
        self.rows, self.ops = rows, ops
        yield from (found for found in self.results if not is_known(found.op, found.key))
        if self.lost:
            raise LostError(self.lost)

    def compile_ahead(self, plans: Sequence[Plan], *args: Any, **named: Any) -> None:
        self.compiled = named


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Played]:
    game = Played()
    monkeypatch.setenv("QUAMBA_TABLES", str(tmp_path / "tables"))
    monkeypatch.setattr(cli, "_gpu", lambda name: torch.device("cpu"))
    monkeypatch.setattr(launches, "gpu", lambda index: Gpu("NVIDIA H200", "sm90"))
    monkeypatch.setattr(networks, "random_network", game.random_network)
    monkeypatch.setattr(tuning, "search", game.search)
    monkeypatch.setattr(compilers, "compile_ahead", game.compile_ahead)
    launches.forget()
    yield game
    launches.forget()


def found(rows: int, us: dict[Any, float], wrong: dict[Any, str] | None = None) -> Found:
    key = ("int8", "int4 group 128", 2560, 5120, rows)
    sizes = dict(zip(("x", "weights", "features", "inputs", "rows"), key, strict=True))
    return Found("linear.tiles", key, sizes, BEFORE, us, wrong or {})


def test_results_are_printed_and_kept(run: Run, here: Path, played: Played) -> None:
    odd = TileLaunch(16, 16)
    played.results = [
        found(16, {BEFORE: 9.0, BEST: 7.5}, {odd: "off by 3"}),
        found(64, {BEST: 12.0}, {BEFORE: "RuntimeError: no"}),
        found(512, {}, {BEFORE: "RuntimeError: no"}),
    ]
    result = run(main, "tune", "--jobs", 1)
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    sizes = "x int8, weights int4 group 128, features 2560, inputs 5120, rows"
    assert header == "op                before us   best us   gain  for: the best launch"
    assert lines[0].startswith(
        f"linear.tiles           9.00      7.50   1.20  {sizes} 16: features 32, tokens 16, "
    )
    assert lines[1].startswith(
        f"linear.tiles              -     12.00      -  {sizes} 64: features 32, tokens 16, "
    )
    assert lines[2] == f"linear.tiles              -         -      -  {sizes} 512: no candidate was right"
    path = here / "tables" / "nvidia-h200.json"
    first, *_, last = result.stderr.splitlines()
    assert first == f"1 of 3 did not count, the first {odd}: off by 3"
    assert last == f"3 measured: '{path}'."
    entries = json.loads(path.read_text())["launches"]["linear.tiles"]
    assert [(entry["rows"], entry["us"], entry.get("before_us")) for entry in entries] == [
        (16, 7.5, 9.0),
        (64, 12.0, None),
    ]
    again = run(main, "tune", "--jobs", 1)
    assert again.stdout.count("\n") == 2 and "1 measured, 2 were there before: " in again.stderr
    fresh = run(main, "tune", "--jobs", 1, "--again")
    assert fresh.stdout.count("\n") == 4 and "3 measured: " in fresh.stderr


def test_another_file(run: Run, here: Path, played: Played) -> None:
    played.results = [found(16, {BEFORE: 9.0})]
    assert run(main, "tune", "--out", "mine/t.json", "--jobs", 1).exit_code == 0
    assert (here / "mine" / "t.json").is_file() and not (here / "tables").exists()


def test_nothing_to_measure(run: Run, here: Path, played: Played) -> None:
    result = run(main, "tune", "--jobs", 1)
    assert result.exit_code == 0 and result.stdout == "" and result.stderr == "Nothing was measured.\n"
    assert not (here / "tables").exists()


def test_a_lost_gpu(run: Run, here: Path, played: Played) -> None:
    played.results, played.lost = [found(16, {BEFORE: 9.0})], "A candidate left the GPU unusable."
    result = run(main, "tune", "--jobs", 1)
    assert result.exit_code == 1
    assert "A candidate left the GPU unusable. The same command goes on from here." in result.stderr
    assert (here / "tables" / "nvidia-h200.json").is_file()


def test_time_is_over(run: Run, here: Path, played: Played) -> None:
    played.results = [found(16, {BEFORE: 9.0})]
    result = run(main, "tune", "--jobs", 3, "--max_seconds", "1e-6")
    assert result.exit_code == 0
    assert "--max_seconds 1e-06 are over. The same command goes on from here." in result.stderr
    assert played.compiled["jobs"] == 3 and played.compiled["seconds"] == 0.5e-6


@pytest.mark.parametrize(
    ("arguments", "recipe", "d_model"),
    [
        ([], "w4a8", 2560),
        (["--recipe", "w8a8"], "w8a8", 2560),
        (["mamba2-130m"], "float", 768),
        (["mamba2-130m", "--recipe", "w4a16"], "w4a16", 768),
        (["mamba2-tiny"], "float", 48),
        (["mamba2-tiny", "--recipe", "w8a8"], "w8a8", 48),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_models(
    run: Run, here: Path, played: Played, arguments: list[str], recipe: str, d_model: int
) -> None:
    result = run(main, "tune", *arguments, "--rows", "1, 16,1", "--ops", "linear", "--jobs", 1)
    assert result.exit_code == 0, result.output
    (plan,) = played.plans
    assert plan.recipe.name == recipe and plan.config.n_layer == 1
    assert (played.rows, played.ops) == ([1, 16], ["linear.tiles", "linear.wide", "linear.words"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "1,x"], "--rows is '1,x', expected whole numbers from 1 on, such as 1,16,512."),
        (["--rows", "0"], "--rows is '0'"),
        (["--ops", "linear.tile"], "Did you mean 'linear.tiles'?"),
        (["mamba2-2.7"], "Did you mean 'mamba2-2.7b'?"),
        (["--recipe", "w4a9"], "Did you mean"),
        (["--max_seconds", "0"], "Invalid value for '--max_seconds'"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["--out", "calib.txt"], "The launch table 'calib.txt' is not valid JSON"),
        (["--out", "calib.txt/t.json"], "cannot be written"),
    ],
    ids=["rows", "row-0", "ops", "model", "recipe", "seconds", "jobs", "no-table", "no-folder"],
)
@pytest.mark.usefixtures("played")
def test_bad_input(refused: Refused, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(main, "tune", *arguments)
