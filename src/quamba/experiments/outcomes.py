"""What the runs of a sweep measured, and how far that is from what was expected.

A value is reproduced when it is within the tolerance of the expected one: the one that the sweep's file
states, else two standard errors of the measurement (for LAMBADA's 5,153 samples and 60 % about 1.4 points). A
value of a part of a task is compared with expected values of that part only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quamba.cli.flags import QuantizeFlags
from quamba.cli.log import jsonable
from quamba.errors import QuambaError
from quamba.experiments.spec import SUBSET, Expected, RunSpec
from quamba.experiments.state import RunsFolder
from quamba.reporting.measures import Metric, Value
from quamba.reporting.runs import read_run

#: A difference of so many standard errors is still called reproduced.
STANDARD_ERRORS = 2.0
State = Literal["done", "failed", "not done"]
Judgement = Literal["reproduced", "near", "differs", "not comparable", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """
    judgement  "near": within twice the tolerance
    measured, tolerance, difference  in the unit of the expected value
    rule       where the tolerance is from
    reason     of "not comparable" and "not measured"
    """

    expected: Expected
    judgement: Judgement
    measured: float | None = None
    tolerance: float | None = None
    rule: str = ""
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Measured less expected."""
        return None if self.measured is None else self.measured - self.expected.value


@dataclass(frozen=True)
class Outcome:
    """One run.

    values    by metric, empty for a run that is not done
    sentence  why it failed
    """

    name: str
    state: State
    options: Mapping[str, Any]
    flags: QuantizeFlags
    size_mib: float | None
    seconds: float | None
    values: Mapping[Metric, Value]
    verdicts: Sequence[Verdict]
    sentence: str = ""

    @property
    def model(self) -> str:
        return Path(str(self.options["model"])).name

    @property
    def precision(self) -> str:
        return self.flags.label if self.flags.quantize else "float"

    @property
    def alpha(self) -> str:
        return "default" if self.flags.percentile_alpha is None else f"{self.flags.percentile_alpha:g}"

    def key(self, *without: str) -> str:
        """Equal for runs that differ in these flags (and in where they are stored) only."""
        kept = {k: v for k, v in self.options.items() if k not in (*without, "output_subdir")}
        return json.dumps(jsonable(kept), sort_keys=True, default=str)

    def value(self, metric: Metric) -> Value | None:
        return self.values.get(metric)

    def verdict(self, metric: Metric) -> Verdict | None:
        """The first expected value for a metric."""
        return next((v for v in self.verdicts if v.expected.metric == metric.name), None)


@dataclass(frozen=True)
class Outcomes:
    """All runs of a sweep in its order, and the metrics that any of them has."""

    name: str
    title: str
    runs: Sequence[Outcome]
    notes: Sequence[str]

    @property
    def metrics(self) -> list[Metric]:
        """Accuracies before perplexities; those with expected values first."""
        found = list(dict.fromkeys(m for run in self.runs for m in run.values))
        found = [m for m in found if m.group in ("accuracy", "perplexity")]
        named = {v.expected.metric for run in self.runs for v in run.verdicts}
        return sorted(found, key=lambda m: (m.name not in named, m.group))

    @property
    def verdicts(self) -> list[tuple[Outcome, Verdict]]:
        return [(run, verdict) for run in self.runs for verdict in run.verdicts]


def read_outcomes(path: str | Path) -> Outcomes:
    """Raises QuambaError where ``path`` is no folder of a sweep."""
    folder = RunsFolder.at(path)
    if not folder.path.exists():
        raise QuambaError(f"There is no folder '{path}', expected the folder of a sweep.")
    plan = folder.plan()
    runs = [_outcome(folder, fields) for fields in plan["runs"]]
    notes = [f"{run.name} failed: {run.sentence}" for run in runs if run.state == "failed"]
    missing = [run.name for run in runs if run.state == "not done"]
    if missing:
        notes.append(f"Not done, {len(missing)} of {len(runs)} runs: {', '.join(missing)}.")
    return Outcomes(plan["name"], plan["title"], runs, notes + _same_numbers(runs))


def judge(expected: Expected, value: Value | None, partial: bool) -> Verdict:
    """partial: only a part of the samples or windows was scored."""
    if value is None:
        return Verdict(expected, "not measured", reason="the run has no such value")
    scale = 100.0 if abs(expected.value) > 1 and _is_share(expected) else 1.0
    measured = scale * value.number
    if partial != expected.subset:
        scored = "a part of the samples was scored" if partial else "all samples were scored"
        meant = "that part" if expected.subset else "all of them"
        return Verdict(expected, "not comparable", measured, reason=f"{scored}, the value is of {meant}")
    tolerance, rule = expected.tolerance, "as the sweep states"
    if tolerance is None:
        if value.stderr is None:
            return Verdict(
                expected, "not comparable", measured, reason="no standard error and no stated tolerance"
            )
        tolerance, rule = STANDARD_ERRORS * scale * value.stderr, f"{STANDARD_ERRORS:g} standard errors"
    difference = abs(measured - expected.value)
    judgement: Judgement = (
        "reproduced" if difference <= tolerance else "near" if difference <= 2 * tolerance else "differs"
    )
    return Verdict(expected, judgement, measured, tolerance, rule)


def _outcome(folder: RunsFolder, fields: Mapping[str, Any]) -> Outcome:
    spec = RunSpec(fields["name"], tuple(fields["arguments"]))
    expected = [Expected(**one) for one in fields["expected"]]
    record = folder.result(spec.name)
    state: State = "not done"
    values: Mapping[Metric, Value] = {}
    size = seconds = None
    if record is not None and record.get("sweep", {}).get("request") == fields["request"]:
        state = "done"
        values = read_run(folder.result_file(spec.name))[0].values
        size, seconds = record.get("size_mib"), record["sweep"].get("seconds")
    failure = folder.failure(spec.name) if state != "done" else None
    if failure is not None:
        state = "failed"
    partial = any(spec.options.get(flag) for flag in SUBSET)
    by_name = {metric.name: value for metric, value in values.items()}
    verdicts = [judge(one, by_name.get(one.metric), partial) for one in expected]
    sentence = str(failure.get("sentence", "")) if failure is not None else ""
    return Outcome(spec.name, state, spec.options, spec.flags, size, seconds, values, verdicts, sentence)


def _same_numbers(runs: Sequence[Outcome]) -> list[str]:
    """Why percentiles can have no effect: a reader would look for a fault."""
    floats = [run for run in runs if run.flags.quantize and run.flags.a_bits == 16]
    if len({run.alpha for run in floats}) < 2:
        return []
    return ["With 16-bit activations nothing is clipped, so the percentile has no effect there."]


def _is_share(expected: Expected) -> bool:
    """Accuracies are shares of one in our files, and percent in papers."""
    return not expected.metric.endswith(("perplexity", "ppl"))
