"""Which runs become one row, and what is said of what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_records import log, profile, quantized, recipe, task, text

from quamba.errors import QuambaError
from quamba.reporting.measures import Comparison
from quamba.reporting.merge import compare
from quamba.reporting.runs import read_runs

Write = Callable[..., Path]


def compared(*paths: Path, published: bool = False) -> Comparison:
    return compare(read_runs(paths).runs, published=published)


def labels(comparison: Comparison) -> list[str]:
    return [row.label for row in comparison.rows]


def shown(comparison: Comparison, label: str) -> dict[str, float]:
    (row,) = (row for row in comparison.rows if row.label == label)
    return {comparison.heading(m): values[-1].number for m, values in row.values.items()}


def test_evaluate_and_profile_of_a_model_are_one_row(write: Write) -> None:
    found = compared(
        write("q", quantized(scored={"e": text(33.0)})),
        write("qp", quantized("./models/demo", profile=profile())),
        write("f", log(scored={"e": text(32.0)})),
    )
    assert labels(found) == ["demo float", "demo w8a8"]
    assert shown(found, "demo w8a8")["e perplexity"] == 33.0
    assert shown(found, "demo w8a8")["TPOT, ms"] == 8.0
    assert shown(found, "demo float") == {"weights, MiB": 28.75, "e perplexity": 32.0}
    assert found.notes == []


def test_a_profile_that_names_its_precision_joins_the_only_such_row(write: Write) -> None:
    bare, full = write("p", profile()), write("q", quantized())
    found = compared(bare, full)
    assert labels(found) == ["demo w8a8"]
    assert found.notes == [f"'{bare}' names its precision only, and was taken for 'demo w8a8'."]
    other = write("r", quantized(calibration={"num": 32}))
    found = compared(bare, full, other)
    assert labels(found) == ["demo w8a8 (p)", "demo w8a8 (source calib.txt, num 16)", "demo w8a8 (num 32)"]


def test_a_float_profile_joins_the_float_row(write: Write) -> None:
    found = compared(write("f", log()), write("p", profile(precision="float16", size=None)))
    assert labels(found) == ["demo float"] and found.notes == []


def test_a_run_of_unknown_precision_stays_alone(write: Write) -> None:
    record = {k: v for k, v in quantized().items() if k not in ("recipe", "calibration")}
    bare = write("json", record)
    found = compared(write("q", quantized()), bare)
    assert labels(found) == ["demo w8a8", "demo (json)"]
    assert found.notes == [
        f"'{bare}' does not state how its model was quantized, so it is a row of its own; "
        "logs (--log_dir) do."
    ]


def test_models_of_one_name_are_told_apart_by_their_folders(write: Write) -> None:
    found = compared(write("a", log("x/demo")), write("b", log("y/demo")), write("c", log("y/other")))
    assert labels(found) == ["x/demo float", "y/demo float", "other float"]


def test_rows_of_one_recipe_are_told_apart_by_what_differs(write: Write) -> None:
    paths = [
        write(name, quantized(recipe=recipe(percentile_alpha=alpha, solver={"kind": "rtn"})))
        for name, alpha in (("a", None), ("b", 0.999))
    ]
    found = compared(*paths)
    assert labels(found) == ["demo w8a8 (percentile_alpha null)", "demo w8a8 (percentile_alpha 0.999)"]


def test_what_was_measured_twice_is_said(write: Write) -> None:
    first, second = write("a", log(scored={"e": text(32.0)})), write("b", log(scored={"e": text(33.5)}))
    found = compared(first, second)
    assert shown(found, "demo float")["e perplexity"] == 33.5
    assert found.notes == [
        "demo float: e perplexity was measured 2 times with different results, "
        f"32 ('{first}'), 33.5 ('{second}'); the last one is shown."
    ]


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        (
            {"scored": {"e": text(32.0, windows=4)}},
            {"scored": {"e": text(33.0, windows=8)}},
            "e perplexity: measured in 2 ways that are not comparable, one column each: "
            "the first 4 windows (demo float); the first 8 windows (demo w8a8).",
        ),
        (
            {"tasks": [task("t", "acc", 0.4), task("t", "acc_norm", 0.5)]},
            {"tasks": [task("t", "acc", 0.3, shots=5), task("t", "acc_norm", 0.4, shots=5)]},
            "t acc, t acc_norm: measured in 2 ways that are not comparable, one column each: "
            "0 shots (demo float); 5 shots (demo w8a8).",
        ),
        (
            {"profile": profile(threads=1)},
            {"profile": profile(threads=2)},
            "TTFT, TPOT, TTLT, decode: measured in 2 ways that are not comparable, one column each: "
            "A CPU, 1 thread (demo float); A CPU, 2 threads (demo w8a8).",
        ),
    ],
    ids=["windows", "shots", "threads"],
)
def test_settings_that_differ_are_columns_and_a_note(
    write: Write, first: dict[str, object], second: dict[str, object], note: str
) -> None:
    found = compared(write("a", log(**first)), write("b", quantized(**second)))
    assert found.notes == [note]
    for row in found.rows:
        bases = [metric.base for metric in row.values]
        assert len(bases) == len(set(bases))
    for metric in found.metrics:
        if metric.group != "size":
            assert sum(metric in row.values for row in found.rows) == 1
            assert found.heading(metric).endswith("]")


def test_vocabularies_leaks_and_versions_are_said(write: Write) -> None:
    leaked = log(scored={"e": text(32.0)}, tasks=[task("t", "acc", 0.5)])
    leaked["args"]["allow_leak"] = True
    other = log("models/big", scored={"e": text(9.0)}, versions={"lm_eval": "0.4.9"})
    other["model"]["config"]["vocab_size"] = 50277
    path = write("a", leaked)
    assert compared(path, write("b", other)).notes == [
        "The vocabularies differ (4,096 of demo float, 50,277 of big float), so perplexities are comparable "
        "within each only.",
        f"demo float: '{path}' was scored with --allow_leak.",
        "Tasks were run with several versions of lm-eval: 0.4.13 for demo float, 0.4.9 for big float.",
    ]


def test_the_float_model_is_the_baseline(write: Write) -> None:
    found = compared(
        write("f", log(scored={"e": text(32.0)})),
        write("q", quantized(scored={"e": text(33.0)})),
        write("o", quantized("models/other", scored={"e": text(9.0)})),
    )
    (metric,) = found.of_group("perplexity")
    base = [found.baseline(row, metric) for row in found.rows]
    assert [None if value is None else value.number for value in base] == [None, 32.0, None]


def test_times_stand_as_they_pass(write: Write) -> None:
    late = profile()
    late["latency"] = {mode: late["latency"][mode] for mode in ("tpot", "ttlt")}
    early = profile("models/other")
    found = compared(write("a", late), write("b", early))
    assert [m.name for m in found.of_group("speed")] == ["TTFT", "TPOT", "TTLT", "decode"]


def test_nothing_in_common_is_refused(write: Write) -> None:
    times = profile("models/other", size=None)
    record = log(scored={"e": text(32.0)})
    with pytest.raises(
        QuambaError,
        match=r"no metric in common \('demo float' has weights, MiB; e perplexity, 'other w8a8' has TTFT",
    ):
        compared(write("a", record), write("b", times))
