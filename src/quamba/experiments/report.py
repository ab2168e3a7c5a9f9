"""A sweep's outcomes as Markdown, CSV and a page."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from quamba.cli.log import jsonable
from quamba.experiments.outcomes import STANDARD_ERRORS, Outcome, Outcomes, Verdict
from quamba.experiments.plots import LEGEND, STYLE, effect_plot, judgement_class, shape, size_plot
from quamba.reporting.measures import Metric
from quamba.reporting.page import document, notes_list
from quamba.reporting.tables import number
from quamba.reporting.write import write_all

NAMES = ("report.md", "report.csv", "report.html")
PRECISIONS = ("w8a8", "w4a8", "w4a16")
#: Metrics that are drawn, those with expected values first; the CSV has all.
MOST_DRAWN = 3
RULE = (
    "A value is reproduced if it is within the tolerance of the expected one: that of the sweep's file, else "
    f"{STANDARD_ERRORS:g} standard errors of the measurement. Values of a part of a task are not compared "
    "with values of all of it."
)
_FACTS = ("precision", "percentile", "MiB in memory", "state")
Group = tuple[str, list[tuple[str, Outcome]]]


def write_report(outcomes: Outcomes, folder: Path) -> list[Path]:
    """The three files, all or none."""
    texts = (markdown(outcomes), csv_text(outcomes), page(outcomes))
    writers: dict[Path, Callable[[Path], object]] = {}
    for name, text in zip(NAMES, texts, strict=True):
        writers[folder / name] = lambda path, text=text: path.write_text(text, encoding="utf-8")  # type: ignore[misc]
    write_all(writers)
    return list(writers)


def summary(outcomes: Outcomes) -> str:
    """``20 runs: 18 done, 2 failed. 10 expected values: 8 reproduced, 2 differs.``"""
    states = Counter(run.state for run in outcomes.runs)
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    line = f"{len(outcomes.runs)} runs: {told}."
    judged = Counter(verdict.judgement for _, verdict in outcomes.verdicts)
    if judged:
        listed = ", ".join(f"{count} {judgement}" for judgement, count in judged.items())
        line += f" {sum(judged.values())} expected values: {listed}."
    return line


def verdict_line(verdict: Verdict) -> str:
    """``acc: 40.55 against 40.61 (Table 9): reproduced, -0.06 with a tolerance of 1.37 (…)``"""
    expected = verdict.expected
    measured = "nothing" if verdict.measured is None else f"{verdict.measured:.5g}"
    line = (
        f"{expected.metric}: {measured} against {expected.value:g} ({expected.source}): {verdict.judgement}"
    )
    if verdict.tolerance is None:
        return f"{line}, {verdict.reason}"
    return f"{line}, {verdict.difference:+.2f} with a tolerance of {verdict.tolerance:.3g} ({verdict.rule})"


def table_rows(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """The header and one line a run: values, what was expected, and what the run is."""
    metrics = _drawn(outcomes)
    judged = ["expected", "verdict"] if outcomes.verdicts else []
    header = ["run", *(metric.name for metric in metrics), *judged, *_FACTS]
    rows = []
    for run in outcomes.runs:
        values = [_value(run, metric) for metric in metrics]
        size = "-" if run.size_mib is None else f"{run.size_mib:,.1f}"
        verdict = _judged(run) if judged else ()
        rows.append([run.name, *values, *verdict, run.precision, run.alpha, size, run.state])
    return header, rows


def markdown(outcomes: Outcomes) -> str:
    header, rows = table_rows(outcomes)
    lines = [f"# {outcomes.title}", "", summary(outcomes), "", RULE, ""]
    lines += [_md_line(header), _md_line(["---"] * len(header)), *map(_md_line, rows)]
    told = [f"- {run.name}: {verdict_line(verdict)}" for run, verdict in outcomes.verdicts]
    if told:
        lines += ["", "## Expected values", "", *told]
    for title, groups in (
        ("Percentile", percentile_groups(outcomes)),
        ("Precision", precision_groups(outcomes)),
    ):
        effects = [line for metric in _drawn(outcomes) for line in _effect_lines(groups, metric)]
        if effects:
            lines += ["", f"## {title} effect", "", *effects]
    if outcomes.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in outcomes.notes)]
    return "\n".join(lines) + "\n"


def csv_text(outcomes: Outcomes) -> str:
    """One line for each run, metric and expected value."""
    out = io.StringIO()
    fields = (
        *("run", "state", "model", "precision", "percentile", "calibration_samples", "size_mib", "seconds"),
        *("metric", "setting", "value", "stderr"),
        *("expected", "source", "difference", "tolerance", "verdict"),
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(fields)
    for run in outcomes.runs:
        first = (run.name, run.state, run.model, run.precision, run.alpha, run.flags.calib_data_num)
        first += (_blank(run.size_mib), _blank(run.seconds))  # type: ignore[assignment]
        if not run.values:
            writer.writerow((*first, *[""] * (len(fields) - len(first))))
        for metric, value in run.values.items():
            measured = (metric.name, metric.said, value.number, _blank(value.stderr))
            verdicts: list[Verdict | None] = [v for v in run.verdicts if v.expected.metric == metric.name]
            for verdict in verdicts or [None]:
                writer.writerow((*first, *measured, *_compared(verdict)))
    return out.getvalue()


def page(outcomes: Outcomes) -> str:
    """Self-contained HTML."""
    body = [
        f"<style>{STYLE}</style>",
        f"<h1>{escape(outcomes.title)}</h1>",
        f"<p>{escape(summary(outcomes))}</p>",
        f'<p class="soft">{escape(RULE)}</p>',
        notes_list(outcomes.notes),
        _html_table(outcomes),
        _html_verdicts(outcomes),
    ]
    for metric in _drawn(outcomes):
        body += _metric_section(outcomes, metric)
    return document(outcomes.title, "\n".join(filter(None, body)))


def percentile_groups(outcomes: Outcomes) -> list[Group]:
    """Runs that differ in the percentile only, the default first."""
    groups: dict[str, list[tuple[str, Outcome]]] = {}
    for run in outcomes.runs:
        if run.flags.quantize:
            groups.setdefault(run.key("percentile_alpha"), []).append((run.alpha, run))
    found = [sorted(group, key=lambda item: item[0] != "default") for group in groups.values()]
    return [(_label(group[0][1]), group) for group in found if len(group) > 1]


def precision_groups(outcomes: Outcomes) -> list[Group]:
    """Runs that differ in the bits only."""
    groups: dict[str, list[tuple[str, Outcome]]] = {}
    for run in outcomes.runs:
        if run.flags.quantize:
            groups.setdefault(run.key("w_bits", "a_bits"), []).append((run.precision, run))
    return [
        (_label(group[0][1], f"percentile {group[0][1].alpha}"), group)
        for group in groups.values()
        if len(group) > 1
    ]


def _label(run: Outcome, last: str = "") -> str:
    """The model and what else tells it apart."""
    calibration = "" if run.flags.calib_data_num == 512 else f"{run.flags.calib_data_num} samples"
    return ", ".join(filter(None, (run.model, last or run.precision, calibration)))


def _drawn(outcomes: Outcomes) -> list[Metric]:
    """No perplexities of tasks: they are of the last word only, and of any size."""
    found = [m for m in outcomes.metrics if m.group == "accuracy" or "window_length" in dict(m.setting)]
    return found[:MOST_DRAWN]


def _judged(run: Outcome) -> tuple[str, str]:
    """The first expected value and the verdict on it."""
    verdict = run.verdicts[0] if run.verdicts else None
    expected = "-" if verdict is None else f"{verdict.expected.value:g}"
    if run.state != "done":
        return expected, run.state
    if verdict is None:
        return expected, "-"
    if verdict.tolerance is None:
        return expected, verdict.judgement
    return expected, f"{verdict.judgement} ({verdict.difference:+.2f})"


def _value(run: Outcome, metric: Metric) -> str:
    value = run.value(metric)
    if value is None:
        return "-"
    scale = 100.0 if metric.group == "accuracy" and abs(value.number) <= 1 else 1.0
    text = f"{scale * value.number:.2f}" if scale != 1 else number(metric, value.number)
    if value.stderr is None or not math.isfinite(value.stderr):
        return text
    return f"{text}±{scale * value.stderr:.2f}" if scale != 1 else f"{text}±{number(metric, value.stderr)}"


def _effect_lines(groups: Sequence[Group], metric: Metric) -> list[str]:
    lines = []
    for label, runs in groups:
        told = [f"{said} {_value(run, metric)}" for said, run in runs if run.value(metric) is not None]
        if len(told) > 1:
            lines.append(f"- {metric.name}, {label}: {', '.join(told)}")
    return lines


def _compared(verdict: Verdict | None) -> tuple[object, ...]:
    if verdict is None:
        return ("",) * 5
    expected = verdict.expected
    return (
        expected.value,
        expected.source,
        _blank(verdict.difference),
        _blank(verdict.tolerance),
        verdict.judgement,
    )


def _blank(value: object) -> object:
    return "" if value is None else value


def _md_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_table(outcomes: Outcomes) -> str:
    header, rows = table_rows(outcomes)
    heads = "".join(f'<th scope="col">{escape(_with_percent(name, outcomes))}</th>' for name in header)
    lines = []
    for run, (name, *cells) in zip(outcomes.runs, rows, strict=True):
        look = judgement_class(run.verdicts[0] if run.verdicts else None)
        tail = "".join(
            f"<td{_sort_key(cell)}{f' class={look}' if column == 'verdict' else ''}>{escape(cell)}</td>"
            for cell, column in zip(cells, header[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row" data-v="{escape(name)}">{escape(name)}</th>{tail}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _with_percent(name: str, outcomes: Outcomes) -> str:
    shares = {metric.name for metric in outcomes.metrics if metric.group == "accuracy"}
    return f"{name}, %" if name in shares else name


def _sort_key(cell: str) -> str:
    try:
        return f' data-v="{float(cell.split("±")[0].replace(",", ""))!r}"'
    except ValueError:
        return ""


def _html_verdicts(outcomes: Outcomes) -> str:
    if not outcomes.verdicts:
        return ""
    lines = "".join(
        f"<li>{escape(run.name)}: {escape(verdict_line(verdict))}</li>" for run, verdict in outcomes.verdicts
    )
    return f"<h2>Expected values</h2><ul>{lines}</ul>"


def _metric_section(outcomes: Outcomes, metric: Metric) -> list[str]:
    plots = [
        ("against size", size_plot(outcomes, metric), PRECISIONS),
        (
            "percentile effect, the number is the last less the default",
            effect_plot(percentile_groups(outcomes), metric, "percentile effect"),
            ("default", "1"),
        ),
        (
            "precision effect, the number is the last less the first",
            effect_plot(precision_groups(outcomes), metric, "precision effect"),
            PRECISIONS,
        ),
    ]
    figures = [
        f"<figure><figcaption><h3>{escape(metric.name)} {escape(title)}</h3>"
        f"<small>{escape(metric.said)}</small></figcaption>{svg}{_key(shapes, svg)}</figure>"
        for title, svg, shapes in plots
        if svg
    ]
    if not figures:
        return []
    return [f"<h2>{escape(metric.name)}</h2>", f'<div class="wide">{"".join(figures)}</div>']


def _key(shapes: Sequence[str], svg: str) -> str:
    """What shapes mean, and those colours that the plot has."""
    entries = [(shape(kind, 8, 8, "none"), kind if kind != "1" else "1.0") for kind in shapes]
    entries += [(shape("", 8, 8, look), said) for look, said in LEGEND if f'class="{look}"' in svg]
    if 'class="hollow"' in svg:
        entries.append((shape("expected", 8, 8, ""), "expected"))
    items = "".join(
        f'<li><svg class="plot" viewBox="-1 -1 18 18" aria-hidden="true">{mark}</svg>{escape(said)}</li>'
        for mark, said in entries
    )
    return f'<ul class="legend">{items}</ul>'


def report_dict(outcomes: Outcomes) -> dict[str, object]:
    """JSON-ready."""

    def judged(verdict: Verdict) -> dict[str, object]:
        compared = zip(
            ("expected", "source", "difference", "tolerance", "verdict"), _compared(verdict), strict=True
        )
        return {"metric": verdict.expected.metric, **{key: None if v == "" else v for key, v in compared}}

    runs = [
        {
            "name": run.name,
            "state": run.state,
            "sentence": run.sentence,
            "size_mib": run.size_mib,
            "seconds": run.seconds,
            "values": [
                {
                    "metric": m.name,
                    "setting": m.said,
                    "value": jsonable(v.number),
                    "stderr": jsonable(v.stderr),
                }
                for m, v in run.values.items()
            ],
            "expected": [judged(verdict) for verdict in run.verdicts],
        }
        for run in outcomes.runs
    ]
    return {"name": outcomes.name, "title": outcomes.title, "runs": runs, "notes": list(outcomes.notes)}
