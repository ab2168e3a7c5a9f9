"""The papers' numbers: the file is sound, and a number stands only where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_records import log, profile, quantized, recipe, task
from test_merge import compared

from quamba.reporting.published import model_id, precision_id, published_numbers

Write = Callable[..., Path]
SHAPE = {"family": "mamba2", "d_model": 2560, "n_layer": 64, "vocab_size": 50277}


def published(number_of: str, method: str, column: str) -> list[float]:
    model, precision = number_of.split(" ")
    return [
        n.value
        for n in published_numbers()
        if (n.model, n.precision, n.method, n.column) == (model, precision, method, column)
    ]


def test_numbers_are_as_printed_and_have_a_table() -> None:
    assert published("mamba2-2.7b w4a8", "Quamba2", "lambada_openai acc") == [0.656]
    assert published("mamba-2.8b w8a8", "Quamba", "lambada_openai acc") == [0.654, 0.6567]
    assert published("mamba2-8b w4a16", "Quamba2", "winogrande acc") == [0.708]
    assert published("mamba2-8b float", "FP16", "squadv2 f1") == [51.9]
    assert published("mamba2-8b w4a8", "Quamba2", "TPOT") == [7.43, 79.91]
    numbers = published_numbers()
    assert len(numbers) == 25 * 6 + 8 + 4 + 1 + 10 + 10 + 4 + 4
    assert all(", Table " in n.source and "arXiv 2" in n.source for n in numbers)
    assert {n.precision for n in numbers} == {"float", "w8a8", "w4a8", "w4a16", "w4ax"}
    for n in numbers:
        assert (n.samples > 0) != bool(n.setting), n
        assert n.setting or n.column.startswith("squadv2") or 0.1 < n.value < 0.9, n


def test_no_number_stands_twice_for_one_method_of_a_paper() -> None:
    keys = [(n.model, n.method, n.paper, n.precision, n.column, n.setting) for n in published_numbers()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("source", "config", "expected"),
    [
        ("state-spaces/mamba2-2.7b", {}, "mamba2-2.7b"),
        ("a/my-model", SHAPE, "mamba2-2.7b"),
        ("a/my-model/", SHAPE, "mamba2-2.7b"),
        ("a/mamba2-2.7b", {**SHAPE, "n_layer": 6}, None),
        ("a/mamba2-2.7b-zephyr", SHAPE, None),
        ("a/mamba2-2.7b-tuned", {}, None),
        ("state-spaces/mamba-2.8b-hf", {}, "mamba-2.8b"),
        ("mamba-3b", {}, None),
    ],
    ids=["name", "shape", "slash", "other shape", "tuned", "other name", "hf", "unknown"],
)
def test_models_are_known_by_shape_then_name(
    source: str, config: dict[str, Any], expected: str | None
) -> None:
    assert model_id(source, config) == expected


@pytest.mark.parametrize(
    ("precision", "fields", "expected"),
    [
        ("float", None, "float"),
        ("mine", recipe("mine", "int4"), "w4a8"),
        ("w4a16", recipe("w4a16", "int4"), "w4a16"),
        ("mixed", recipe("mixed", "int4", overrides=[{"blocks": [0]}]), "w4ax"),
        ("quamba1-w8a8", None, "w8a8"),
        ("mine", None, None),
    ],
    ids=["float", "blocks", "a16", "mixed", "name", "unknown"],
)
def test_precisions_are_known_by_recipe_then_name(
    precision: str, fields: dict[str, Any] | None, expected: str | None
) -> None:
    assert precision_id(precision, fields) == expected


def big(record: dict[str, Any]) -> dict[str, Any]:
    record["model"] = {**record["model"], "config": SHAPE}
    return record


def test_published_rows_follow_their_model(write: Write) -> None:
    tasks = [task("lambada_local", "acc", 0.69, samples=5153), task("piqa", "acc", 0.7, samples=1838)]
    found = compared(
        write("q", big(quantized(recipe=recipe("mine", "int4"), tasks=tasks))),
        write("f", big(log(tasks=tasks))),
        published=True,
    )
    assert [(row.label, row.published) for row in found.rows] == [
        ("demo float", False),
        ("mamba2-2.7b FP16 [Quamba2 paper]", True),
        ("demo mine", False),
        ("mamba2-2.7b Quamba2 w4a8 [Quamba2 paper]", True),
        ("mamba2-2.7b Quamba2 (blocks only) w4a8 [Quamba2 paper]", True),
    ]
    numbers = {m.name: values[-1].number for m, values in found.rows[3].values.items()}
    assert numbers == {"lambada_local acc": 0.656, "piqa acc": 0.747}
    (note,) = found.notes
    assert note.startswith("Published numbers: Quamba2 (ICML 2025, arXiv 2503.22879v4), Table 11; ")


def test_other_shots_have_no_published_number_and_fewer_samples_are_said(write: Write) -> None:
    tasks = [task("piqa", "acc", 0.7, samples=1838, shots=5), task("winogrande", "acc", 0.7, samples=100)]
    found = compared(write("f", big(log(tasks=tasks))), published=True)
    assert [m.name for m in found.rows[1].values] == ["winogrande acc"]
    assert found.notes[0] == (
        "The published winogrande acc is of all 1,267 samples, and ours of 100: they are not comparable."
    )


def test_published_times_stand_in_columns_of_their_hardware(write: Write) -> None:
    times = profile("state-spaces/mamba2-8b", "w4a8")
    found = compared(write("p", times), published=True)
    paper = found.rows[1]
    assert {m.said: v[-1].number for m, v in paper.values.items() if m.name == "TPOT"} == {
        "batch 1, RTX A5000": 7.43,
        "batch 1, Orin Nano 8G": 79.91,
    }
    assert not set(paper.values) & set(found.rows[0].values)


def test_models_of_no_paper_are_said(write: Write) -> None:
    found = compared(write("f", log(tasks=[task("piqa", "acc", 0.7)])), published=True)
    assert len(found.rows) == 1
    assert found.notes[0].startswith("The papers have no numbers for these models")
