"""Bars side by side: one panel a metric, for pictures (matplotlib) and pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quamba.errors import missing_extra
from quamba.reporting.measures import GROUPS, Comparison, Group, Metric, Row, Value
from quamba.reporting.tables import cell

#: One hue a float model, told apart by colour-blind readers too; shared with the page.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#b8a12c", "#3aa6c9", "#aa3377")
#: Panels of one group; the table has the rest.
MOST_PANELS = 12
_COLUMNS, _LABEL = 3, 60


@dataclass(frozen=True)
class Bar:
    """value None: infinite or no number, as ``text`` says.

    low, high  ends of the error bar: one standard error, or 5th and 95th percentile
    colour     index into COLOURS, the same for all rows of a model
    quantized  drawn full; a float model pale; published hatched
    """

    label: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    colour: int
    quantized: bool
    published: bool


@dataclass(frozen=True)
class Panel:
    """Bars from 0 to ``most``, in the order of the rows; only rows that have the metric."""

    group: Group
    title: str
    setting: str
    better: str
    bars: Sequence[Bar]
    most: float


def panels(comparison: Comparison) -> list[Panel]:
    """Of each group the first metrics, those that several rows have before the others."""
    found = []
    for group in GROUPS:
        metrics = comparison.of_group(group)
        metrics.sort(key=lambda m: sum(m in row.values for row in comparison.rows) < 2)
        found += [_panel(comparison, metric) for metric in metrics[:MOST_PANELS]]
    return found


def undrawn(comparison: Comparison) -> int:
    """Metrics that have no panel."""
    return len(comparison.metrics) - len(panels(comparison))


def _panel(comparison: Comparison, metric: Metric) -> Panel:
    models = list(dict.fromkeys(row.model for row in comparison.rows))
    bars = [
        _bar(row, metric, models.index(row.model) % len(COLOURS))
        for row in comparison.rows
        if metric in row.values
    ]
    ends = [x for bar in bars if bar.value is not None for x in (bar.value, bar.high) if x is not None]
    better = f"{metric.better} is better"
    return Panel(metric.group, comparison.heading(metric), metric.said, better, bars, max(ends, default=0.0))


def _bar(row: Row, metric: Metric, colour: int) -> Bar:
    value = row.shown(metric)
    text = cell(metric, row)
    drawn = value is not None and math.isfinite(value.number)
    low, high = _ends(value) if value is not None and drawn else (None, None)
    number = value.number if value is not None and drawn else None
    return Bar(row.label, number, low, high, text, colour, row.precision != "float", row.published)


def _ends(value: Value) -> tuple[float | None, float | None]:
    if value.stderr is not None and math.isfinite(value.stderr):
        return max(0.0, value.number - value.stderr), value.number + value.stderr
    return value.low, value.high


def require_pictures() -> None:
    """Refuse before any work where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot", "A picture")


def draw(drawn: Sequence[Panel], path: str | Path, title: str = "") -> Path:
    """All panels into one PNG of up to three columns, each group on lines of its own."""
    require_pictures()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = _lines(drawn)
    heights = [0.9 + 0.27 * max(len(panel.bars) for panel in line) for line in lines]
    columns = max((len(line) for line in lines), default=1)
    labels = [_labels_wanted(line) for line in lines]
    widths = [
        3.1
        + max(
            (_label_inches(line[j]) for line, on in zip(lines, labels, strict=True) if on[j:] and on[j]),
            default=0,
        )
        for j in range(columns)
    ]
    figure = Figure(
        figsize=(sum(widths), 0.6 + sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    if title:
        figure.suptitle(_literal(title), fontsize=11)
    for i, line in enumerate(lines):
        for j, panel in enumerate(line):
            _draw_panel(figure.add_subplot(grid[i, j]), panel, labels[i][j])
    figure.savefig(path, dpi=130, format="png")
    return Path(path)


def _lines(drawn: Sequence[Panel]) -> list[list[Panel]]:
    """Each group on as few lines as hold it, and these about equally long."""
    lines: list[list[Panel]] = []
    for group in GROUPS:
        found = [panel for panel in drawn if panel.group == group]
        count = math.ceil(len(found) / _COLUMNS)
        length = math.ceil(len(found) / max(1, count))
        lines += [found[start : start + length] for start in range(0, len(found), max(1, length))]
    return lines


def _labels_wanted(line: Sequence[Panel]) -> list[bool]:
    """A panel with the same rows as its left neighbour goes without labels."""
    rows = [[bar.label for bar in panel.bars] for panel in line]
    return [j == 0 or rows[j] != rows[j - 1] for j in range(len(line))]


def _label_inches(panel: Panel) -> float:
    return 0.07 * min(_LABEL, max(len(bar.label) for bar in panel.bars))


def _draw_panel(axis: Any, panel: Panel, labels: bool) -> None:
    places = range(len(panel.bars))
    most = panel.most or 1.0
    for i, bar in enumerate(panel.bars):
        colour = COLOURS[bar.colour]
        if bar.value is None:
            axis.text(0.01 * most, i, bar.text, va="center", fontsize=8, color="#666666")
            continue
        face = "white" if bar.published else colour if bar.quantized else f"{colour}80"
        hatch = "////" if bar.published else None
        axis.barh(i, bar.value, height=0.66, color=face, edgecolor=colour, hatch=hatch, linewidth=0.8)
        end = bar.value
        if bar.low is not None and bar.high is not None:
            axis.plot([bar.low, bar.high], [i, i], color="#222222", linewidth=1.1)
            end = max(end, bar.high)
        axis.text(end + 0.015 * most, i, bar.text, va="center", fontsize=8)
    longest = max(len(bar.text) for bar in panel.bars)
    axis.set_xlim(0, most * (1.05 + 0.026 * longest))
    axis.set_ylim(len(panel.bars) - 0.4, -0.6)
    axis.set_yticks(
        list(places), [_literal(textwrap.shorten(b.label, _LABEL, placeholder="…")) for b in panel.bars]
    )
    axis.tick_params(axis="y", length=0, labelsize=8, labelleft=labels)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_literal("\n".join(textwrap.wrap(panel.title, 46))), fontsize=9, loc="left")
    axis.set_xlabel(panel.better, fontsize=7, color="#555555")


def _literal(text: str) -> str:
    """Dollar signs would be read as formulas."""
    return text.replace("$", r"\$")
