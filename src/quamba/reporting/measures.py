"""What a comparison is made of: metrics, values, one row a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Group = Literal["accuracy", "perplexity", "size", "speed"]
GROUPS: tuple[Group, ...] = ("accuracy", "perplexity", "size", "speed")
Setting = tuple[tuple[str, str], ...]

#: How the parts of a setting are said; the rest stands as it is.
_PHRASES = {
    "shots": "{} shots",
    "samples": "{} samples",
    "windows": "{} windows",
    "window_length": "{} tokens a window",
    "max_length": "at most {} tokens of a text",
    "batch_size": "batch {}",
    "prompt_len": "prompt {}",
    "gen_len": "{} new tokens",
}


@dataclass(frozen=True)
class Metric:
    """One column: only numbers with equal ``Metric`` are compared.

    name     "lambada_local acc", the name of a text, "TPOT"
    unit     "" where the number has none
    setting  how it was measured, (name, value) in the order it is said
    """

    group: Group
    name: str
    unit: str
    better: Literal["higher", "lower"]
    setting: Setting = ()

    @property
    def base(self) -> tuple[str, str, str]:
        """The same for all settings."""
        return self.group, self.name, self.unit

    @property
    def said(self) -> str:
        """The setting as a phrase, "" without one."""
        return said(self.setting)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True)
class Value:
    """One number.

    stderr     standard error
    low, high  5th and 95th percentile of repeated timings
    origin     the file, or the paper and its table
    """

    number: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    origin: str = ""


@dataclass(frozen=True)
class Run:
    """What one file says of one model.

    source      path or hub id of the float model
    precision   "float", the recipe's name, None where the file does not say
    recipe      None: float, or not stated
    complete    the file states recipe and calibration, so that its model is known exactly
    facts       what a note may depend on: versions, device, allow_leak, tokens scored of each text
    """

    file: str
    source: str
    precision: str | None
    recipe: Mapping[str, Any] | None
    calibration: Mapping[str, Any]
    config: Mapping[str, Any]
    complete: bool
    values: Mapping[Metric, Value]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One model, or what a paper says of one.

    model      label of the float model: rows of one model have the same
    values     every measurement in the order of the files; the last one is shown
    published  numbers of a paper
    """

    label: str
    model: str
    precision: str
    values: Mapping[Metric, Sequence[Value]]
    runs: Sequence[Run] = ()
    published: bool = False

    def shown(self, metric: Metric) -> Value | None:
        found = self.values.get(metric)
        return found[-1] if found else None


@dataclass(frozen=True)
class Comparison:
    """rows by model, float first, a paper's after the row that they belong to; metrics by group."""

    rows: Sequence[Row]
    metrics: Sequence[Metric]
    notes: Sequence[str]

    def of_group(self, group: Group) -> list[Metric]:
        return [metric for metric in self.metrics if metric.group == group]

    def heading(self, metric: Metric) -> str:
        """The metric's title, with what sets it apart from others of the same name."""
        apart = self.apart(metric)
        return f"{metric.title} [{apart}]" if apart else metric.title

    def apart(self, metric: Metric) -> str:
        others = [dict(m.setting) for m in self.metrics if m.base == metric.base and m != metric]
        return said([(k, v) for k, v in metric.setting if any(other.get(k) != v for other in others)])

    def baseline(self, row: Row, metric: Metric) -> Value | None:
        """The float model's value, for the quantized rows of our own."""
        if row.published or row.precision == "float":
            return None
        for other in self.rows:
            if other.model == row.model and other.precision == "float" and not other.published:
                return other.shown(metric)
        return None


def said(setting: Sequence[tuple[str, str]]) -> str:
    """``(("shots", "0"), ("samples", "100"))`` -> "0 shots, 100 samples"."""
    return ", ".join(_PHRASES.get(name, "{}").format(value) for name, value in setting)
