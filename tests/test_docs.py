"""The documents say what is true: paths exist, commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
# Written as `…` in the documents and not meant as files of this repository.
_PATH = re.compile(r"(?:\]\(|`)((?:docs|src|assets|benchmarks|examples|configs|tests|recipes)/[\w./-]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_paths_exist(document: Path) -> None:
    for name in _PATH.findall(document.read_text(encoding="utf-8")):
        assert any((base / name).exists() for base in (ROOT, ROOT / "src" / "quamba")), name


def test_the_readme_links_every_document_folder() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("docs/architecture.md", "docs/format.md", "docs/differences.md", "docs/notes/"):
        assert name in readme


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _commands() -> list[str]:
    lines = [line.split("   #")[0].strip() for block in _blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in _commands() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.slow
def test_the_readme_runs_as_written(tmp_path: Path) -> None:
    """Every command and the library example, in order, from a folder that sees the repository's files."""
    for name in ("assets", "main.py", "generate.py", "src", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [shlex.split(line) for line in _commands() if not line.startswith("make ")]
    assert [c[0] for c in commands] == ["quamba"] * 4 + ["python"] * 2
    for command in commands:
        launcher = ["-m", "quamba"] if command[0] == "quamba" else []
        if command[1] == "quantize":
            command += ["--calib_data_num", "16"]  # the same command, sooner
        _run([sys.executable, *launcher, *command[1:]], tmp_path)
    for block in _blocks("python"):
        _run([sys.executable, "-c", block], tmp_path)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert done.stdout.strip(), command
