"""lm-eval's tasks on the command line: quamba evaluate and main.py, with a task of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from quamba.cli.main import main
from quamba.cli.published import command as published
from quamba.evaluation.lm_eval_model import TaskModel

Run = Callable[..., Result]
Refused = Callable[..., str]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["blue", "green"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
MINE = ("--task_list", "colours", "--task_dir", "mine", "--device", "cpu")
ROWS = 120


@pytest.fixture
def mine(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the task ``colours`` in ``mine``."""
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    folder = here / "mine"
    folder.mkdir()
    rows = [json.dumps({"question": f"Thing {i} is", "answer": i % 2}) for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "colours.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")))
    return here


def test_evaluate_prints_a_table(run: Run, mine: Path) -> None:
    result = run(main, "evaluate", "mamba2-tiny", *MINE, "--limit", 4)
    assert result.exit_code == 0, result.output
    head, _, *rows = [line.split() for line in result.stdout.splitlines()]
    assert head == ["task", "shots", "samples", "metric", "value", "stderr"]
    assert [row[:4] for row in rows] == [["colours", "0", "4", "acc"]]
    assert all(len(row) == 6 and 0 <= float(row[4]) <= 1 for row in rows)


def test_evaluate_as_json_and_its_log(run: Run, mine: Path) -> None:
    arguments = ("evaluate", "mamba-tiny", *MINE, "--testing", "--fewshot", 1, "--json", "--log_dir", "logs")
    result = run(main, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["ppl"] == {}
    (metric,) = record["tasks"]
    assert (metric["task"], metric["shots"], metric["samples"], metric["metric"]) == (
        "colours",
        1,
        100,
        "acc",
    )
    assert record["lm_eval"]["colours"]["acc,none"] == metric["value"]
    (path,) = (mine / "logs").iterdir()
    log = json.loads(path.read_text())
    assert log["lm_eval"] == record["lm_eval"]
    assert "lm_eval" in log["versions"]


def test_perplexity_and_tasks_in_one_run(run: Run, mine: Path) -> None:
    texts = ("--ppl_dataset", "eval.txt", "--seqlen", 100, "--max_windows", 2)
    record = json.loads(run(main, "evaluate", "mamba2-tiny", *MINE, *texts, "--limit", 2, "--json").stdout)
    assert list(record["ppl"]) == ["eval.txt"]
    assert list(record["lm_eval"]) == ["colours"]


@pytest.mark.parametrize(
    ("flags", "keys", "shots"),
    [
        (("--eval_zero_shot",), ["colours"], [0]),
        (("--eval_few_shot", "--fewshot", 2), ["colours"], [2]),
        (("--eval_generation",), ["colours"], [0]),
        (("--eval_zero_shot", "--eval_few_shot", "--fewshot", 2), ["colours", "colours@2"], [0, 2]),
        (("--eval_few_shot", "--eval_generation", "--fewshot", 3), ["colours"], [3]),
    ],
)
def test_the_published_flags(
    run: Run, mine: Path, flags: tuple[object, ...], keys: list[str], shots: list[int]
) -> None:
    result = run(published, "mamba2-tiny", *MINE, *flags, "--testing", "--log_dir", "logs")
    assert result.exit_code == 0, result.output
    (path,) = (mine / "logs").iterdir()
    log = json.loads(path.read_text())
    assert list(log["lm_eval"]) == keys
    assert [metric["shots"] for metric in log["tasks"]] == shots
    assert {metric["samples"] for metric in log["tasks"]} == {100}
    assert "colours" in result.stdout


def test_quantized_and_scored(run: Run, mine: Path) -> None:
    quantize = ("--quantize", "--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32)
    result = run(
        published, "mamba2-tiny", *quantize, *MINE, "--eval_zero_shot", "--batch_size", 3, "--testing"
    )
    assert result.exit_code == 0, result.output
    assert "w8a8" in result.stdout
    assert "colours" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--limit", 3), "--limit has no effect alone, expected --task_list with it."),
        (("--task_list", "lambada_local", "--fewshot", -1), "-1 is not in the range x>=0"),
        (("--task_list", "a,,b"), "--task_list is 'a,,b', expected names with commas"),
        (
            ("--task_list", "lambada_local", "--seqlen", 9),
            "--seqlen has no effect on tasks, expected --ppl_dataset",
        ),
    ],
)
def test_bad_arguments(refused: Refused, here: Path, arguments: tuple[object, ...], sentence: str) -> None:
    assert sentence in refused(main, "evaluate", "mamba2-tiny", *arguments)


@pytest.mark.parametrize("command", [("evaluate",), ()], ids=["evaluate", "main.py"])
def test_a_run_that_was_cut_off_goes_on(
    run: Run, mine: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    task = (mine / "mine" / "colours.yaml").read_text()
    for name in ("second", "third"):
        (mine / "mine" / f"{name}.yaml").write_text(task.replace("task: colours", f"task: {name}"))
    flags = ("--limit", 4) if command else ("--eval_zero_shot", "--testing")
    where = main if command else published
    arguments = (*command, "mamba2-tiny", "--task_list", "colours,second,third", "--task_dir", "mine", *flags)
    arguments = (*arguments, "--device", "cpu", "--batch_size", "auto", "--log_dir", "logs")
    plain, asked = TaskModel.log_likelihoods, []

    def counted(self: TaskModel, pairs: list[object]) -> list[tuple[float, bool]]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(pairs))
        return plain(self, pairs)

    monkeypatch.setattr(TaskModel, "log_likelihoods", counted)
    assert run(where, *arguments).exit_code == 130
    assert [path.name for path in (mine / "logs").iterdir()] == ["unfinished"]
    asked.clear()
    result = run(where, *arguments, "--batch_size", 3)
    assert result.exit_code == 0, result.output
    assert len(asked) == 1
    line = "Taken over from a run that was cut off: colours, second (from 'logs/unfinished')."
    assert line in result.stderr.splitlines()
    (path,) = (mine / "logs").iterdir()
    log = json.loads(path.read_text())
    assert list(log["lm_eval"]) == ["colours", "second", "third"]
    asked.clear()
    with monkeypatch.context() as other:
        other.setattr(TaskModel, "log_likelihoods", plain)
        fresh = run(where, *arguments)
    assert fresh.stdout.splitlines()[-4:] == result.stdout.splitlines()[-4:]
    assert "Taken over" not in fresh.stderr


def test_nothing_but_results_where_nobody_looks(run: Run, mine: Path) -> None:
    run(main, "evaluate", "mamba2-tiny", *MINE, "--limit", 4)  # the data set's cache is made, with a bar
    result = run(main, "evaluate", "mamba2-tiny", *MINE, "--limit", 4)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Log-likelihoods" in run(main, "evaluate", "mamba2-tiny", *MINE, "--limit", 4, "--verbose").stderr


@pytest.mark.parametrize(
    ("value", "sentence"),
    [("0", "0 is not in the range x>=1"), ("aut", "neither a number nor 'auto'. Did you mean 'auto'?")],
)
def test_bad_batch_sizes(refused: Refused, here: Path, value: str, sentence: str) -> None:
    assert sentence in refused(main, "evaluate", "mamba2-tiny", "--batch_size", value)
    assert sentence in refused(published, "mamba2-tiny", "--eval_ppl", "--batch_size", value)


def test_a_task_folder_that_is_none(refused: Refused, mine: Path) -> None:
    arguments = ("evaluate", "mamba2-tiny", "--task_list", "colours", "--task_dir", "mine/rows.jsonl")
    assert "The task folder 'mine/rows.jsonl' is a file" in refused(main, *arguments)


def test_without_lm_eval(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sentence = (
        "needs the package 'lm-eval', which is not installed; install it with: pip install 'quamba[eval]'"
    )
    assert sentence in refused(main, "evaluate", "mamba2-tiny", "--task_list", "lambada_local")
    assert sentence in refused(published, "mamba2-tiny", "--eval_zero_shot")
