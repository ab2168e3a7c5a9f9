"""Pictures of an analysis: noise by layer and site, ranges by layer, divergence by position."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quamba.analysis.analyze import Analysis, SiteReport
from quamba.errors import missing_extra

PICTURES = ("snr.png", "ranges.png", "kl.png")
_COLOURS = {"absmax": "#ee6677", "99.99": "#ccbb44", "99.9": "#228833", "99": "#66ccee", "std": "#4477aa"}
_LABELS = {"absmax": "largest |x|", "std": "standard deviation"}
_COLOURED = 0.9  # share of the cells that differ in colour: the best, often norms, would pale all others
_AT_EDGE = 0.35  # of the colour scale: darker cells than this get white numbers
_SMOOTHING = 32  # points that a curve over positions is averaged to
_MOST_NUMBERS = 32  # layers up to which each cell has its number


def require_plots() -> None:
    """Refuse pictures without matplotlib, before any work."""
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot", "A plot")


def plot(analysis: Analysis, folder: str | Path, title: str = "") -> list[Path]:
    """Write ``PICTURES`` into the folder, which is made if need be; the paths."""
    require_plots()
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (_draw_snr(analysis, title), _draw_ranges(analysis, title), _draw_kl(analysis, title))
    return [_save(figure, folder / name) for name, figure in zip(PICTURES, drawn, strict=True)]


def _save(figure: Any, path: Path) -> Path:
    draft = path.with_name(f".{path.name}")
    try:
        figure.savefig(draft, dpi=130, format="png")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _grid(analysis: Analysis) -> tuple[list[str], dict[int, dict[str, SiteReport]]]:
    """The names of a block's sites in order, and the reports by layer and name."""
    layers: dict[int, dict[str, SiteReport]] = {}
    for site in analysis.sites:
        if site.layer is not None:
            layers.setdefault(site.layer, {})[site.site] = site
    return list(layers[0]), layers


def _draw_snr(analysis: Analysis, title: str) -> Any:
    names, layers = _grid(analysis)
    columns: list[tuple[str, list[str], Callable[[SiteReport], float | None]]] = [
        ("errors of all layers before included", names, lambda site: site.snr_db)
    ]
    own = [name for name in names if layers[0][name].own_snr_db is not None]
    if own:
        columns.append(("own error of each block", own, lambda site: site.own_snr_db))
    width = 1.5 + 0.55 * sum(len(shown) for _, shown, _ in columns)
    figure = _figure(width, 1.8 + min(0.3 * len(layers), 12), title)
    ratios = [len(shown) for _, shown, _ in columns]
    axes = figure.subplots(1, len(columns), squeeze=False, width_ratios=ratios)[0]
    values = [
        [[_cell(value(sites[n])) for n in shown] for sites in layers.values()] for _, shown, value in columns
    ]
    finite = sorted(v for grid in values for row in grid for v in row if math.isfinite(v)) or [0.0]
    low, high = finite[0], finite[int(_COLOURED * (len(finite) - 1))]
    for axis, (label, shown, _), grid in zip(axes, columns, values, strict=True):
        image = _heat(axis, grid, shown, list(layers), low, high if high > low else low + 1)
        axis.set_title(f"signal-to-noise ratio, dB: {label}", fontsize=9)
    figure.colorbar(image, ax=list(axes), fraction=0.02, pad=0.01, extend="max").ax.tick_params(labelsize=8)
    return figure


def _cell(value: float | None) -> float:
    return math.nan if value is None else value


def _heat(
    axis: Any, grid: list[list[float]], names: list[str], layers: list[int], low: float, high: float
) -> Any:
    """Bad cells dark, those above ``high`` alike, those without a number (NaN) grey."""
    shown = [[min(max(v, low), high) for v in row] for row in grid]  # NaN stays
    image = axis.imshow(shown, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_facecolor("#999999")
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    step = max(1, len(layers) // 24)
    axis.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    if len(layers) <= _MOST_NUMBERS:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                dark = (shown[y][x] - low) / (high - low) < _AT_EDGE
                text = f"{value:.0f}" if math.isfinite(value) else str(value)
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
    return image


def _draw_ranges(analysis: Analysis, title: str) -> Any:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    names, layers = _grid(analysis)
    columns = 4
    rows = -(-len(names) // columns)
    figure = _figure(11, 1.0 + 2.1 * rows, f"{title}\nactivations of the float model, by layer".lstrip())
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axis, name in zip(axes, names, strict=False):
        ranges = [sites[name].range for sites in layers.values()]
        for key, colour in _COLOURS.items():
            values = [
                math.nan if r is None else r.percentiles[key] if key in r.percentiles else getattr(r, key)
                for r in ranges
            ]
            label = _LABELS.get(key, f"{key}% of |x| below")
            axis.plot(
                list(layers), values, color=colour, marker="o", markersize=2.5, linewidth=1, label=label
            )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _draw_kl(analysis: Analysis, title: str) -> Any:
    figure = _figure(8, 3.2, title)
    axis = figure.subplots()
    by_position = analysis.logits.kl_by_position
    axis.plot(by_position, color="#bbbbbb", linewidth=0.6, label="each position, mean over the windows")
    size = -(-len(by_position) // _SMOOTHING)
    if size > 1:
        parts = [by_position[i : i + size] for i in range(0, len(by_position), size)]
        centres = [i * size + (len(part) - 1) / 2 for i, part in enumerate(parts)]
        means = [sum(part) / len(part) for part in parts]
        axis.plot(centres, means, color="#4477aa", linewidth=1.6, label=f"mean of {size} positions")
    axis.axhline(analysis.logits.kl_mean, color="#ee6677", linewidth=0.8, linestyle="--", label="mean")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("position in the window, tokens", fontsize=8)
    axis.set_ylabel("KL(float || model), nats", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    return figure
