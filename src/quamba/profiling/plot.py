"""A picture of one report, or of several beside each other."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quamba.errors import missing_extra, one_of
from quamba.profiling.profile import ProfileReport
from quamba.profiling.size import KINDS

FORMATS = (".png", ".svg", ".pdf")
# One colour a kind of weight, and one a model.
_KIND_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_MODEL_COLOURS = ("#4477aa", "#bbbbbb")


def require_plot(path: str | Path) -> None:
    """Refuse, before any work, a file of another kind, and a picture without matplotlib."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise one_of(f"The ending of the plot file '{path}'", suffix, FORMATS)
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot", "A plot")


def plot(reports: dict[str, ProfileReport], path: str | Path, title: str = "") -> Path:
    """Bars of the sizes by kind, and of each mode's median with its 5th and 95th percentile.

    reports  name of the model as it should stand in the picture -> its report, all of the same modes
    path     .png, .svg or .pdf
    """
    require_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path).expanduser()
    sized = {name: report for name, report in reports.items() if report.size is not None}
    modes = next(iter(reports.values())).spec.timed_modes
    panels = bool(sized) + len(modes)
    height = 1.6 + 0.45 * len(reports)
    figure = Figure(figsize=(9, 0.5 + height * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False).flat)
    if title:
        figure.suptitle(title, fontsize=10)
    if sized:
        _draw_sizes(axes.pop(0), sized)
    for axis, mode in zip(axes, modes, strict=True):
        _draw_times(axis, mode, reports)
    draft = path.with_name(f".{path.name}")
    try:
        figure.savefig(draft, dpi=150, format=path.suffix[1:].lower())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _draw_sizes(axis: Any, reports: dict[str, ProfileReport]) -> None:
    names = list(reports)
    left = [0.0] * len(names)
    for kind, colour in zip(KINDS, _KIND_COLOURS, strict=True):
        sizes = [report.size.weights[kind] / 2**20 for report in reports.values() if report.size]
        if any(sizes):
            axis.barh(names, sizes, left=left, color=colour, label=kind, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for i, total in enumerate(left):
        axis.text(total, i, f" {total:.1f}", va="center", fontsize=8)
    _finish(axis, "weights, MiB", max(left))
    axis.legend(ncols=len(KINDS), fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_times(axis: Any, mode: str, reports: dict[str, ProfileReport]) -> None:
    found = {name: latency for name, r in reports.items() for m, latency in r.latencies.items() if m == mode}
    for i, (name, latency) in enumerate(found.items()):
        median = latency.median_ms
        spread = [[max(0.0, median - latency.p5_ms)], [max(0.0, latency.p95_ms - median)]]
        colour = _MODEL_COLOURS[i % len(_MODEL_COLOURS)]
        axis.barh([name], [median], xerr=spread, color=colour, height=0.6, capsize=3, ecolor="#333333")
        axis.text(max(median, latency.p95_ms), i, f"  {median:.2f}", va="center", fontsize=8)
    _finish(axis, f"{mode}, ms", max(max(x.median_ms, x.p95_ms) for x in found.values()))


def _finish(axis: Any, label: str, most: float) -> None:
    axis.set_xlim(0, 1.12 * most)
    axis.set_xlabel(label)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
