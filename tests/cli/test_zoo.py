"""``quamba convert`` and ``export-zoo``, and published checkpoints as MODEL of the other commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from zoo_fixtures import zoo_path

from quamba.checkpoints.stored import stored_format
from quamba.cli import convert, evaluate, export_zoo, generate, inspect, profile, published


@pytest.fixture
def store(here: Path, repo_root: Path) -> Path:
    """``p/ut-enyac/quamba2-x-w4a8`` with the demo model's tokenizer beside it."""
    folder = here / "p" / "ut-enyac" / "quamba2-x-w4a8"
    shutil.copytree(zoo_path(repo_root, "quamba2-demo2-w4a8"), folder)
    shutil.copy(repo_root / "assets" / "models" / "mamba2-demo" / "tokenizer.json", folder)
    return here / "p"


NAME = "ut-enyac/quamba2-x-w4a8"


def test_there_and_back(run: Callable, here: Path, store: Path) -> None:
    result = run(convert.command, NAME, "ours", "--pretrained_dir", "p")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "p/ut-enyac/quamba2-x-w4a8: zoo-w4a8, 2.6 MiB, converted to 'ours'.\n"
    assert stored_format(here / "ours") == "quamba"
    assert (here / "ours" / "tokenizer.json").is_file()
    result = run(export_zoo.command, "ours", "board")
    assert result.exit_code == 0, result.stderr
    assert (result.stdout, result.stderr) == ("ours: exported to 'board'.\n", "")
    assert stored_format(here / "board") == "zoo"
    texts = {run(generate.command, m, "--prompt", "A", "--genlen", "8").stdout for m in ("ours", "board")}
    texts.add(run(generate.command, NAME, "--pretrained_dir", "p", "--prompt", "A", "--genlen", "8").stdout)
    assert len(texts) == 1


def test_inspect(run: Callable, store: Path) -> None:
    facts = json.loads(run(inspect.command, NAME, "--pretrained_dir", "p", "--json").stdout)
    assert (facts["recipe"], facts["format"], facts["solver"]) == ("zoo-w4a8", "published", "unknown")
    assert facts["plan"][1]["activations"] == "int8, 4 x 4 groups"
    assert facts["plan"][1]["weights"] == "in_proj, out_proj: int4 two level 128; conv1d: int8 split"


def test_measured_as_it_is(run: Callable, here: Path, store: Path, assets: Path) -> None:
    (here / "long.txt").write_text((assets / "data" / "heldout.txt").read_text()[:8000])
    scored = run(evaluate.command, NAME, "--pretrained_dir", "p", "--ppl_dataset", "long.txt")
    assert scored.exit_code == 0, scored.stderr
    logged = run(
        published.command,
        NAME,
        "--pretrained_dir",
        "p",
        "--eval_ppl",
        "--ppl_dataset",
        "long.txt",
        "--log_dir",
        "logs",
        "--quantize",
    )
    assert logged.exit_code == 0, logged.stderr
    assert "--quantize is ignored" in logged.stderr
    assert (here / "logs").is_dir()
    sizes = run(profile.command, NAME, "--pretrained_dir", "p", "--size", "--json")
    assert sizes.exit_code == 0, sizes.stderr


def test_a_published_model_is_used_where_it_is_stored(run: Callable, here: Path, store: Path) -> None:
    """As the published scripts do, whatever the other flags say; of its making nothing is known."""
    (store / "ut-enyac" / "quamba2-x-w4a8").rename(store / "ut-enyac" / "quamba2-tiny-w4a8")
    flags = ("--quantize", "--w_bits", "4", "--pretrained_dir", "p", "--calib_data", "calib.txt")
    result = run(generate.command, "mamba2-tiny", *flags, "--prompt", "A", "--genlen", "2")
    assert result.exit_code == 0, result.stderr
    assert "is a published model: how it was calibrated is not known, and not compared." in result.stderr


def test_refusals(refused: Callable[..., str], here: Path, store: Path) -> None:
    sentence = refused(convert.command, "mamba2-tiny", "out")
    assert sentence == "'mamba2-tiny' is a float model, expected a model of the published Quamba zoo."
    sentence = refused(export_zoo.command, "mamba2-tiny", "out")
    assert sentence.startswith("'mamba2-tiny' is not quantized, expected a quantized model")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    for command in (convert.command, export_zoo.command):
        assert "exists and is not empty" in refused(command, NAME, "full", "--pretrained_dir", "p")
        assert "holds no model" in refused(command, NAME, "full", "--pretrained_dir", "p", "--force")
    (here / "p" / NAME / "pytorch_model.bin").write_bytes(b"PK")
    assert "truncated" in refused(convert.command, NAME, "out", "--pretrained_dir", "p")
    assert not (here / "out").exists()
