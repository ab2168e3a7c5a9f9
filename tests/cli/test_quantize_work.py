"""quamba quantize: interrupted and gone on with, within limits of memory, with a disk that is full."""

from __future__ import annotations

import errno
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from quamba.cli.main import main
from quamba.quantization.solve import ProjectionSolver

Run = Callable[..., Result]
Refused = Callable[..., str]
TEXTS = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32, "--device", "cpu")
W4A8 = ("quantize", "mamba2-tiny", "--recipe", "w4a8", *TEXTS)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("option", [("--resume",), ("--work_dir", "elsewhere")], ids=["resume", "work_dir"])
def test_an_interrupted_run_goes_on(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    assert run(main, *W4A8, "-o", "whole").exit_code == 0
    work = here / ("out.work" if option == ("--resume",) else "elsewhere")
    solve = ProjectionSolver.solve_projection
    solved: list[str] = []

    def solving(self: Any, block: Any, aim: Any, name: str, format: Any) -> Any:
        if len(solved) == 3:
            solved.append("interrupted")
            raise KeyboardInterrupt
        solved.append(name)
        return solve(self, block, aim, name, format)

    monkeypatch.setattr(ProjectionSolver, "solve_projection", solving)
    first = run(main, *W4A8, "-o", "out", *option)
    assert first.exit_code == 130
    assert work.is_dir()
    assert not (here / "out").exists()
    second = run(main, *W4A8, "-o", "out", *option)
    assert second.exit_code == 0, second.output
    assert f"Going on with what is in '{work.relative_to(here)}'" in second.stderr
    assert solved == ["in_proj", "out_proj", "in_proj", "interrupted", "in_proj", "out_proj"]
    assert weights(here / "out") == weights(here / "whole")
    assert not work.exists()


def test_a_kept_work_folder_serves_other_recipes(run: Run, here: Path) -> None:
    shared = ("--work_dir", "work", "--keep_work")
    assert run(main, *W4A8, "-o", "a", *shared).exit_code == 0
    results = {p for p in (here / "work").rglob("*.safetensors")}
    w8a8 = ("quantize", "mamba2-tiny", "--recipe", "w8a8", *TEXTS)
    assert run(main, *w8a8, "-o", "b", *shared).exit_code == 0
    added = {p for p in (here / "work").rglob("*.safetensors")} - results
    assert len(added) == 4  # two blocks, two tables; scales and head statistics were there
    assert run(main, *w8a8, "-o", "c").exit_code == 0
    assert weights(here / "b") == weights(here / "c")


def test_limits_change_nothing(run: Run, here: Path) -> None:
    for name, limits in (("a", ()), ("b", ("--max_memory", "8K", "--max_gpu_memory", "1G"))):
        result = run(main, *W4A8, "-o", name, *limits)
        assert result.exit_code == 0, result.output
        assert "Peak memory " in result.stdout
    assert weights(here / "a") == weights(here / "b")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--max_memory", "8X"), "The memory size is '8X', expected a number of bytes such as 8G or 500M."),
        (("--max_gpu_memory", "-1"), "The memory size is '-1', expected"),
        (("--keep_work",), "--keep_work has no effect alone, expected --work_dir DIR or --resume with it."),
        (("--work_dir", "calib.txt"), "The work folder 'calib.txt' is a file, expected a folder."),
        (("--device", "cpx"), "Did you mean 'cpu'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_refused(refused: Refused, here: Path, options: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(main, *W4A8, "-o", "out", *options)
    assert not (here / "out").exists()


def test_a_disk_without_room_is_refused_before_any_work(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quamba.api.quantize", lambda *args, **options: pytest.fail("work was done"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=3 << 10))
    message = refused(main, *W4A8, "-o", "deep/out")
    assert "MiB, and the disk of 'deep/out' has 0 MiB free; make room or give another folder." in message
    assert not (here / "deep").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing(file: Path, *rest: object) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quamba.checkpoints.tensors._write_safetensors", writing)
    before = set(here.iterdir())
    assert "The disk of 'out' is full; nothing of the model was left there." in refused(
        main, *W4A8, "-o", "out"
    )
    assert set(here.iterdir()) == before
