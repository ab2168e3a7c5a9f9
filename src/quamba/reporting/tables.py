"""A comparison as text, rows of CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from quamba.reporting.measures import GROUPS, Comparison, Metric, Row

_MOST_COLUMNS, _MOST_CHARACTERS = 6, 160
TITLES = {
    "accuracy": "Accuracy (higher is better)",
    "perplexity": "Perplexity (lower is better)",
    "size": "Size",
    "speed": "Speed",
}
_LONG = ("model", "precision", "published", "label", "group", "metric", "unit", "setting", "value", "stderr")


def number(metric: Metric, value: float) -> str:
    """With the digits that the metric deserves."""
    if not math.isfinite(value):
        return str(value)
    if metric.group == "accuracy":
        return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1e4 else 0
    if metric.group == "perplexity" and abs(value) < 1e3:
        digits = 3
    return f"{value:,.{digits}f}"


def cell(metric: Metric, row: Row) -> str:
    """``0.4310±0.0069``; a star where there are more measurements; a paper's number with its table."""
    value = row.shown(metric)
    if value is None:
        return "-"
    text = number(metric, value.number)
    if value.stderr is not None:
        text += f"±{number(metric, value.stderr)}"
    if row.published:
        return f"{text} ({value.origin.rsplit(', arXiv', 1)[-1].partition('), ')[2] or value.origin})"
    return f"{text}*" if len(row.values[metric]) > 1 else text


def change(comparison: Comparison, row: Row, metric: Metric) -> str:
    """How far from the float model's: ``+0.8%``, points of an accuracy (``-1.2 pt``), "" without one."""
    value, base = row.shown(metric), comparison.baseline(row, metric)
    if value is None or base is None or not (math.isfinite(value.number) and math.isfinite(base.number)):
        return ""
    if metric.group == "accuracy":
        points = (value.number - base.number) * (100 if max(abs(value.number), abs(base.number)) <= 1 else 1)
        return f"{points:+.1f} pt"
    return f"{100 * (value.number / base.number - 1):+.1f}%" if base.number else ""


def text_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """(title, header, rows, lines about settings) of each group, broken where it has many columns.

    Rows without any value of the columns are left out.
    """
    tables = []
    for group in GROUPS:
        for i, part in enumerate(_parts(comparison, comparison.of_group(group))):
            header = ["model", *(comparison.heading(metric) for metric in part)]
            rows = [
                [row.label, *(cell(m, row) for m in part)]
                for row in comparison.rows
                if any(m in row.values for m in part)
            ]
            title = TITLES[group] if i == 0 else f"{TITLES[group]}, continued"
            tables.append((title, header, rows, setting_lines(comparison, part)))
    return tables


def _parts(comparison: Comparison, metrics: Sequence[Metric]) -> list[list[Metric]]:
    """As many columns beside each other as a wide terminal holds, one at least."""
    first = max(len(row.label) for row in comparison.rows)
    parts: list[list[Metric]] = []
    width = 0
    for metric in metrics:
        cells = [comparison.heading(metric), *(cell(metric, row) for row in comparison.rows)]
        needed = 2 + max(map(len, cells))
        if not parts or len(parts[-1]) == _MOST_COLUMNS or width + needed > _MOST_CHARACTERS:
            parts.append([])
            width = first
        parts[-1].append(metric)
        width += needed
    return parts


def setting_lines(comparison: Comparison, metrics: Sequence[Metric]) -> list[str]:
    """``lambada_local acc: 0 shots, 100 samples``; metrics with one setting share a line."""
    told: dict[str, list[str]] = {}
    for metric in metrics:
        if metric.said:
            names = told.setdefault(metric.said, [])
            if metric.name not in names:
                names.append(metric.name)
    return [f"{', '.join(names)}: {said}." for said, names in told.items()]


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """One dict a measurement, those that are not shown too: what the CSV has."""
    found = []
    for row in comparison.rows:
        for metric in comparison.metrics:
            for value in row.values.get(metric, ()):
                fields = (
                    row.model,
                    row.precision,
                    row.published,
                    row.label,
                    metric.group,
                    metric.name,
                    metric.unit,
                    metric.said,
                    value.number,
                    value.stderr,
                )
                found.append({**dict(zip(_LONG, fields, strict=True)), "source": value.origin})
    return found


def csv_text(comparison: Comparison) -> str:
    """Long form, one line a measurement."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*_LONG, "source"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(comparison))
    return out.getvalue()


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """JSON-ready but for infinity and NaN. The last of several measurements is the one shown."""
    return {
        "metrics": [
            {
                "group": metric.group,
                "name": metric.name,
                "unit": metric.unit,
                "better": metric.better,
                "setting": dict(metric.setting),
            }
            for metric in comparison.metrics
        ],
        "models": [_row_dict(comparison, row) for row in comparison.rows],
        "notes": list(comparison.notes),
    }


def _row_dict(comparison: Comparison, row: Row) -> dict[str, Any]:
    """``values``: {index into "metrics": measurements}."""
    first = row.runs[0] if row.runs else None
    return {
        "label": row.label,
        "model": row.model,
        "precision": row.precision,
        "published": row.published,
        "files": list(dict.fromkeys(run.file for run in row.runs)),
        "calibration": dict(first.calibration) if first else {},
        "values": {
            str(i): [
                {"value": v.number, "stderr": v.stderr, "p5": v.low, "p95": v.high, "source": v.origin}
                for v in row.values[metric]
            ]
            for i, metric in enumerate(comparison.metrics)
            if metric in row.values
        },
    }
