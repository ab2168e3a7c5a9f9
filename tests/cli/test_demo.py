"""quamba demo, on a tiny model in the bundled model's place."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import quamba
from quamba.cli import demo
from quamba.cli.main import main

Run = Callable[..., Result]


@pytest.fixture
def small_assets(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of one token a byte, 17 windows of 1,024 to score; fewer calibration samples than users have."""
    monkeypatch.setattr(demo, "SLICE", (16, 8))
    monkeypatch.setattr(demo, "FULL", (None, 16))
    root = here / "assets"
    (root / "data").mkdir(parents=True)
    shutil.copytree((here / "mamba2-tiny").resolve(), root / "models" / "mamba2-demo")
    for name, seed, tokens in (("calibration.txt", 3, 16 * 512), ("heldout.txt", 4, 17 * 1024)):
        text = " ".join(random.Random(seed).choices(["sea", "ship", "storm", "rope"], k=tokens))
        (root / "data" / name).write_text(text[:tokens])
    return root


def test_the_demo_measures_what_it_reloads(run: Run, small_assets: Path, here: Path) -> None:
    result = run(main, "demo", "--assets", "assets", "-o", "models", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    rows = {row["precision"]: row for row in shown["rows"]}
    assert list(rows) == ["float", "W8A8", "W4A8", "W4A16"]
    assert shown["scored"].startswith("heldout.txt: the first 16 windows of 1,024 tokens, 16,368 tokens")
    assert rows["float"]["quantize_seconds"] is None
    for name in ("w8a8", "w4a8", "w4a16"):
        folder = here / "models" / f"quamba2-demo-{name}"
        assert quamba.load(folder).recipe == quamba.load_recipe(name)
        file_bytes = (folder / "model.safetensors").stat().st_size
        assert rows[name.upper()]["size_mib"] == pytest.approx(file_bytes / 2**20)
        evaluate = ("evaluate", folder, "--ppl_dataset", "assets/data/heldout.txt", "--max_windows", 16)
        again = json.loads(run(main, *evaluate, "--device", "cpu", "--json").stdout)
        assert again["ppl"]["heldout.txt"] == rows[name.upper()]["perplexity"]


def test_the_full_demo_scores_everything(run: Run, small_assets: Path) -> None:
    result = run(main, "demo", "--assets", "assets", "-o", "models", "--full")
    assert result.exit_code == 0, result.output
    assert "heldout.txt: all 17 windows" in result.stdout
    assert "16 samples of at most 512 tokens" in result.stdout
    assert "Written by 'models/quamba2-demo-w4a8' (W4A8), reloaded from disk:" in result.stdout
    assert "A slice" not in result.stdout


def test_the_demo_replaces_models_only(run: Run, small_assets: Path, here: Path) -> None:
    (here / "models" / "quamba2-demo-w8a8").mkdir(parents=True)
    (here / "models" / "quamba2-demo-w8a8" / "letter.txt").write_text("dear")
    result = run(main, "demo", "--assets", "assets", "-o", "models")
    assert result.exit_code == 2
    assert "holds no model" in result.stderr
