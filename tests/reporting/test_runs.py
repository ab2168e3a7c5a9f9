"""Reading runs: what each writer's file says, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_records import RULE, log, profile, quantized, task, text

from quamba.errors import QuambaError
from quamba.reporting.measures import Metric
from quamba.reporting.runs import read_run, read_runs

Write = Callable[..., Path]


def test_a_log_of_evaluate(write: Write) -> None:
    path = write("a", quantized(scored={"eval.txt": text(32.5)}, tasks=[task("piqa", "acc", 0.7)]))
    (run,) = read_run(path)
    assert (run.source, run.precision, run.complete) == ("models/demo", "w8a8", True)
    numbers = {(m.group, m.name, m.better): v.number for m, v in run.values.items()}
    assert numbers == {
        ("size", "weights", "lower"): 8.886,
        ("perplexity", "eval.txt perplexity", "lower"): 32.5,
        ("accuracy", "piqa acc", "higher"): 0.7,
    }
    (words,) = (m.said for m in run.values if m.group == "perplexity")
    assert words == f"the first 4 windows, 1,024 tokens a window, {RULE}"
    (value,) = (v for m, v in run.values.items() if m.group == "accuracy")
    assert (value.stderr, value.origin) == (0.01, str(path))


@pytest.mark.parametrize(
    ("metric", "group"),
    [
        ("acc", "accuracy"),
        ("perplexity", "perplexity"),
        ("word_perplexity", "perplexity"),
        ("f1", "accuracy"),
    ],
)
def test_perplexities_of_tasks_are_no_accuracies(write: Write, metric: str, group: str) -> None:
    (run,) = read_run(write("a", log(tasks=[task("t", metric, 4.5)])))
    assert [m.group for m in run.values if m.name == f"t {metric}"] == [group]


@pytest.mark.parametrize(
    ("args", "fields", "said"),
    [
        ({}, {}, "0 shots, 100 samples"),
        ({}, {"samples": 5153, "shots": 5}, "5 shots, 5,153 samples"),
        ({"max_length": 64}, {}, "0 shots, 100 samples, at most 64 tokens of a text"),
        ({}, {"samples": None, "shots": None}, "each task's own shots, all samples"),
        (
            {"limit": 10, "fewshot": 2},
            {"samples": None, "shots": None},
            "2 shots, the first 10 of each task's samples",
        ),
        ({"testing": True}, {"samples": None}, "0 shots, the first 100 of each task's samples"),
    ],
    ids=["first 100", "whole", "shortened", "group", "group limited", "group testing"],
)
def test_settings_of_tasks(write: Write, args: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    record = log(tasks=[{**task("piqa", "acc", 0.7), **fields}])
    record["args"] |= args
    (run,) = read_run(write("a", record))
    assert [m.said for m in run.values if m.group == "accuracy"] == [said]


def test_a_profile_as_json_and_in_a_log_say_the_same(write: Write) -> None:
    bare = read_run(write("bare", profile()))[0]
    logged = read_run(write("log", quantized(profile=profile())))[0]
    assert (bare.precision, bare.complete, logged.complete) == ("w8a8", False, True)
    assert {m: v.number for m, v in bare.values.items()} == {m: v.number for m, v in logged.values.items()}
    numbers = {m.title: (v.number, v.low, v.high) for m, v in bare.values.items()}
    assert numbers == {
        "weights, MiB": (9317844 / 2**20, None, None),
        "cache of a sequence, MiB": (1.0, None, None),
        "TTFT, ms": (40.0, 36.0, 48.0),
        "TPOT, ms": (8.0, 7.2, 9.6),
        "TTLT, ms": (300.0, 270.0, 360.0),
        "decode, tokens/s": (125.0, None, None),
    }
    said = {m.name: m.said for m in bare.values}
    assert said["TPOT"] == "batch 1, prompt 256, A CPU, 2 threads"
    assert said["TTLT"] == "batch 1, prompt 256, 32 new tokens, A CPU, 2 threads"


def test_threads_and_graphs_are_part_of_the_setting(write: Write) -> None:
    gpu = profile(device="cuda:0", hardware="A GPU", latency={"tpot": profile()["latency"]["tpot"]})
    gpu["spec"]["cuda_graph"] = True
    (run,) = read_run(write("gpu", gpu))
    assert {m.said for m in run.values if m.group == "speed"} == {"batch 1, prompt 256, A GPU, CUDA graphs"}


def test_a_profile_beside_the_float_model_is_two_runs(write: Write) -> None:
    other = {k: v for k, v in profile().items() if k not in ("model", "precision", "compare")}
    other["latency"] = {"tpot": {"median_ms": 16.0, "tokens_per_s": 62.5}}
    runs = read_run(write("a", profile(compare={"speedup": {"tpot": 2.0}, **other})))
    assert [run.precision for run in runs] == ["w8a8", "float"]
    assert [v.number for m, v in runs[1].values.items() if m.name == "TPOT"] == [16.0]


def test_infinity_is_a_number(write: Write) -> None:
    (run,) = read_run(write("a", log(scored={"eval.txt": text("inf")})))
    assert [v.number for m, v in run.values.items() if m.group == "perplexity"] == [math.inf]


def test_evaluate_json_does_not_state_the_precision(write: Write) -> None:
    record = {k: v for k, v in quantized().items() if k in ("model", "size_mib", "ppl", "scored", "tasks")}
    (run,) = read_run(write("a", record))
    assert (run.precision, run.complete) == (None, False)


def test_a_folder_is_all_its_runs_once(write: Write, tmp_path: Path) -> None:
    first, second = write("b", log()), write("a", quantized())
    write(".draft", log())
    write("other", {"text": "generated"})
    (tmp_path / "notes.txt").write_text("no JSON")
    found = read_runs([first, tmp_path])
    assert [run.file for run in found.runs] == [str(first), str(second)]
    (sentence,) = found.left_out
    assert "other.json' is JSON, but of no run" in sentence


def _changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``record`` with one field, named by a dotted path, replaced."""
    *parents, last = path.split(".")
    place: Any = record
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("size_mib", "8", "its 'size_mib' is '8', expected a number"),
        ("size_mib", True, "its 'size_mib' is True, expected a number"),
        ("size_mib", 10**400, "its 'size_mib' is 1000"),
        ("model.source", None, "its 'model.source' is None, expected a text"),
        ("recipe", "w8a8", "its 'recipe' is 'w8a8', expected an object"),
        ("scored", [1], r"its 'scored' is \[1\], expected an object"),
        ("scored.e.windows", 1.5, "its 'scored.e.windows' is 1.5, expected a whole number"),
        ("scored.e.perplexity", None, "its 'scored.e.perplexity' is None, expected a number"),
        ("tasks", {}, "its 'tasks' is {}, expected a list"),
        ("tasks.0.value", "high", r"its 'tasks\[0\].value' is 'high', expected a number"),
        ("profile.latency", [], r"its 'profile.latency' is \[\], expected an object"),
        ("profile.latency.tpot.median_ms", None, "its 'profile.latency.tpot.median_ms' is None"),
        ("profile.spec.batch_size", 0.5, "its 'profile.spec.batch_size' is 0.5, expected a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_wrong_field_is_named(write: Write, path: str, value: Any, sentence: str) -> None:
    record = quantized(scored={"e": text(3.0)}, tasks=[task("t", "acc", 0.5)], profile=profile())
    with pytest.raises(QuambaError, match=sentence):
        read_run(write("a", _changed(record, path, value)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[1]", "is JSON, but of no run"),
        ("{}", "is JSON, but of no run"),
        ('{"model": "a", "tokens": 3}', "is JSON, but of no run"),
        ('{"model": {"source": "a"}}', "is JSON, but of no run"),
        ("\x00\x01", "is no JSON"),
    ],
    ids=["empty", "cut off", "a list", "empty object", "of generate", "no size", "binary"],
)
def test_other_files_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(QuambaError, match=sentence):
        read_runs([path])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match=r"There is no file or folder 'none.json'"):
        read_runs(["none.json"])
    with pytest.raises(QuambaError, match="holds no JSON of a run"):
        read_runs([tmp_path])
    (tmp_path / "x.json").write_text(json.dumps({"text": 1}))
    with pytest.raises(QuambaError, match=r"holds no JSON of a run, .* The first: '.*x.json' is JSON"):
        read_runs([tmp_path])


def test_metrics_of_other_settings_are_other_metrics() -> None:
    a = Metric("accuracy", "t acc", "", "higher", (("samples", "100"),))
    b = Metric("accuracy", "t acc", "", "higher", (("samples", "200"),))
    assert a != b and a.base == b.base
