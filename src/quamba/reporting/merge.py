"""Bring runs of one model together, and say what cannot be compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from quamba.errors import QuambaError
from quamba.reporting.measures import GROUPS, Comparison, Metric, Row, Run, Value

#: Logs round sizes to this many MiB.
_ROUNDED = 1e-3
_MOST_DIFFERENCES = 3
_TIMES = ("TTFT", "TPOT", "TTLT")


def compare(runs: Sequence[Run], *, published: bool = False, notes: Sequence[str] = ()) -> Comparison:
    """One row a model; ``published`` adds rows with the papers' numbers; ``notes`` come first.

    Raises QuambaError where no two rows have a metric in common.
    """
    rows = merge(runs)
    metrics = _ordered(rows)
    if len(rows) > 1 and not _in_common(rows):
        raise QuambaError(
            f"The runs have no metric in common ('{rows[0].label}' has {_listed(rows[0])}, "
            f"'{rows[1].label}' has {_listed(rows[1])}), expected one that two models have."
        )
    found = [*notes, *_identity_notes(rows), *_repeat_notes(rows), *_setting_notes(rows, metrics)]
    found += _text_notes(rows) + _version_notes(rows)
    if published:
        from quamba.reporting.published import add_published

        rows, more = add_published(rows, metrics)
        metrics = _ordered(rows)
        found += more
    return Comparison(rows, metrics, list(dict.fromkeys(found)))


def merge(runs: Sequence[Run]) -> list[Row]:
    """Runs of the same float model, recipe and calibration in one row.

    A run that names its precision only joins the one row of that model and precision, if there is one; a run
    that does not state it stays alone.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.complete):  # stable: those to be joined come first
        key = _key(run)
        if not run.complete and run.precision is not None:
            same = [k for k, group in groups.items() if _precision_key(group[0]) == _precision_key(run)]
            key = same[0] if len(same) == 1 else key
        groups.setdefault(key, []).append(run)
    order = {id(run): i for i, run in enumerate(runs)}
    members = [sorted(group, key=lambda run: order[id(run)]) for group in groups.values()]
    members.sort(key=lambda group: order[id(group[0])])
    sources = list(dict.fromkeys(_place(run.source) for run in runs))
    members.sort(key=lambda group: (sources.index(_place(group[0].source)), group[0].precision != "float"))
    models = _model_names(sources)
    labels = _labels(members, models)
    return [
        Row(label, models[_place(group[0].source)], group[0].precision or "unknown", _values(group), group)
        for label, group in zip(labels, members, strict=True)
    ]


def _place(source: str) -> str:
    return os.path.normpath(source)


def _key(run: Run) -> str:
    if run.precision is None:
        return f"{run.file} {_place(run.source)}"
    return json.dumps([_place(run.source), run.precision, run.recipe, run.calibration], sort_keys=True)


def _precision_key(run: Run) -> tuple[str, str | None]:
    return _place(run.source), run.precision


def _values(group: Sequence[Run]) -> dict[Metric, list[Value]]:
    """Every measurement; equal ones once, so that the size of two logs is one number."""
    values: dict[Metric, list[Value]] = {}
    for run in group:
        for metric, value in run.values.items():
            found = values.setdefault(metric, [])
            if not any(_same(metric, value, other) for other in found):
                found.append(value)
    return values


def _same(metric: Metric, a: Value, b: Value) -> bool:
    rounded = _ROUNDED if metric.group == "size" else 0.0
    return a.number == b.number or math.isclose(a.number, b.number, rel_tol=1e-9, abs_tol=rounded)


def _model_names(places: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the paths that tell them apart."""
    names = {}
    for place in places:
        parts = PurePath(place).parts
        for length in range(1, len(parts) + 1):
            end = parts[-length:]
            if sum(PurePath(other).parts[-length:] == end for other in places) == 1:
                break
        names[place] = str(PurePath(*end)) if parts else place
    return names


def _labels(members: Sequence[Sequence[Run]], models: Mapping[str, str]) -> list[str]:
    """Model and precision; where that names several rows, also what differs in recipe or calibration."""
    plain = [
        f"{models[_place(group[0].source)]} {group[0].precision or f'({PurePath(group[0].file).stem})'}"
        for group in members
    ]
    labels: list[str] = []
    for label, group in zip(plain, members, strict=True):
        alike = [other[0] for other, name in zip(members, plain, strict=True) if name == label]
        extra = _differences(group[0], alike) if len(alike) > 1 else ""
        full = f"{label} ({extra})" if extra else label
        number = sum(name == full or name.startswith(f"{full} #") for name in labels)
        labels.append(f"{full} #{number + 1}" if number else full)
    return labels


def _differences(run: Run, alike: Sequence[Run]) -> str:
    """``num 16, solver.kind gptq``: what is not the same for all; its file where a run does not say."""
    if not run.complete:
        return PurePath(run.file).stem
    known = [other for other in alike if other.complete]
    leaves = [_leaves({**(other.recipe or {}), "calibration": other.calibration}) for other in known]
    own = leaves[next(i for i, other in enumerate(known) if other is run)]
    told = [
        f"{name.removeprefix('calibration.')} {_plain(value)}"
        for name, value in own.items()
        if any(other.get(name) != value for other in leaves) and name.split(".")[-1] != "fingerprint"
    ]
    return ", ".join(told[:_MOST_DIFFERENCES])


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{name}.{key}" if name else str(key))
    return found


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _ordered(rows: Iterable[Row]) -> list[Metric]:
    """By group, then by base: times as they pass, others in the order of first appearance."""
    found = list(dict.fromkeys(metric for row in rows for metric in row.values))
    bases = list(dict.fromkeys(metric.base for metric in found))

    def place(metric: Metric) -> tuple[int, int, int]:
        known = _TIMES.index(metric.name) if metric.name in _TIMES else len(_TIMES)
        return GROUPS.index(metric.group), known, bases.index(metric.base)

    return sorted(found, key=place)


def _in_common(rows: Sequence[Row]) -> bool:
    bases = [base for row in rows for base in {metric.base for metric in row.values}]
    return len(bases) != len(set(bases))


def _listed(row: Row) -> str:
    names = [metric.title for metric in row.values]
    return "; ".join(names[:4]) or "none"


def _identity_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        for run in row.runs:
            if run.precision is None:
                notes.append(
                    f"'{run.file}' does not state how its model was quantized, so it is a row of its own; "
                    "logs (--log_dir) do."
                )
            elif not run.complete and len(row.runs) > 1:
                notes.append(f"'{run.file}' names its precision only, and was taken for '{row.label}'.")
    return notes


def _repeat_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        for metric, values in row.values.items():
            if len(values) > 1:
                listed = ", ".join(f"{value.number:.6g} ('{value.origin}')" for value in values)
                notes.append(
                    f"{row.label}: {metric.title} was measured {len(values)} times with different results, "
                    f"{listed}; the last one is shown."
                )
    return notes


def _setting_notes(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[str]:
    """What was measured under several settings stands in several columns: say so."""
    notes = []
    told: dict[tuple[tuple[str, str], ...], list[str]] = {}
    comparison = Comparison(rows, metrics, ())
    for base in dict.fromkeys(metric.base for metric in metrics):
        same = [metric for metric in metrics if metric.base == base]
        if len(same) > 1:
            parts = tuple((comparison.apart(m) or m.said or "not stated", _having(rows, m)) for m in same)
            told.setdefault(parts, []).append(same[0].name)
    for parts, names in told.items():
        ways = "; ".join(f"{way} ({having})" for way, having in parts)
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        notes.append(
            f"{shown}: measured in {len(parts)} ways that are not comparable, one column each: {ways}."
        )
    return notes


def _having(rows: Sequence[Row], metric: Metric) -> str:
    names = [row.label for row in rows if metric in row.values]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _text_notes(rows: Sequence[Row]) -> list[str]:
    """Perplexities per token of different tokenizers, and texts scored in spite of a leak."""
    counts: dict[Metric, dict[int, str]] = {}
    leaks = []
    for row in rows:
        for run in row.runs:
            if run.facts.get("allow_leak"):
                leaks.append(f"{row.label}: '{run.file}' was scored with --allow_leak.")
            for metric in run.values:
                if metric.group == "perplexity" and metric.name in run.facts.get("tokens", {}):
                    count = run.facts["tokens"][metric.name]
                    counts.setdefault(metric, {}).setdefault(count, row.label)
    notes = [
        f"{metric.name}: the models score different numbers of tokens ("
        + ", ".join(f"{count:,} by {label}" for count, label in found.items())
        + "), so their tokenizers differ and their perplexities are not comparable."
        for metric, found in counts.items()
        if len(found) > 1 and max(found) > 1.001 * min(found)
    ]
    vocabularies = {
        run.config["vocab_size"]: row.label
        for row in rows
        for run in row.runs
        if run.facts.get("tokens") and isinstance(run.config.get("vocab_size"), int)
    }
    if vocabularies and max(vocabularies) > 1.001 * min(vocabularies):
        listed = ", ".join(f"{size:,} of {label}" for size, label in vocabularies.items())
        notes.append(f"The vocabularies differ ({listed}), so perplexities are comparable within each only.")
    return notes + leaks


def _version_notes(rows: Sequence[Row]) -> list[str]:
    found = {run.facts.get("lm_eval"): row.label for row in rows for run in row.runs}
    found.pop(None, None)
    if len(found) < 2:
        return []
    listed = ", ".join(f"{version} for {label}" for version, label in found.items())
    return [f"Tasks were run with several versions of lm-eval: {listed}."]
