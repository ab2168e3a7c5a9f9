"""Errors, exit codes, help, progress, tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from quamba.cli.console import Command, TqdmProgress, table
from quamba.cli.main import _COMMANDS, main
from quamba.errors import QuambaError


def _raises(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "stderr"),
    [
        (QuambaError("A sentence."), 2, "Error: A sentence.\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Error: '/x': Permission denied.\n"),
    ],
)
def test_bad_input_is_one_sentence(error: Exception, status: int, stderr: str) -> None:
    result = CliRunner().invoke(_raises(error), [])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", stderr)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_too_little_memory_is_one_sentence(error: Exception) -> None:
    result = CliRunner().invoke(_raises(error), [])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: There is not enough memory for this run, expected fewer")
    assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_is_130() -> None:
    result = CliRunner().invoke(_raises(KeyboardInterrupt()), [])
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("ours, without a file"), RuntimeError("ours")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    assert CliRunner().invoke(_raises(error), []).exception is error


@pytest.mark.parametrize("name", list(_COMMANDS))
def test_help_of_every_command(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_help_of_the_group_lists_every_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, (_, line) in _COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert line in result.stdout


def test_help_imports_nothing_heavy(repo_root: Path) -> None:
    """All help pages in one process, among them those of the root scripts."""
    script = """
import sys
from click.testing import CliRunner
from quamba.cli.main import _COMMANDS, main
from quamba.cli.published import command
for target, arguments in [(main, []), (command, []), *((main, [name]) for name in _COMMANDS)]:
    assert CliRunner().invoke(target, [*arguments, "--help"]).exit_code == 0, arguments
print(sorted({"torch", "numpy", "tokenizers", "tqdm", "huggingface_hub"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=repo_root / "src", check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        with TqdmProgress(verbose) as progress:
            progress.stage("Weights", 3)
            progress.step(2)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("Weights" in captured.err, "2/3" in captured.err) == (verbose, verbose)


def test_numbers_stand_to_the_right() -> None:
    lines = table(("name", "MiB"), [("a", "1.50"), ("long", "-"), ("b", "12.25")]).splitlines()
    assert lines == ["name    MiB", "----  -----", "a      1.50", "long      -", "b     12.25"]
