"""The documents say what is true: paths exist, commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from zoo_fixtures import zoo_path

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
    for name in (
        "docs/architecture.md",
        "docs/format.md",
        "docs/zoo.md",
        "docs/differences.md",
        "docs/notes/",
    ):
        assert name in readme


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _commands(language: str = "bash") -> list[str]:
    lines = [line.split("   #")[0].strip() for block in _blocks(language) for line in block.splitlines()]
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


@pytest.mark.slow
def test_the_commands_of_the_model_zoo_run_on_real_files(tmp_path: Path) -> None:
    """As written but for the text to score, with small files of the format under the published names."""
    for name in ("assets", "main.py", "generate.py", "chat.py", "profile_mamba.py", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    store = tmp_path / "pretrained_models" / "ut-enyac"
    stands_for = {
        "quamba2-2.7b-w4a8": "quamba2-demo2-w4a8",
        "quamba2-2.7b-w4a16": "quamba2-demo2-w4a16",
        "quamba-chat-w4a8": "quamba2-demo2-w4a8",
    }
    for name, fixture in stands_for.items():
        shutil.copytree(zoo_path(ROOT, fixture), store / name)
        shutil.copy(ROOT / "assets" / "models" / "mamba2-demo" / "tokenizer.json", store / name)
    commands = [shlex.split(line) for line in _commands("sh")]
    verbs = {command[1] for command in commands}
    assert {"generate", "evaluate", "inspect", "convert", "export-zoo"} < verbs
    assert {"main.py", "generate.py", "chat.py", "profile_mamba.py"} < verbs
    for command in commands:
        launcher = ["-m", "quamba"] if command[0] == "quamba" else []
        arguments = ["assets/data/heldout.txt" if word == "wikitext2" else word for word in command[1:]]
        extra = {
            "evaluate": ["--max_windows", "2"],
            "main.py": ["--testing"],
            "profile_mamba.py": ["--repeats", "2"],
        }.get(command[1], [])
        _run([sys.executable, *launcher, *arguments, *extra], tmp_path, "Hello, who are you?\n")
    assert (tmp_path / "out" / "for-the-board" / "pytorch_model.bin").is_file()


def _run(command: list[str], folder: Path, typed: str = "") -> None:
    done = subprocess.run(command, cwd=folder, input=typed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert done.stdout.strip(), command
