"""A self-contained HTML page: tables and bars, light and dark, no network, readable without its script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from quamba.reporting.charts import COLOURS, Bar, Panel, panels, undrawn
from quamba.reporting.measures import GROUPS, Comparison, Metric, Row
from quamba.reporting.tables import TITLES, cell, change, setting_lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #ffffff; --line: #d9dce1;
  --band: #f4f5f7; --track: #eceef1; --err: #1c1e21; --note: #fff7e0; --noteline: #e2b93b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a7b3; --paper: #16181c; --line: #363b44; --band: #1f2329;
    --track: #2a2f37; --err: #f2f3f5; --note: #2e2817; --noteline: #b8912a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0; }
p, li { max-width: 60rem; overflow-wrap: anywhere; } .soft, small { color: var(--soft); }
ul.notes { background: var(--note); border-left: 4px solid var(--noteline); margin: 1rem 0;
  padding: .6rem 1rem .6rem 2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { background: var(--band); vertical-align: bottom; font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child, td:first-child, .left { text-align: left; }
tbody th { font-weight: 500; min-width: 15rem; position: sticky; left: 0; background: var(--paper);
  overflow-wrap: anywhere; }
td small { display: block; } tr.published > * { font-style: italic; }
tr.first > * { border-top: 2px solid var(--line); }
thead button { all: unset; cursor: pointer; } thead button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.wrap { white-space: normal; overflow-wrap: anywhere; }
.panels { display: grid; gap: 1.2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .7rem .8rem; min-width: 0; }
figcaption small { display: block; margin-bottom: .4rem; overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: .6rem; font-size: .82rem;
  line-height: 1.25; margin-top: .5rem; }
.bar span { overflow-wrap: anywhere; } .bar b { font-weight: 500; font-variant-numeric: tabular-nums; }
.bar svg { grid-column: 1 / -1; width: 100%; height: 10px; display: block; background: var(--track);
  border-radius: 2px; margin-top: 2px; }
.bar line { stroke: var(--err); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.pale { opacity: .5; } .hollow { fill-opacity: .25; stroke-width: 2; stroke-dasharray: 4 3;
  vector-effect: non-scaling-stroke; }
@media (max-width: 30rem) { body { padding: .6rem; } th, td { padding: .3rem .45rem; }
  tbody th { min-width: 6rem; max-width: 8.5rem; } }
"""

# Numbers are sorted by data-v; cells without one stay last.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const order = column ? x - y : x.localeCompare(y);
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
  });
}
"""


def comparison_page(comparison: Comparison, title: str) -> str:
    """The whole page of ``quamba compare``."""
    own = [row for row in comparison.rows if not row.published]
    count = f"{len(own)} model{'s' * (len(own) != 1)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{count}. Under a number: the difference from the float model. '
        "± is one standard error. Pale bars: float models; dashed: published.</p>",
        notes_list(comparison.notes),
    ]
    drawn = panels(comparison)
    for group in GROUPS:
        metrics = comparison.of_group(group)
        if metrics:
            body.append(f"<h2>{escape(TITLES[group])}</h2>")
            body.append(comparison_table(comparison, metrics))
            body.append(_settings(comparison, metrics))
            body.append(figures([panel for panel in drawn if panel.group == group]))
    left = undrawn(comparison)
    if left:
        body.append(f'<p class="soft">{left} more metrics are in the tables only.</p>')
    body += ["<h2>Files</h2>", _files_table(own)]
    return document(title, "\n".join(body))


def document(title: str, body: str) -> str:
    """``body`` is HTML; everything that the page needs is in it."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def notes_list(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def comparison_table(comparison: Comparison, metrics: Sequence[Metric]) -> str:
    """Rows without any of the metrics are left out."""
    heads = "".join(f'<th scope="col">{escape(comparison.heading(metric))}</th>' for metric in metrics)
    rows = [row for row in comparison.rows if any(metric in row.values for metric in metrics)]
    firsts = [i == 0 or rows[i - 1].model != row.model for i, row in enumerate(rows)]
    lines = "\n".join(
        _table_row(comparison, row, metrics, first) for row, first in zip(rows, firsts, strict=True)
    )
    return (
        '<div class="scroll"><table class="sortable">\n'
        f'<thead><tr><th scope="col">model</th>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def _table_row(comparison: Comparison, row: Row, metrics: Sequence[Metric], first: bool) -> str:
    cells = [f'<th scope="row" data-v="{escape(row.label)}">{escape(row.label)}</th>']
    for metric in metrics:
        value = row.shown(metric)
        if value is None:
            cells.append("<td>-</td>")
            continue
        text = escape(cell(metric, row))
        under = escape(change(comparison, row, metric))
        small = f"<small>{under}</small>" if under else ""
        # Infinity is no number for the script's "-" nor for its sort.
        key = f' data-v="{value.number!r}"' if abs(value.number) < float("inf") else ""
        cells.append(f'<td{key} title="{escape(value.origin)}">{text}{small}</td>')
    return f"<tr{' class=published' if row.published else ''}>{''.join(cells)}</tr>"


def figures(drawn: Sequence[Panel]) -> str:
    return f'<div class="panels">{"".join(map(figure, drawn))}</div>' if drawn else ""


def figure(panel: Panel) -> str:
    """One panel; every bar has its label and number beside it, so that it reads at any width."""
    said = "; ".join(filter(None, (panel.setting, panel.better)))
    bars = "".join(_bar(bar, panel.most) for bar in panel.bars)
    return (
        f"<figure><figcaption><h3>{escape(panel.title)}</h3><small>{escape(said)}</small></figcaption>"
        f"{bars}</figure>"
    )


def _bar(bar: Bar, most: float) -> str:
    shapes = ""
    if bar.value is not None and most > 0:
        colour = COLOURS[bar.colour]
        look = ' class="hollow"' if bar.published else "" if bar.quantized else ' class="pale"'
        stroke = f' stroke="{colour}"' if bar.published else ""
        shapes = f'<rect{look} width="{_share(bar.value, most)}" height="10" fill="{colour}"{stroke}/>'
        if bar.low is not None and bar.high is not None:
            ends = f'x1="{_share(bar.low, most)}" x2="{_share(bar.high, most)}"'
            shapes += f'<line {ends} y1="5" y2="5"/>'
    return (
        f'<div class="bar"><span>{escape(bar.label)}</span><b>{escape(bar.text)}</b>'
        '<svg viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">'
        f"{shapes}</svg></div>"
    )


def _share(value: float, most: float) -> str:
    return f"{1000 * max(0.0, value) / most:.1f}"


def _settings(comparison: Comparison, metrics: Sequence[Metric]) -> str:
    lines = "<br>".join(map(escape, setting_lines(comparison, metrics)))
    return f'<p><small class="wrap">{lines}</small></p>' if lines else ""


def _files_table(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        for file, runs in groupby(row.runs, key=lambda run: run.file):
            run = next(runs)
            calibration = ", ".join(
                f"{name} {run.calibration[name]}"
                for name in ("source", "num", "seqlen", "seed")
                if name in run.calibration
            )
            cells = (file, run.source, str(run.facts.get("device", "")), calibration or "-")
            tail = "".join(f'<td class="left wrap">{escape(text)}</td>' for text in cells)
            lines.append(f'<tr><th scope="row">{escape(row.label)}</th>{tail}</tr>')
    heads = "".join(
        f'<th scope="col" class="left">{name}</th>'
        for name in ("model", "file", "float model", "device", "calibration")
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )
