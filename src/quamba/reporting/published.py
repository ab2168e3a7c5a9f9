"""The papers' numbers (published.json), matched by model, precision and what was measured.

A model matches by its shape, d_model and n_layer, or where a file does not state it by its name; one that was
trained further ("-zephyr") matches nothing. Numbers stand as printed, accuracies in lm-eval's scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from quamba.reporting.measures import Metric, Row, Value

_TUNED = re.compile(r"zephyr|chat|instruct|slimpj|sft|dpo|[-_]it\b", re.IGNORECASE)
_NAME = re.compile(r"(mamba2?)-(\d+(?:\.\d+)?[mb])(?:-hf)?(?:-3t-4k)?", re.IGNORECASE)
_PRECISION = re.compile(r"w\d+a(?:\d+|x)", re.IGNORECASE)
_SPEED = ("TPOT", "TTFT")


@dataclass(frozen=True)
class Published:
    """One number of a paper.

    model      such as "mamba2-2.7b"; precision: "float", "w8a8", "w4a8", "w4a16", "w4ax"
    method     as the paper calls it
    paper      its name
    column     "TASK METRIC", "TPOT" or "TTFT"
    value      in the unit of our own metric
    shots      None where the paper does not say
    samples    of the whole task, 0 for times
    setting    of times: batch size, prompt, hardware
    source     paper and table
    """

    model: str
    method: str
    paper: str
    precision: str
    column: str
    value: float
    shots: int | None
    samples: int
    setting: tuple[tuple[str, str], ...]
    source: str


@cache
def published_numbers() -> tuple[Published, ...]:
    data = _data()
    numbers = []
    for table in data["tables"]:
        for model, method, precision, *values in table["rows"]:
            for column, value in zip(table["columns"], values, strict=True):
                numbers.append(
                    Published(
                        model=model,
                        method=method,
                        paper=data["papers"][table["paper"]]["name"],
                        precision=precision,
                        column=column,
                        value=round(value / table.get("divide", 1), 6),
                        shots=table.get("shots"),
                        samples=data["tasks"].get(column.split()[0], {"samples": 0})["samples"],
                        setting=tuple(
                            (name, str(table[name]))
                            for name in ("batch_size", "prompt_len", "hardware")
                            if name in table and (name, column) != ("prompt_len", "TPOT")
                        ),
                        source=_source(data["papers"][table["paper"]], table),
                    )
                )
    return tuple(numbers)


def model_id(source: str, config: Mapping[str, Any]) -> str | None:
    """Which model of the papers this is; None: none."""
    name = source.rstrip("/").split("/")[-1]
    if _TUNED.search(name):
        return None
    models: dict[str, dict[str, Any]] = _data()["models"]
    if config:
        shape = {key: config.get(key) for key in ("family", "d_model", "n_layer")}
        return next((model for model, known in models.items() if known == shape), None)
    found = _NAME.fullmatch(name)
    stated = f"{found[1]}-{found[2]}".lower() if found else None
    return stated if stated in models else None


def model_shape(model: str) -> dict[str, Any]:
    """family, d_model and n_layer of a model of the papers."""
    shape: dict[str, Any] = _data()["models"][model]
    return shape


def precision_id(precision: str, recipe: Mapping[str, Any] | None) -> str | None:
    """The papers' name of a precision: by the blocks of the recipe, else by the name; mixed is "w4ax"."""
    if precision == "float":
        return "float"
    if recipe is not None and isinstance(recipe.get("blocks"), Mapping):
        if recipe.get("overrides"):
            return "w4ax"
        weights = str(recipe["blocks"].get("weights", "")).removeprefix("int")
        activations = {"int8": "8", "float": "16"}.get(str(recipe["blocks"].get("activations")))
        return f"w{weights}a{activations}"
    found = _PRECISION.search(precision)
    return found[0].lower() if found else None


def add_published(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[Row], list[str]]:
    """The rows with the papers' after those that they belong to, and notes.

    A paper's accuracy stands in every column of that task, metric and number of shots; its times, taken on
    other hardware, in columns of their own, and only where ours have times.
    """
    result: list[Row] = []
    notes: list[str] = []
    done: set[tuple[str, str]] = set()
    for row in rows:
        result.append(row)
        numbers = _matching(row)
        for method, paper in dict.fromkeys((n.method, n.paper) for n in numbers):
            mine = [n for n in numbers if (n.method, n.paper) == (method, paper)]
            label = f"{mine[0].model} {method}{_suffix(mine[0])} [{paper} paper]"
            values, partial = _placed(mine, metrics)
            if values and (row.model, label) not in done:
                done.add((row.model, label))
                result.append(Row(label, row.model, row.precision, values, (), published=True))
                notes += partial
    if not done:
        notes.append(
            "The papers have no numbers for these models, precisions and metrics "
            f"(they have {', '.join(_data()['models'])})."
        )
    else:
        sources = dict.fromkeys(
            v.origin for r in result if r.published for vs in r.values.values() for v in vs
        )
        notes.append(f"Published numbers: {'; '.join(sources)}.")
    return result, notes


def _matching(row: Row) -> list[Published]:
    if not row.runs:
        return []
    config = next((run.config for run in row.runs if run.config), {})
    model = model_id(row.runs[0].source, config)
    precision = precision_id(row.precision, row.runs[0].recipe)
    return [n for n in published_numbers() if (n.model, n.precision) == (model, precision)]


def _placed(
    numbers: Sequence[Published], metrics: Sequence[Metric]
) -> tuple[dict[Metric, list[Value]], list[str]]:
    """The columns of the numbers, and what is to be said of them."""
    values: dict[Metric, list[Value]] = {}
    notes = []
    for number in numbers:
        value = Value(number.value, origin=number.source)
        if number.column in _SPEED:
            if any(metric.name == number.column for metric in metrics):
                values.setdefault(Metric("speed", number.column, "ms", "lower", number.setting), []).append(
                    value
                )
            continue
        for metric in metrics:
            if metric.group != "accuracy" or _column(metric) != number.column:
                continue
            setting = dict(metric.setting)
            if number.shots is not None and setting.get("shots") != str(number.shots):
                continue
            values.setdefault(metric, []).append(value)
            if setting.get("samples") not in (f"{number.samples:,}", "all"):
                notes.append(
                    f"The published {number.column} is of all {number.samples:,} samples, and ours of "
                    f"{setting.get('samples')}: they are not comparable."
                )
            if number.shots is None:
                notes.append(f"The paper does not say how many shots its {number.column} has.")
    return values, notes


def _column(metric: Metric) -> str:
    """ "lambada_local acc" -> "lambada_openai acc"; the name of lm-eval's filter is left out."""
    task, name = metric.name.split(" ", 1)
    for known, facts in _data()["tasks"].items():
        if task in facts.get("same_as", ()):
            task = known
    return f"{task} {name.split(' [')[0].split(' (')[0]}"


def _suffix(number: Published) -> str:
    return "" if number.precision == "float" else f" {number.precision}"


def _source(paper: Mapping[str, str], table: Mapping[str, Any]) -> str:
    hand = ", second-hand" if table.get("second_hand") else ""
    return f"{paper['name']} ({paper['venue']}, arXiv {paper['arxiv']}), {table['table']}{hand}"


@cache
def _data() -> dict[str, Any]:
    text = files("quamba.reporting").joinpath("published.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
