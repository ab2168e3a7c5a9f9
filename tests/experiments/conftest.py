"""A sweep of stand-in runs, and a tiny float model for real ones."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_config, tiny_model

import quamba
from quamba.checkpoints.upstream import write_state_spaces

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _stand_ins_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a sweep import the stand-ins by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    paths = [str(FOLDER), str(Path(quamba.__file__).parents[1])]  # absolute: tests change the folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sweep_file(here: Path) -> Callable[..., Path]:
    """sweep_file(*names): a file with these runs, all of one model."""

    def write(*names: str, extra: str = "") -> Path:
        runs = "\n".join(f'[[run]]\nname = "{name}"\nset = {{ model = "{name}" }}' for name in names)
        text = f'name = "trial"\n[defaults]\nquantize = true\ndevice = "cpu"\n{runs}\n{extra}'
        (here / "trial.toml").write_text(text)
        return here / "trial.toml"

    return write


@pytest.fixture
def tiny_models_here(here: Path, tiny_tokenizer_folder: Path) -> Path:
    """``mamba2-tiny`` and texts in the working folder."""
    config = tiny_config("mamba2", vocab_size=257)
    write_state_spaces(here / "mamba2-tiny", config, tiny_model(config).named_tensors())
    shutil.copy(tiny_tokenizer_folder / "tokenizer.json", here / "mamba2-tiny")
    for name, seed in (("calib.txt", 1), ("eval.txt", 2)):
        words = random.Random(seed).choices(["sea", "ship", "storm", "harbour", "captain"], k=600)
        (here / name).write_text(" ".join(words))
    return here
