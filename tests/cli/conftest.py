"""A tiny float model of each family on disk, with a tokenizer and texts; the commands run in process."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_models import tiny_config, tiny_model

from quamba.checkpoints.upstream import write_state_spaces

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def _float_models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("float_models")
    for family in ("mamba", "mamba2"):
        config = tiny_config(family, vocab_size=257)
        folder = root / f"{family}-tiny"
        write_state_spaces(folder, config, tiny_model(config).named_tensors())
        shutil.copy(tiny_tokenizer_folder / "tokenizer.json", folder)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _float_models: Path) -> Path:
    """The working folder of a test: ``mamba-tiny`` and ``mamba2-tiny``, ``calib.txt`` and ``eval.txt``."""
    for folder in _float_models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for name, seed in (("calib.txt", 1), ("eval.txt", 2)):
        words = random.Random(seed).choices(["sea", "ship", "storm", "harbour", "captain", "rope"], k=600)
        (tmp_path / name).write_text(" ".join(words))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Run:
    """run(command, *arguments) -> the result, stdout and stderr apart."""

    def invoke(command: click.Command, *arguments: object) -> Result:
        result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refused(run: Run, here: Path) -> Callable[..., str]:
    """refused(command, *arguments) -> the one sentence; checks status 2 and that nothing was written."""

    def invoke(command: click.Command, *arguments: object) -> str:
        before = _tree(here)
        result = run(command, *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert _tree(here) == before
        lines = [line for line in result.stderr.splitlines() if not line.startswith("Try '")]
        assert lines[-1].startswith("Error: ")
        assert "Traceback" not in result.stderr
        assert sum(line.startswith("Error: ") for line in lines) == 1
        return lines[-1].removeprefix("Error: ")

    return invoke


def _tree(folder: Path) -> dict[str, int]:
    """Every path under a folder with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}
