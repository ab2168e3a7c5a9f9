"""Digits, differences, and the forms of a comparison."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from run_records import log, quantized, task, text
from test_merge import compared

from quamba.reporting.measures import Group, Metric
from quamba.reporting.tables import change, csv_text, number, setting_lines, text_tables, to_dict

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("group", "value", "expected"),
    [
        ("accuracy", 0.43214, "0.4321"),
        ("accuracy", 51.9, "51.90"),
        ("perplexity", 9.4549, "9.455"),
        ("perplexity", 123456.7, "123,457"),
        ("size", 5290.84, "5,290.8"),
        ("speed", 7.426, "7.43"),
        ("speed", math.inf, "inf"),
        ("perplexity", math.nan, "nan"),
    ],
)
def test_digits(group: Group, value: float, expected: str) -> None:
    assert number(Metric(group, "m", "", "lower"), value) == expected


def test_differences_from_the_float_model(write: Write) -> None:
    found = compared(
        write("f", log(tasks=[task("t", "acc", 0.5)], scored={"e": text(32.0)})),
        write("q", quantized(tasks=[task("t", "acc", 0.488)], scored={"e": text("inf")})),
    )
    texts = {m.name: change(found, found.rows[1], m) for m in found.metrics}
    assert texts == {"t acc": "-1.2 pt", "e perplexity": "", "weights": "-69.1%"}
    assert {change(found, found.rows[0], m) for m in found.metrics} == {""}


def test_text_tables_are_broken_by_group_and_width(write: Write) -> None:
    tasks = [task(f"t{i}", "acc", i / 10) for i in range(8)]
    found = compared(write("f", log(tasks=tasks)), write("q", quantized(tasks=tasks[:6])))
    tables = text_tables(found)
    assert [(title, len(header), len(rows)) for title, header, rows, _ in tables] == [
        ("Accuracy (higher is better)", 7, 2),
        ("Accuracy (higher is better), continued", 3, 1),
        ("Size", 2, 2),
    ]
    assert tables[0][2][1][:3] == ["demo w8a8", "0.0000±0.0100", "0.1000±0.0100"]
    assert tables[1][3] == ["t6 acc, t7 acc: 0 shots, 100 samples."]
    assert setting_lines(found, found.of_group("size")) == []


def test_wide_tables_are_broken(write: Write) -> None:
    tasks = [task("t" * 60 + str(i), "acc", 0.5) for i in range(3)]
    assert [len(header) for _, header, _, _ in text_tables(compared(write("f", log(tasks=tasks))))] == [
        3,
        2,
        2,
    ]


def test_what_was_measured_twice_has_a_star_and_both_lines_in_csv(write: Write) -> None:
    paths = [write(name, log(scored={"e": text(ppl)})) for name, ppl in (("a", 32.0), ("b", 33.5))]
    found = compared(*paths)
    (row,) = text_tables(found)[0][2]
    assert row == ["demo float", "33.500*"]
    lines = [line for line in csv.DictReader(io.StringIO(csv_text(found))) if line["group"] == "perplexity"]
    assert [(line["value"], line["source"]) for line in lines] == [
        ("32.0", str(paths[0])),
        ("33.5", str(paths[1])),
    ]
    assert lines[0]["setting"].startswith("the first 4 windows, 1,024 tokens a window")


def test_json_has_every_measurement(write: Write) -> None:
    path = write("q", quantized(tasks=[task("t", "acc", 0.5)]))
    record = to_dict(compared(path))
    (model,) = record["models"]
    assert (model["label"], model["precision"], model["files"]) == ("demo w8a8", "w8a8", [str(path)])
    assert model["calibration"]["num"] == 16
    index = next(i for i, m in enumerate(record["metrics"]) if m["name"] == "t acc")
    assert record["metrics"][index]["setting"] == {"shots": "0", "samples": "100"}
    (value,) = model["values"][str(index)]
    assert (value["value"], value["stderr"], value["source"]) == (0.5, 0.01, str(path))
