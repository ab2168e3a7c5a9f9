"""What a search leaves behind: the configuration, the recipe, every candidate, pictures and a page."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from quamba.recipes.toml import recipe_toml
from quamba.reporting.page import document
from quamba.reporting.write import write_all
from quamba.search import plot
from quamba.search.costs import weight_limit
from quamba.search.problem import Limit
from quamba.search.score import Candidate, Labels
from quamba.search.search import Outcome

CONFIG, RECIPE, RESULT = "hybrid_blocks_config.json", "recipe.toml", "result.json"
CSV, PAGE = "candidates.csv", "report.html"
PICTURES = ("pareto.png", "sensitivity.png")


@dataclass(frozen=True)
class Row:
    """A candidate with what it costs: name of a limit -> cost; front: nothing cheaper is as good."""

    candidate: Candidate
    costs: Mapping[str, float]
    front: bool


def rows(outcome: Outcome) -> list[Row]:
    """From the best candidate to the worst. Bytes of weights are always among the costs, and where the budget
    counts blocks, how many are not of the recipe's own precision."""
    limits = _limits(outcome)
    axis = limits[0].name
    known = [c for c in outcome.candidates if set(c.labels) <= set(outcome.problem.labels)]
    costs = {c.labels: {limit.name: limit.of(_indices(outcome, c.labels)) for limit in limits} for c in known}
    front = pareto([(costs[c.labels][axis], c.score) for c in known])
    marked = [Row(c, costs[c.labels], i in front) for i, c in enumerate(known)]
    return sorted(marked, key=lambda row: (row.candidate.score, row.candidate.labels))


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """The points (cost, score) that no other one beats in one without being worse in the other."""
    front: set[int] = set()
    least = float("inf")
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < least:
            least = points[i][1]
            front.add(i)
    return front


def write_result(outcome: Outcome, folder: Path, *, pictures: bool) -> list[Path]:
    """Into the folder of the search, all or nothing; the paths. ``pictures`` need matplotlib."""
    table = rows(outcome)
    texts = {
        CONFIG: json.dumps(list(outcome.chosen), indent=1) + "\n",
        RECIPE: recipe_toml(outcome.recipe, _comment(outcome)),
        RESULT: json.dumps(_result(outcome, table), indent=1) + "\n",
        CSV: _csv(table),
    }
    writers: dict[Path, Callable[[Path], object]] = {
        folder / name: _text_writer(text) for name, text in texts.items()
    }
    drawn: dict[str, bytes] = {}
    if pictures:
        axis = _limits(outcome)[0]
        drawn = {
            PICTURES[0]: plot.pareto(outcome, table, axis),
            PICTURES[1]: plot.sensitivity(outcome),
        }
        writers |= {folder / name: _bytes_writer(data) for name, data in drawn.items()}
    writers[folder / PAGE] = _text_writer(_page(outcome, table, drawn))
    write_all(writers)
    return list(writers)


def _limits(outcome: Outcome) -> list[Limit]:
    """What the budget limits, first of all; then the bytes of the weights."""
    problem = outcome.problem
    limits = list(problem.limits)
    if problem.counts:
        row = (0.0, *[1.0] * (len(problem.labels) - 1))
        most = float(sum(problem.counts.values()))
        limits.append(Limit("blocks", "blocks", most, 0.0, (row,) * problem.n_blocks))
    if all(limit.name != "weights" for limit in limits):
        limits.append(weight_limit(outcome.bank, outcome.problem.labels, float("inf")))
    return limits


def _indices(outcome: Outcome, labels: Labels) -> tuple[int, ...]:
    return tuple(outcome.problem.labels.index(label) for label in labels)


def _comment(outcome: Outcome) -> str:
    return (
        f"Found by quamba search for '{outcome.source}' ({outcome.spec.method}, seed {outcome.spec.seed}):\n"
        f"{outcome.spec.objective.title} {outcome.score:.6g}."
    )


def _result(outcome: Outcome, table: Sequence[Row]) -> dict[str, object]:
    candidates = [
        {
            "labels": list(row.candidate.labels),
            "score": row.candidate.score,
            "costs": dict(row.costs),
            "pareto": row.front,
            "seconds": row.candidate.seconds,
        }
        for row in table
    ]
    return {**outcome.to_dict(), "candidates": candidates}


def _csv(table: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(table[0].costs)
    writer.writerow(["score", *names, "pareto", "seconds", "blocks"])
    for row in table:
        cells = [row.costs[name] for name in names]
        blocks = " ".join(row.candidate.labels)
        writer.writerow([row.candidate.score, *cells, int(row.front), f"{row.candidate.seconds:.3f}", blocks])
    return out.getvalue()


def _page(outcome: Outcome, table: Sequence[Row], drawn: Mapping[str, bytes]) -> str:
    title = f"Precisions for {outcome.source}"
    blocks = ", ".join(f"{i}: {label}" for i, label in enumerate(outcome.chosen))
    costs = "; ".join(f"{name} {value:,.6g}" for name, value in outcome.costs.items())
    said = (
        f"{outcome.spec.objective.title} {outcome.score:.6g} by {outcome.spec.method}, seed"
        f" {outcome.spec.seed}, {outcome.evaluations} candidates."
    )
    ends = "; ".join(f"all {label}: {score:.6g}" for label, score in outcome.uniform.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(said)} {escape(ends)}. {escape(costs)}</p>",
        f'<p class="soft">{escape(blocks)}</p>',
    ]
    for name, data in drawn.items():
        picture = base64.b64encode(data).decode()
        body.append(
            f'<p><img style="max-width:100%" alt="{escape(name)}" src="data:image/png;base64,{picture}"></p>'
        )
    body += ["<h2>Candidates</h2>", _html_table(outcome, table)]
    return document(title, "\n".join(body))


def _html_table(outcome: Outcome, table: Sequence[Row]) -> str:
    names = list(table[0].costs)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("blocks", "score", *names, "pareto"))
    lines = []
    for row in table:
        label = " ".join(row.candidate.labels)
        cells = [row.candidate.score, *(row.costs[name] for name in names), int(row.front)]
        numbers = "".join(f'<td data-v="{value!r}">{value:,.6g}</td>' for value in cells)
        chosen = ' class="first"' if row.candidate.labels == outcome.chosen else ""
        lines.append(
            f'<tr{chosen}><th scope="row" data-v="{escape(label)}">{escape(label)}</th>{numbers}</tr>'
        )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _text_writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _bytes_writer(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)
