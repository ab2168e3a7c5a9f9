"""Results kept on disk: whole or absent, found again, and a job that was killed goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import RMS_VARIANTS, calibration_set, rounded, shipped, with_state

from quamba.errors import QuambaError
from quamba.models.lm import MambaLM
from quamba.quantization import embedding, stages
from quamba.quantization.keys import Keys
from quamba.quantization.memory import Budget
from quamba.quantization.pipeline import quantize_model
from quamba.quantization.solve import ProjectionSolver
from quamba.quantization.source import FloatModel
from quamba.quantization.streams import first_sequences
from quamba.quantization.work import WorkFolder, file_identity, float_identity, key_of
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import Override, Recipe, precision
from quamba.recipes.report import Report

KEY = key_of("a test")


def test_what_is_put_is_found(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "deep" / "work")
    tensors = {"a": torch.arange(5), "b": torch.randn(2, 3).half().T, "c": torch.tensor(2.5)}
    assert work.get(KEY) is None and not work.has(KEY)
    work.put(KEY, tensors)
    found = WorkFolder(tmp_path / "deep" / "work").get(KEY)
    assert found is not None and work.has(KEY)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert work.get(key_of("another test")) is None
    work.drop(KEY)
    assert work.get(KEY) is None


def test_keys_say_everything() -> None:
    assert key_of("a", b=1) == key_of("a", b=1) != key_of("a", b=2)
    assert len({key_of(x) for x in ("a", ["a"], {"a": None}, None, 1, 1.5, True)}) == 7


def test_blobs_are_the_bytes_of_tensors(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.put_blob(KEY, (torch.full((2,), float(i)) for i in range(3)))
    assert work.has_blob(KEY)
    stored = torch.frombuffer(bytearray(work.blob(KEY).read_bytes()), dtype=torch.float32)
    assert stored.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_was_not_finished_is_not_there(tmp_path: Path, error: BaseException) -> None:
    work = WorkFolder(tmp_path)

    def pieces() -> Iterator[torch.Tensor]:
        yield torch.zeros(4)
        raise error

    expected = QuambaError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        work.put_blob(KEY, pieces())
    if expected is QuambaError:
        assert str(caught.value).startswith(
            f"The work folder '{tmp_path}' cannot be written (its disk is full)"
        )
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_half_a_file_counts_as_none(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.put(KEY, {"a": torch.zeros(100)})
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert work.get(KEY) is None


def test_clearing_leaves_what_others_put_there(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work")
    work.put(KEY, {"a": torch.zeros(1)})
    with work.scratch() as folder:
        (folder / "states").write_bytes(b"1")
    assert work.size_bytes() > 0
    mine = tmp_path / "work" / "mine.txt"
    mine.write_text("mine")
    work.clear()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["mine.txt"]
    mine.unlink()
    WorkFolder(tmp_path / "work").clear()
    assert not (tmp_path / "work").exists()


def test_a_file_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuambaError, match="is a file, expected a folder"):
        WorkFolder(tmp_path / "file")


def test_scratch_of_processes_that_are_gone_is_removed(tmp_path: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left = tmp_path / "scratch" / f"{gone.stdout.strip()}-0"
    mine = tmp_path / "scratch" / f"{os.getpid()}-0"
    left.mkdir(parents=True)
    mine.mkdir()
    with WorkFolder(tmp_path).scratch():
        assert not left.exists()
        assert mine.exists()


def test_identities_tell_models_apart(tmp_path: Path) -> None:
    config = tiny_config("mamba2")
    first, second = (tiny_model(config, seed).named_tensors() for seed in (0, 1))
    assert float_identity(first, {}) == float_identity(dict(reversed(first.items())), {})
    assert len({float_identity(first, {}), float_identity(second, {}), float_identity(first, {"a": 1})}) == 3
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = file_identity(tmp_path)
    assert before == file_identity(tmp_path)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert before != file_identity(tmp_path)


Job = tuple[MambaLM, Report]


def job(recipe: Recipe, *, config: str = "mamba2", **options: Any) -> Job:
    model = tiny_model(RMS_VARIANTS[config])
    network, _, report = quantize_model(model, recipe, calibration_set(model.config), **options)
    return network, report


def same(one: Job, other: Job) -> bool:
    ours, theirs = (j[0].named_tensors() for j in (one, other))
    return (
        list(ours) == list(theirs)
        and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        and (one[1].layers, one[1].head_groups) == (other[1].layers, other[1].head_groups)
    )


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for the embedding's metric."""
    monkeypatch.setattr(embedding, "TOKENS_PER_SEQUENCE", 8)


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize(
    ("config", "recipe", "state"),
    [("mamba", "zoo-w4a8", "int8"), ("mamba2-groups2", "w4a8", "int8"), ("mamba2", "w8a8", "fp16")],
)
def test_a_work_folder_changes_nothing(
    tmp_path: Path, config: str, recipe: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = with_state(shipped(recipe, RMS_VARIANTS[config]), state)
    alone = job(wanted, config=config)
    work = WorkFolder(tmp_path)
    assert same(alone, job(wanted, config=config, work=work))
    # All is there now: no block is read again.
    monkeypatch.setattr(FloatModel, "fused_block", lambda self, i: pytest.fail("a block was read"))
    assert same(alone, job(wanted, config=config, work=work))


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("kept", [True, False], ids=["states kept", "states recomputed"])
@pytest.mark.parametrize("config", ["mamba", "mamba2"])
def test_an_interrupted_job_goes_on(
    tmp_path: Path, config: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at a solution and while blocks are read; what was finished is not done again."""
    monkeypatch.setattr(stages, "KEEP_SHARE", 0 if kept else 1e-12)
    wanted = with_state(shipped("w4a8", RMS_VARIANTS[config]), "int8")
    alone = job(wanted, config=config)
    work = WorkFolder(tmp_path)
    done: list[str] = []
    solve, read = ProjectionSolver.solve_projection, FloatModel.exact_block

    def solving(self: ProjectionSolver, block: Any, aim: Any, name: str, format: Any) -> Any:
        found = solve(self, block, aim, name, format)
        if name == "out_proj":
            done.append(name)
            if len(done) == 1:
                raise KeyboardInterrupt
        return found

    reads: list[int] = []

    def reading(self: FloatModel, i: int) -> Any:
        reads.append(i)
        if len(reads) in (2, 5):
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(ProjectionSolver, "solve_projection", solving)
    monkeypatch.setattr(FloatModel, "exact_block", reading)
    interruptions = 0
    while True:
        try:
            found = job(wanted, config=config, work=work)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 3
    assert same(alone, found)
    assert len(done) == 3  # two blocks, and the one whose solution was lost with the interruption
    assert not list(tmp_path.rglob("*.bin"))  # hidden states go when their stage is over


@pytest.mark.usefixtures("short_texts")
def test_recipes_share_what_they_have_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RMS_VARIANTS["mamba2"]
    work = WorkFolder(tmp_path)
    job(shipped("w8a8", config), work=work)
    seen: list[str] = []
    advance = stages.Stream.advance

    def noted(self: Any, *args: Any, **options: Any) -> None:
        seen.append("observers" if len(args) > 1 else "weights")
        advance(self, *args, **options)

    monkeypatch.setattr(stages.Stream, "advance", noted)
    wanted = shipped("w4a8", config)
    shared = job(wanted, work=work)
    assert set(seen) == {"weights"}  # head statistics and activation scales are those of w8a8
    assert same(shared, job(wanted))
    # What differs is not taken for the same.
    wanted = rounded(wanted)
    for change in (
        {"percentile_alpha": 0.9},
        {"rotate": False},
        {"group_heads": None},
        {"parameters": "int8"},
    ):
        other = wanted.replace(**change)
        assert same(job(other, work=work), job(other)), change


@pytest.mark.parametrize(
    "change",
    [
        {"damping": 0.2},
        {"act_order": False},
        {"scale": "absmax"},
        {"refinements": 1},
        {"propagate_error": False},
        {"samples": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_solvers_find_other_weights(change: dict[str, Any]) -> None:
    """By their keys; what comes before the weights is shared."""
    config = RMS_VARIANTS["mamba2"]
    wanted = shipped("w4a8", config)
    other = wanted.replace(solver=dataclasses.replace(wanted.solver, **change))
    ours, theirs = keys(wanted), keys(other)
    assert ours.statistics(1) == theirs.statistics(1)
    assert ours.scales(1) == theirs.scales(1)
    assert ours.metric() == theirs.metric()
    assert ours.embedding(0) != theirs.embedding(0)
    assert ours.weights(0) != theirs.weights(0)
    assert ours.head(0) != theirs.head(0)
    bare = [keys(recipe.replace(embedding="float")) for recipe in (wanted, other)]
    assert bare[0].weights(0) != bare[1].weights(0)


def test_a_block_counts_for_those_after_it() -> None:
    config = RMS_VARIANTS["mamba2"]
    wanted = shipped("w4a8", config)
    int8 = (Override(blocks=(1,), precision=precision(8, 8)),)
    ours, theirs = keys(wanted), keys(wanted.replace(overrides=int8))
    assert ours.scales(1) == theirs.scales(1)
    assert ours.weights(0) == theirs.weights(0)
    assert ours.weights(1) != theirs.weights(1)
    assert ours.head(0) != theirs.head(0)


def keys(recipe: Recipe) -> Keys:
    plan = resolve(recipe, RMS_VARIANTS["mamba2"])
    batches = list(calibration_set(plan.config).batches())
    return Keys(
        "a model",
        plan,
        torch.device("cpu"),
        statistics_batches=batches,
        scales_batches=batches,
        solver_batches=first_sequences(batches, recipe.solver.samples),
        metric_batches=[ids for ids, _ in batches],
    )


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("config", ["mamba2-groups2"])
def test_states_in_files_change_nothing(tmp_path: Path, config: str) -> None:
    wanted = shipped("w4a8", RMS_VARIANTS[config])
    budget = Budget(torch.device("cpu"), memory_bytes=1000)
    assert budget.place(251) == "file"
    assert same(job(wanted, config=config), job(wanted, config=config, budget=budget))
    assert same(
        job(wanted, config=config), job(wanted, config=config, budget=budget, work=WorkFolder(tmp_path))
    )
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("recipe", ["w4a8", "zoo-w4a8", "w8a8"])
def test_tables_in_parts_change_nothing(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the embedding and the head are problems of their own; sums of products may round otherwise."""
    wanted = shipped(recipe, RMS_VARIANTS["mamba2-bias-untied"])
    whole = job(wanted, config="mamba2-bias-untied")
    monkeypatch.setattr("quamba.quantization.source.SLAB_ELEMENTS", 20 * 32)
    parts = job(wanted, config="mamba2-bias-untied")
    for table in ("backbone.embedding", "lm_head"):
        one, other = (j[0].get_submodule(table).weight for j in (whole, parts))
        assert one.format == other.format
        moved = (one.codes().int() - other.codes().int()).abs()
        assert int(moved.max()) <= 1
        assert float((moved > 0).float().mean()) < 0.01
        torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=0.2, atol=0.2)


_SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, shipped
from quamba.checkpoints.quantized import write_quantized
from quamba.quantization import embedding, stages
from quamba.quantization.pipeline import quantize_model
from quamba.quantization.work import WorkFolder
stages.KEEP_SHARE = 0
embedding.TOKENS_PER_SEQUENCE = 8
config = tiny_config("mamba2", n_layer=12, d_model=64)
recipe, out = shipped("w4a8", config), Path(sys.argv[2])
work = WorkFolder(out.with_suffix(".work"))
network, plan, report = quantize_model(tiny_model(config), recipe, calibration_set(config, num=12), work=work)
report.seconds = {}
write_quantized(out, network, plan, source="a test", report=report, tokenizer=None)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 whenever two more results are there, until the job is done."""
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parents[1])]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    kills = 0
    while True:
        process = subprocess.Popen([*command, str(tmp_path / "killed")])
        there = _results(tmp_path / "killed.work")
        while process.poll() is None and _results(tmp_path / "killed.work") < there + 15:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills >= 2
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name


def _results(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))
