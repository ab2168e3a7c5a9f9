"""quamba compare on what evaluate and profile wrote of tiny models, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from run_records import log, profile, quantized, task, text

from quamba.cli.main import main
from quamba.profiling import machine
from quamba.reporting import charts

Run = Callable[..., Result]
Refused = Callable[..., str]


def put(name: str, record: object) -> str:
    Path(name).write_text(json.dumps(record))
    return name


def test_what_evaluate_and_profile_wrote_is_one_row_a_model(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "copy_bytes", lambda device: 1 << 16)
    calibration = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32)
    done = run(main, "quantize", "mamba2-tiny", "--recipe", "w8a8", "-o", "small", *calibration)
    assert done.exit_code == 0, done.output
    for model in ("mamba2-tiny", "small"):
        score = ("--ppl_dataset", "eval.txt", "--seqlen", 32, "--max_windows", 2, "--log_dir", "logs")
        assert run(main, "evaluate", model, *score).exit_code == 0
        short = ("--prompt_len", 6, "--gen_len", 3, "--repeats", 2)
        assert run(main, "profile", model, *short, "--log_dir", "logs").exit_code == 0
    result = run(main, "compare", "logs", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert [model["label"] for model in found["models"]] == ["mamba2-tiny float", "mamba2-tiny w8a8"]
    assert [len(model["files"]) for model in found["models"]] == [2, 2]
    names = ["eval.txt perplexity", "weights", "cache of a sequence", "TTFT", "TPOT", "TTLT", "decode"]
    assert [metric["name"] for metric in found["metrics"]] == names
    for model in found["models"]:
        assert [len(values) for values in model["values"].values()] == [1] * len(names)
    shown = run(main, "compare", "logs")
    assert "eval.txt perplexity: the first 2 windows, 32 tokens a window, " in shown.stdout
    lines = [line.split("  ")[0] for line in shown.stdout.splitlines()]
    assert lines.count("mamba2-tiny w8a8") == 3 and "Speed" in lines


def test_files_are_written_and_notes_are_said(run: Run, here: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'quamba[plot]'")
    first = put("a.json", log(scored={"e": text(32.0)}))
    second = put("b.json", quantized(scored={"e": text(33.0, windows=8)}))
    result = run(main, "compare", first, second, "-o", "out", "--csv", "all.csv", "--title", "Mine")
    assert result.exit_code == 0, result.output
    assert "Note: e perplexity: measured in 2 ways that are not comparable" in result.stderr
    assert "Picture: 'out/compare.png', page: 'out/compare.html'." in result.stderr
    assert sorted(p.name for p in Path("out").iterdir()) == ["compare.html", "compare.png"]
    assert "<h1>Mine</h1>" in Path("out/compare.html").read_text()
    with open("all.csv", newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["32.0", "28.75", "33.0", "8.886"]


def test_published_numbers_are_rows(run: Run, here: Path) -> None:
    path = put("a.json", profile("state-spaces/mamba2-8b", "w4a8"))
    result = run(main, "compare", path, "--published")
    assert result.exit_code == 0, result.output
    assert "7.43 (Table 5)" in result.stdout
    assert "Note: Published numbers: Quamba2 (ICML 2025" in result.stderr


def test_what_is_left_out_of_a_folder_is_said(run: Run, here: Path) -> None:
    Path("logs").mkdir()
    put("logs/a.json", log())
    put("logs/other.json", {"text": "generated"})
    result = run(main, "compare", "logs")
    assert result.exit_code == 0
    assert "Note: Left out: 'logs/other.json' is JSON, but of no run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Missing argument 'RUN.json|DIR...'"),
        (("none.json",), "There is no file or folder 'none.json'"),
        (("calib.txt",), "'calib.txt' is no JSON"),
        (("other.json",), "'other.json' is JSON, but of no run"),
        (("a.json", "times.json"), "no metric in common"),
        (("a.json", "-o", "calib.txt/x"), "--output 'calib.txt/x' cannot be made"),
        (("a.json", "--csv", "none/x.csv"), "--csv 'none/x.csv' is in no folder that exists"),
        (("a.json", "--csv", "mamba-tiny"), "--csv 'mamba-tiny' is a folder"),
    ],
    ids=["nothing", "missing", "text", "other JSON", "no metric", "output", "csv folder", "csv"],
)
def test_bad_input_is_one_sentence(
    run: Run, here: Path, refused: Refused, arguments: tuple[str, ...], sentence: str
) -> None:
    put("a.json", log(tasks=[task("t", "acc", 0.5)]))
    put("times.json", profile("models/other", size=None))
    put("other.json", {"text": "generated"})
    assert sentence in refused(main, "compare", *arguments)


def test_no_picture_without_matplotlib(
    run: Run, here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    path = put("a.json", log())
    assert "pip install 'quamba[plot]'" in refused(main, "compare", path, "-o", "out")
