"""Pictures of a search: objective against cost, and what each block matters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quamba.reporting.charts import COLOURS
from quamba.search.problem import Limit

if TYPE_CHECKING:
    from quamba.search.result import Row
    from quamba.search.search import Outcome

_UNITS = {"bytes": (2**20, "weights, MiB"), "ms": (1.0, "{}, ms"), "blocks": (1.0, "blocks of {}")}
_POINT, _FRONT, _CHOSEN = "#bbbbbb", COLOURS[0], COLOURS[1]


def pareto(outcome: Outcome, table: Sequence[Row], axis: Limit) -> bytes:
    """Every candidate, the front, the budget and the choice, as PNG."""
    by, unit = _UNITS[axis.unit]
    figure, plot = _figure(7, 4.2)
    points = [(row.costs[axis.name] / by, row.candidate.score) for row in table]
    plot.scatter(*zip(*points, strict=True), s=14, color=_POINT, label="candidates")
    front = sorted(point for point, row in zip(points, table, strict=True) if row.front)
    plot.plot(*zip(*front, strict=True), color=_FRONT, marker="o", markersize=4, label="Pareto front")
    chosen = next(p for p, row in zip(points, table, strict=True) if row.candidate.labels == outcome.chosen)
    plot.scatter(
        [chosen[0]], [chosen[1]], s=70, facecolors="none", edgecolors=_CHOSEN, linewidths=2, label="chosen"
    )
    if axis.most < float("inf"):
        plot.axvline(axis.most / by, color="#444444", linewidth=0.8, linestyle="--", label="budget")
    others = " or ".join(outcome.problem.labels[1:])
    plot.set_xlabel(unit.format(others if axis.unit == "blocks" else axis.name), fontsize=9)
    plot.set_ylabel(outcome.spec.objective.title, fontsize=9)
    plot.legend(fontsize=8, frameon=False)
    return _png(figure)


def sensitivity(outcome: Outcome) -> bytes:
    """A bar for each block and precision: how much lower the objective is with that block alone changed."""
    labels, table = outcome.problem.labels, outcome.sensitivities
    shown = [p for p in range(len(labels)) if any(row[p] for row in table)]
    figure, plot = _figure(min(14.0, 3 + 0.45 * len(table) * max(1, len(shown))), 3.4)
    width = 0.8 / max(1, len(shown))
    for k, p in enumerate(shown):
        places = [i + (k + 0.5) * width - 0.4 for i in range(len(table))]
        gains = [-row[p] for row in table]
        plot.bar(places, gains, width=width, color=COLOURS[p % len(COLOURS)], label=labels[p])
    plot.axhline(0, color="#444444", linewidth=0.8)
    plot.set_xlabel("block", fontsize=9)
    plot.set_ylabel(f"gain in {outcome.spec.objective.title}", fontsize=8)
    plot.xaxis.get_major_locator().set_params(integer=True)
    plot.legend(fontsize=8, frameon=False)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    plot.tick_params(labelsize=8)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=130, format="png")
    return out.getvalue()
