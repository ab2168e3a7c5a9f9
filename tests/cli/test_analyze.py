"""quamba analyze on tiny models: what is printed, written and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from zoo_fixtures import zoo_path

import quamba
from quamba.cli.main import main
from quamba.evaluation.perplexity import perplexity, windows

Run = Callable[..., Result]
Refused = Callable[..., str]
TEXT = ("--data", "eval.txt", "--windows", 3, "--seqlen", 32, "--device", "cpu")
CALIBRATION = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32, "--device", "cpu")


@pytest.fixture
def small(run: Run, here: Path) -> Path:
    """``small``, a W8A8 model made of ``mamba2-tiny``."""
    result = run(main, "quantize", "mamba2-tiny", "--recipe", "w8a8", "-o", "small", *CALIBRATION)
    assert result.exit_code == 0, result.output
    return here / "small"


def analyzed(run: Run, *arguments: object) -> dict[str, Any]:
    result = run(main, "analyze", *arguments, *TEXT, "--json")
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_the_table(run: Run, small: Path) -> None:
    result = run(main, "analyze", "small", *TEXT, "--top", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "small (w8a8) against mamba2-tiny (float32): 3 windows of 32 tokens of eval.txt"
    assert lines[1].startswith("KL ") and "same most likely token at " in lines[1]
    start = lines.index("Worst sites, by the error that a block adds to what the float model gives it:")
    worst = [line.split() for line in lines[start + 3 : start + 7]]
    own = [float(cells[2]) for cells in worst]
    assert own == sorted(own) and lines[start + 7].startswith("Largest channels, next to the median one: ")
    header = next(line for line in lines if line.startswith("layer  residual"))
    assert header.split() == [
        *(
            "layer",
            "residual",
            "norm",
            "in_proj",
            "z",
            "dt",
            "x",
            "B",
            "C",
            "scan",
            "gated",
            "rotate",
            "out_proj",
        ),
    ]
    rows = lines[lines.index(header) + 2 :][:2]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert sum(line.startswith("Outside the layers: embedding ") for line in lines) == 2
    assert "Left out" not in result.stdout


def test_json_is_what_evaluate_measures(run: Run, small: Path) -> None:
    record = analyzed(run, "small")
    assert (record["model"], record["against"], record["text"]) == ("small", "mamba2-tiny", "eval.txt")
    assert (record["windows"], record["window_length"], record["left_out"]) == (3, 32, {})
    assert record["recipe"]["name"] == "w8a8"
    models = [quamba.load(name) for name in ("small", "mamba2-tiny")]
    ids = windows(models[0].require_tokenizer().encode(Path("eval.txt").read_text()), 32)[:3]
    measured = [perplexity(lambda b, m=m: m(b).logits, ids).perplexity for m in models]
    found = [record["logits"]["perplexity"], record["logits"]["float_perplexity"]]
    assert found == pytest.approx(measured, rel=1e-5)
    assert 0 < record["logits"]["kl_mean"] < record["logits"]["kl_max"] < 1
    assert [s["site"] for s in record["sites"] if s["layer"] is None] == [
        *("embedding", "residual", "norm_f", "logits")
    ]


def test_a_float_model_against_itself(run: Run, here: Path) -> None:
    record = analyzed(run, "mamba-tiny", "--against", "mamba-tiny")
    assert {s["snr_db"] for s in record["sites"]} == {"inf"}
    assert record["logits"]["kl_max"] == 0 and record["weights"] == []
    result = run(main, "analyze", "mamba-tiny", "--against", "mamba-tiny", *TEXT)
    assert "Worst sites" not in result.stdout and "inf" in result.stdout


def test_pictures_and_the_report_are_written(run: Run, small: Path, here: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(main, "analyze", "small", *TEXT, "-o", "out/new", "--json")
    assert result.exit_code == 0, result.output
    folder = here / "out" / "new"
    assert sorted(p.name for p in folder.iterdir()) == ["analysis.json", "kl.png", "ranges.png", "snr.png"]
    assert json.loads((folder / "analysis.json").read_text()) == json.loads(result.stdout)
    for name in ("kl", "ranges", "snr"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"out/new/{name}.png" in result.stderr


def test_a_published_model_by_its_name(run: Run, here: Path, repo_root: Path, assets: Path) -> None:
    """It names no float model, and has two of the demo model's six layers."""
    folder = here / "p" / "ut-enyac" / "quamba2-x-w4a8"
    shutil.copytree(zoo_path(repo_root, "quamba2-demo2-w4a8"), folder)
    sentence = run(main, "analyze", "quamba2-x-w4a8", "--pretrained_dir", "p", *TEXT).stderr
    assert "is a published model, which does not name it; say with --against what to compare" in sentence
    demo = assets / "models" / "mamba2-demo"
    refused = run(main, "analyze", "quamba2-x-w4a8", "--pretrained_dir", "p", "--against", demo, *TEXT)
    assert "The two models differ in n_layer (2 and 6), expected the float model" in refused.stderr


def test_the_bundled_text_is_the_default_of_bundled_models(
    run: Run, here: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = assets / "models" / "mamba-demo"
    flags = ("--windows", 1, "--seqlen", 8, "--device", "cpu", "--json")
    result = run(main, "analyze", model, "--against", model, *flags)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == str(assets / "data" / "heldout.txt")


BAD = {
    "a float model alone": (
        ("mamba-tiny", *TEXT),
        "'mamba-tiny' is float; say with --against what to compare it",
    ),
    "another family": (
        ("mamba-tiny", "--against", "mamba2-tiny", *TEXT),
        "The two models differ in family (mamba and mamba2), expected the float model that",
    ),
    "no such model": (("mamba-tiny", "--against", "nothing/there/at-all", *TEXT), "'nothing/there/at-all'"),
    "no such text": (
        ("mamba-tiny", "--against", "mamba-tiny", "--data", "eval.text"),
        "There is no 'eval.text'",
    ),
    "a short text": (
        ("mamba-tiny", "--against", "mamba-tiny", "--data", "eval.txt", "--seqlen", 100000),
        "fewer than one window of 100000.",
    ),
    "a file as folder": (
        ("mamba-tiny", "--against", "mamba-tiny", *TEXT, "-o", "eval.txt"),
        "--output 'eval.txt' is a file, expected a folder.",
    ),
    "another device": (("mamba-tiny", "--against", "mamba-tiny", "--device", "gpu"), "The device is 'gpu'"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(refused: Refused, arguments: tuple[object, ...], part: str) -> None:
    assert part in refused(main, "analyze", *arguments)


def test_a_float_model_that_has_moved(refused: Refused, small: Path, here: Path) -> None:
    (here / "mamba2-tiny").rename(here / "moved")
    sentence = refused(main, "analyze", "small", *TEXT)
    assert sentence.startswith("'small' was made from 'mamba2-tiny', which is not found (")
    assert sentence.endswith("; say with --against where it is.")


def test_it_is_found_where_it_is_said_to_be(run: Run, small: Path, here: Path) -> None:
    (here / "mamba2-tiny").rename(here / "moved")
    assert analyzed(run, "small", "--against", "moved")["against"] == "moved"


def test_other_tokenizers_are_refused(refused: Refused, small: Path, here: Path) -> None:
    other = here / "other"
    shutil.copytree(here / "mamba2-tiny", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["s"] = vocabulary["s"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = refused(main, "analyze", "small", "--against", "other", *TEXT)
    assert sentence.startswith("The tokenizers of the two models read the text differently, expected ")


def test_one_tokenizer_is_enough_and_none_is_refused(run: Run, refused: Refused, small: Path) -> None:
    (small / "tokenizer.json").unlink()
    assert analyzed(run, "small")["windows"] == 3
    sentence = refused(main, "analyze", "small", "--against", "small", *TEXT)
    assert sentence.endswith("A text needs the tokenizer of one of the two models.")


def test_pictures_need_matplotlib(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from quamba.analysis import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    sentence = refused(main, "analyze", "mamba-tiny", "--against", "mamba-tiny", *TEXT, "-o", "out")
    assert sentence == (
        "A plot needs the package 'matplotlib', which is not installed; "
        "install it with: pip install 'quamba[plot]'"
    )
