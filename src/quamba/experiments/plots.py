"""The plots of a report as SVG: they read in light and dark, at any width, without a script.

A mark's colour says how far its value is from the expected one, in tolerances; hollow diamonds are expected
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from quamba.experiments.outcomes import Outcome, Outcomes, Verdict
from quamba.reporting.measures import Metric

STYLE = """
.plot { width: 100%; max-width: 50rem; height: auto; display: block; font-size: 12px; }
.plot text { fill: var(--ink); } .plot .soft { fill: var(--soft); }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .link { stroke: var(--soft); stroke-width: 1.2; fill: none; }
.plot .hollow { fill: none; stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: none; }
.plot .error { stroke: var(--soft); stroke-width: 1.4; }
.reproduced { fill: #228833; } .near { fill: #d49a1a; } .differs { fill: #cc3311; } .none { fill: #4477aa; }
td.reproduced, td.near, td.differs { font-weight: 600; background: none; }
td.reproduced { color: #228833; } td.near { color: #b07d0e; } td.differs { color: #cc3311; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem;
  font-size: .85rem; }
ul.legend svg { display: inline; width: 15px; height: 15px; margin-right: .35rem; vertical-align: -1px; }
.wide { display: grid; gap: 1.2rem; margin-top: 1rem; }
@media (min-width: 60rem) { tbody th { white-space: nowrap; } th, td { padding: .35rem .5rem; } }
"""

LEGEND = (
    ("reproduced", "within the tolerance"),
    ("near", "within twice the tolerance"),
    ("differs", "farther"),
    ("none", "nothing to compare with"),
)
_WIDTH, _ROW, _LEFT, _RIGHT = 760.0, 22.0, 310.0, 70.0


@dataclass(frozen=True)
class _Scale:
    """Numbers to places; ``log`` for sizes that differ by much."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._map(self.low), self._map(self.high)
        return self.start + (self._map(value) - low) / (high - low) * (self.end - self.start)

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        else:
            raw = (self.high - self.low) / most
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]


def judgement_class(verdict: Verdict | None) -> str:
    found = None if verdict is None else verdict.judgement
    return found if found in ("reproduced", "near", "differs") else "none"


def size_plot(outcomes: Outcomes, metric: Metric) -> str:
    """The metric against the size of the model, one mark a run; "" with less than two."""
    runs = [run for run in outcomes.runs if run.value(metric) is not None and run.size_mib]
    runs = [run for run in runs if math.isfinite(_number(run, metric))]
    if len(runs) < 2:
        return ""
    height, top, bottom, left = 330.0, 12.0, 44.0, 58.0
    sizes = [run.size_mib or 1.0 for run in runs]
    log = max(sizes) / min(sizes) > 4
    pad = (max(sizes) / min(sizes)) ** 0.06 if log else 1.0
    room = 0.0 if log else 0.06 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    across = _Scale(min(sizes) / pad - room, max(sizes) * pad + room, left, _WIDTH - 20, log)
    up = _spread(_values(runs, metric, errors=True), height - bottom, top)
    parts = _axis(up, lambda y: f'x1="{left}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"', left - 6, None)
    parts += _axis(
        across,
        lambda x: f'x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"',
        None,
        height - bottom + 16,
    )
    parts.append(_text(_WIDTH / 2, height - 8, "size, MiB", "soft", "middle"))
    parts.append(_text(14, (height - bottom) / 2, _unit(metric), "soft", "middle", turned=True))
    for run in runs:
        x = across(run.size_mib or 1.0)
        parts += _marks(run, metric, lambda value: (x, up(value)), upright=True)  # noqa: B023
    return _svg(height, parts, f"{metric.name} against size")


def effect_plot(
    groups: Sequence[tuple[str, Sequence[tuple[str, Outcome]]]], metric: Metric, title: str
) -> str:
    """One line a group: its runs on one scale, each mark with a letter from the key; "" without any pair."""
    drawn = [(label, _measured(runs, metric)) for label, runs in groups]
    drawn = [(label, runs) for label, runs in drawn if len(runs) > 1]
    if not drawn:
        return ""
    height = 34.0 + _ROW * len(drawn)
    across = _spread(_values([run for _, runs in drawn for _, run in runs], metric), _LEFT, _WIDTH - _RIGHT)
    line = f'y1="4" y2="{height - 26}"'
    parts = _axis(across, lambda x: f'x1="{x:.1f}" x2="{x:.1f}" {line}', None, height - 10)
    for i, (label, runs) in enumerate(drawn):
        y = 14 + _ROW * i
        places = [across(_number(run, metric)) for _, run in runs]
        parts.append(_text(_LEFT - 12, y + 4, label, "", "end"))
        parts.append(f'<line class="link" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="{y}" y2="{y}"/>')
        for said, run in runs:
            parts += _marks(run, metric, lambda v: (across(v), y), upright=False, shape=said)  # noqa: B023
        ends = [_number(run, metric) for _, run in runs]
        parts.append(_text(_WIDTH - _RIGHT + 8, y + 4, f"{ends[-1] - ends[0]:+.3g}", "soft", "start"))
    return _svg(height, parts, title)


def shape(kind: str, x: float, y: float, look: str, title: str = "") -> str:
    """A mark: a disc for the default percentile and for w8a8, squares and triangles for others."""
    said = f"<title>{escape(title)}</title>" if title else ""
    r = 5.5
    if kind in ("1", "w4a8"):
        corner = f'x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"'
        return f'<rect class="{look}" {corner}>{said}</rect>'
    if kind == "w4a16":
        corners = f"{x:.1f},{y - r - 1:.1f} {x + r + 1:.1f},{y + r:.1f} {x - r - 1:.1f},{y + r:.1f}"
        return f'<polygon class="{look}" points="{corners}">{said}</polygon>'
    if kind == "expected":
        corners = f"{x:.1f},{y - 8:.1f} {x + 8:.1f},{y:.1f} {x:.1f},{y + 8:.1f} {x - 8:.1f},{y:.1f}"
        return f'<polygon class="hollow" points="{corners}">{said}</polygon>'
    return f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{r}">{said}</circle>'


def _marks(
    run: Outcome,
    metric: Metric,
    place: Callable[[float], tuple[float, float]],
    *,
    upright: bool,
    shape: str = "",
) -> Iterable[str]:
    """The error bar, the value, and what was expected."""
    value, verdict = run.value(metric), run.verdict(metric)
    assert value is not None
    number, scale = _number(run, metric), _percent(metric)
    if value.stderr is not None and upright:
        (x1, y1), (x2, y2) = (place(number + sign * scale * value.stderr) for sign in (-1, 1))
        yield f'<line class="error" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    title = f"{run.name}: {number:.4g}"
    if verdict is not None:
        wanted = verdict.expected.value
        title += f", expected {wanted:g} ({verdict.expected.source}): {verdict.judgement}"
        (x1, y1), (x, y) = place(number), place(wanted)
        yield f'<line class="link" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
        yield _mark(
            "expected", x, y, "hollow", f"{run.name}: expected {wanted:g} ({verdict.expected.source})"
        )
    x, y = place(number)
    yield _mark(shape or run.precision, x, y, judgement_class(verdict), title)


_mark = shape


def _values(runs: Iterable[Outcome], metric: Metric, errors: bool = False) -> list[float]:
    """All that is drawn: values, ends of their errors, and expected ones."""
    found = []
    for run in runs:
        value, number = run.value(metric), _number(run, metric)
        error = _percent(metric) * (value.stderr or 0.0) if errors and value is not None else 0.0
        found += [number - error, number + error]
        verdict = run.verdict(metric)
        if verdict is not None:
            found.append(verdict.expected.value)
    return found


def _measured(runs: Sequence[tuple[str, Outcome]], metric: Metric) -> list[tuple[str, Outcome]]:
    return [(said, run) for said, run in runs if math.isfinite(_number(run, metric))]


def _number(run: Outcome, metric: Metric) -> float:
    value = run.value(metric)
    return math.nan if value is None else _percent(metric) * value.number


def _percent(metric: Metric) -> float:
    return 100.0 if metric.group == "accuracy" else 1.0


def _unit(metric: Metric) -> str:
    return f"{metric.name}, %" if metric.group == "accuracy" else metric.name


def _spread(values: Sequence[float], start: float, end: float) -> _Scale:
    """A scale with some room at both ends."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return _Scale(low - room, high + room, start, end)


def _axis(scale: _Scale, line: Callable[[float], str], x: float | None, y: float | None) -> list[str]:
    """Lines at round numbers; their labels at x (of a vertical scale) or at y."""
    parts = []
    for value in scale.ticks():
        at = scale(value)
        parts.append(f'<line class="grid" {line(at)}/>')
        label = f"{value:,.6g}"
        parts.append(
            _text(x, at + 4, label, "soft", "end")
            if x is not None
            else _text(at, y or 0.0, label, "soft", "middle")
        )
    return parts


def _text(x: float, y: float, text: str, look: str, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    kind = f' class="{look}"' if look else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
