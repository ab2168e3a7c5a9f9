"""quamba search on tiny models: what is printed, written, saved and refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import quamba
from quamba.cli import search as cli
from quamba.cli.main import main
from quamba.cli.published import command as published
from quamba.search.methods.registry import METHODS
from quamba.search.objective import OBJECTIVES

Run = Callable[..., Result]
Refused = Callable[..., str]
TEXT = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32, "--device", "cpu")
SEARCH = (*TEXT, "--objective_num", 3)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_found_saved_and_made_again(run: Run, here: Path, family: str) -> None:
    asked = ("--budget", "1xW4A16", "-o", "found", "--save", "mixed")
    result = run(main, "search", f"{family}-tiny", *asked, *SEARCH)
    assert result.exit_code == 0, result.output
    labels = json.loads((here / "found" / "hybrid_blocks_config.json").read_text())
    assert sorted(labels) == ["W4A16", "W4A8"]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["blocks", "KL", "to", "the", "float", "model,", "nats"]
    assert lines[2].split()[:3] == ["found", *labels]
    assert f"W4A16: 1 blocks ({labels.index('W4A16')})." in lines
    assert lines[-1] == "Saved to 'mixed'."
    mixed = quamba.load(here / "mixed")
    assert [block.label for block in mixed.plan.blocks] == labels
    assert mixed.tokenizer is not None
    assert torch.isfinite(mixed(torch.arange(1, 20)[None]).logits).all()
    assert run(main, "generate", "mixed", "--genlen", 5, "--device", "cpu").exit_code == 0
    made = run(main, "quantize", f"{family}-tiny", "--recipe", "found/recipe.toml", "-o", "again", *TEXT)
    assert made.exit_code == 0, made.output
    assert quamba.load(here / "again").recipe == mixed.recipe
    config = ("--hybrid_blocks", "--hybrid_blocks_config", "found/hybrid_blocks_config.json")
    kept = run(published, f"{family}-tiny", "--quantize", *config, "--pretrained_dir", "p", *TEXT)
    assert kept.exit_code == 0, kept.output
    name = f"{family.replace('mamba', 'quamba')}-tiny-w4aX-hybrid_blocks_config"
    stored = quamba.load(here / "p" / "ut-enyac" / name)
    assert [block.label for block in stored.plan.blocks] == labels


def test_json_and_a_second_budget(run: Run, here: Path) -> None:
    """The folder keeps blocks and scores for the next search."""
    first = run(main, "search", "mamba2-tiny", "--budget", "1xW4A16", "-o", "found", "--json", *SEARCH)
    assert first.exit_code == 0, first.output
    shown = json.loads(first.stdout)
    assert (shown["method"], shown["budget"]["counts"], shown["evaluations"]) == ("auto", {"W4A16": 1}, 2)
    assert Path(shown["files"][0]).is_file()
    made = {path: path.stat().st_mtime_ns for path in (here / "found" / "blocks").rglob("*.safetensors")}
    budget = ("--budget", "weights=1MB", "--precisions", "W4A16")
    second = run(main, "search", "mamba2-tiny", *budget, "-o", "found", "--json", *SEARCH)
    assert second.exit_code == 0, second.output
    with (here / "found" / "candidates.csv").open() as file:
        scores = {row["blocks"]: float(row["score"]) for row in csv.DictReader(file)}
    # The budget allows all four; of random weights any may be the best.
    assert len(scores) == 4
    assert " ".join(json.loads(second.stdout)["chosen"]) == min(scores, key=lambda blocks: scores[blocks])
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_limits_are_printed(run: Run, here: Path) -> None:
    asked = ("--budget", "tpot=1s", "--time", "predicted", "--bandwidth", 5, "--precisions", "W8A8")
    result = run(main, "search", "mamba-tiny", *asked, "-o", "found", *SEARCH)
    assert result.exit_code == 0, result.output
    assert "of at most 1,000 ms." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--budget", "3xW4A16"), "The budget asks for 3 blocks, but the model has 2; expected at most 2."),
        (("--budget", "1xW4A6"), "The precision is 'W4A6', expected one of 'W8A8', "),
        (("--budget", "1xW4A8"), "The budget '1xW4A8' counts the blocks of W4A8, "),
        (("--budget", "many"), "The budget is 'many', expected a count such as 14xW4A16"),
        (("--budget", "tpot=1MB"), "The unit in 'tpot=1MB' is 'MB', expected one of 'us', 'ms', 's'."),
        (("--budget", "1xW4A16", "--precisions", "W8A8"), "The budget counts W4A16, which is not among"),
        (("--budget", "1xW4A16", "--precisions", "W4A16,W8A8"), "The budget says nothing of W8A8, expected"),
        (("--budget", "1xW4A16", "--precisions", "W4A7"), "The precision is 'W4A7', expected one of"),
        (("--budget", "1xW4A16", "--recipe", "w4a9"), "The recipe is 'w4a9', expected one of"),
        (("--budget", "1xW4A16", "--task_list", "arc"), "The objective 'kl' takes no tasks"),
        (
            ("--budget", "1xW4A16", "--objective_seqlen", "99"),
            "--objective_seqlen is 99 and --calib_seqlen is 32,",
        ),
        (("--budget", "1xW4A16", "--method", "greddy"), "Invalid value for '--method': 'greddy' is not one"),
        (("--budget", "1xW4A16", "--save", "mamba-tiny"), "'mamba-tiny' exists and is not empty"),
        (("--budget", "1xW4A16", "--calib_data", "no.txt"), "no.txt"),
        ((), "Missing option '--budget'."),
    ],
    ids=lambda value: "_".join(value[1::2]) if isinstance(value, tuple) else "",
)
def test_refused(refused: Refused, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(main, "search", "mamba2-tiny", "-o", "found", *SEARCH, *arguments)


def test_refused_models_and_folders(refused: Refused, here: Path) -> None:
    budget = ("--budget", "1xW4A16", *SEARCH)
    said = refused(main, "search", "mamba2-tiny", "-o", "calib.txt", *budget)
    assert "'calib.txt' is a file, expected a folder" in said
    (here / "full").mkdir()
    (here / "full" / "x").write_text("x")
    said = refused(main, "search", "mamba2-tiny", "-o", "full", *budget)
    assert said.startswith("'full' is not empty and no folder of a search")
    assert "was not found" in refused(main, "search", "mamba-tinny", "-o", "found", *budget)


def test_the_choices_are_those_of_the_library() -> None:
    assert set(METHODS) == set(cli._METHODS)
    assert cli._OBJECTIVES == OBJECTIVES


def test_a_budget_too_small_names_the_least(run: Run, here: Path) -> None:
    result = run(main, "search", "mamba2-tiny", "--budget", "weights=1kB", "-o", "found", *SEARCH)
    assert result.exit_code == 2
    assert "No choice of W4A8, W4A16 keeps the budget: weights is at least" in result.stderr
