"""Reports: verdicts, tables, plots."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stand_ins import record

from quamba.errors import QuambaError
from quamba.experiments.outcomes import Outcomes, judge, read_outcomes
from quamba.experiments.plan import make_plan, plan_record
from quamba.experiments.report import NAMES, csv_text, markdown, page, summary, write_report
from quamba.experiments.run import Job
from quamba.experiments.spec import Expected, read_sweep
from quamba.experiments.state import RunsFolder
from quamba.reporting.measures import Value

ACC = "lambada_local acc"


@pytest.mark.parametrize(
    ("number", "stderr", "expected", "partial", "judgement"),
    [
        (0.415, 0.007, Expected(ACC, 40.61, "s"), False, "reproduced"),  # 0.89 of 1.4
        (0.4202, 0.007, Expected(ACC, 40.61, "s"), False, "near"),  # 1.41 of 1.4
        (0.379, 0.007, Expected(ACC, 40.61, "s"), False, "near"),  # -2.71
        (0.435, 0.007, Expected(ACC, 40.61, "s"), False, "differs"),  # 2.89
        (0.4202, 0.007, Expected(ACC, 40.61, "s", 2.0), False, "reproduced"),
        (0.4061, 0.007, Expected(ACC, 40.61, "s"), True, "not comparable"),
        (0.4061, 0.007, Expected(ACC, 40.61, "s", None, True), True, "reproduced"),
        (0.4061, 0.007, Expected(ACC, 40.61, "s", None, True), False, "not comparable"),
        (0.4061, None, Expected(ACC, 40.61, "s"), False, "not comparable"),
        (0.4061, 0.007, Expected(ACC, 0.4061, "s"), False, "reproduced"),
        (31.2, None, Expected("x perplexity", 31.1, "s", 0.2), False, "reproduced"),
        (0.312, None, Expected("x perplexity", 31.2, "s", 0.2), False, "differs"),
    ],
)
def test_verdicts(
    number: float, stderr: float | None, expected: Expected, partial: bool, judgement: str
) -> None:
    assert judge(expected, Value(number, stderr), partial).judgement == judgement


def test_the_difference_is_in_points() -> None:
    verdict = judge(Expected(ACC, 40.61, "s"), Value(0.4161, 0.007), False)
    assert (verdict.measured, verdict.difference, verdict.tolerance) == pytest.approx((41.61, 1.0, 1.4))


SWEEP = """
name = "trial"
title = "A <trial>"
[defaults]
quantize = true
device = "cpu"
pretrained_dir = "p"
[[grid]]
set = { output_subdir = "s" }
[grid.vary]
model = ["mamba2-x"]
precision = ["w4a8", "w8a8"]
percentile_alpha = ["default", 1.0]
[[expected]]
metric = "lambada_local acc"
source = "paper & table"
values = { "s/default/quamba2-x-w4a8" = 50.5, "s/default/quamba2-x-w8a8" = 60 }
"""


@pytest.fixture
def outcomes(here: Path) -> Outcomes:
    """Three runs done with 50, 45 and 55 %, the fourth failed."""
    (here / "s.toml").write_text(SWEEP)
    folder = RunsFolder.at("out")
    plan = make_plan(read_sweep("s.toml"), folder)
    folder.keep_plan(plan_record(plan))
    for run, value in zip(plan.runs, (0.5, 0.45, 0.55), strict=False):
        job = Job(run.name, run.spec.arguments, run.spec.model, "out", ".")
        found = record(job, value)
        folder.keep_result(run.name, {**found, "size_mib": 10 + 100 * value})
    last = plan.runs[-1]
    folder.keep_failure(last.name, "There is no folder 'x'.", last.spec.arguments)
    return read_outcomes("out")


def test_tables(outcomes: Outcomes) -> None:
    assert summary(outcomes) == "4 runs: 3 done, 1 failed. 2 expected values: 1 reproduced, 1 differs."
    text = markdown(outcomes)
    assert (
        "| s/default/quamba2-x-w4a8 | 50.00±0.70 | 50.5 | reproduced (-0.50) | w4a8 | default | 60.0 | done |"
        in text
    )
    assert "| s/pa-1/quamba2-x-w8a8 | - | - | failed | w8a8 | 1 | - | failed |" in text
    assert (
        "- s/default/quamba2-x-w8a8: lambada_local acc: 55 against 60 (paper & table): differs, -5.00 with a "
        "tolerance of 1.4 (2 standard errors)" in text
    )
    assert "- lambada_local acc, mamba2-x, w4a8: default 50.00±0.70, 1 45.00±0.70" in text
    assert "- lambada_local acc, mamba2-x, percentile default: w4a8 50.00±0.70, w8a8 55.00±0.70" in text
    assert "- s/pa-1/quamba2-x-w8a8 failed: There is no folder 'x'." in text


def test_csv(outcomes: Outcomes) -> None:
    rows = csv.DictReader(io.StringIO(csv_text(outcomes)))
    lines = [row for row in rows if row["metric"] in (ACC, "")]
    assert [line["run"] for line in lines] == [run.name for run in outcomes.runs]
    assert [line["value"] for line in lines] == ["0.5", "0.45", "0.55", ""]
    assert (lines[0]["verdict"], float(lines[0]["difference"])) == ("reproduced", pytest.approx(-0.5))
    assert (lines[3]["state"], lines[3]["expected"]) == ("failed", "")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes.append(f"{tag}.{dict(attrs).get('class')}")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes.append(f"{tag}.{dict(attrs).get('class')}")


def test_the_page_is_whole(outcomes: Outcomes) -> None:
    text = page(outcomes)
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert "A &lt;trial&gt;" in text and "paper &amp; table" in text
    assert not re.search(r'(src|href)="|url\(|https?://', text)
    assert tags.classes.count("polygon.hollow") == 3 + 2 + 1 + 2  # keys, then the marks of each plot
    assert tags.classes.count("rect.reproduced") >= 1
    assert tags.classes.count("circle.differs") >= 1
    assert "td.reproduced" in tags.classes and "td.differs" in tags.classes


def test_marks_are_where_the_values_are(outcomes: Outcomes) -> None:
    svg = page(outcomes).split("against size</h3>")[1].split("</svg>")[0]
    heights = {
        float(name): float(y)
        for y, name in re.findall(
            r'<rect class="\w+" x="[\d.]+" y="([\d.]+)"[^>]*><title>[^:]*: ([\d.]+)', svg
        )
    }
    assert heights[50.0] < heights[45.0]  # higher up


def test_files_are_written_together(outcomes: Outcomes, here: Path) -> None:
    assert [file.name for file in write_report(outcomes, here / "r")] == list(NAMES)
    assert sorted(file.name for file in (here / "r").iterdir()) == sorted(NAMES)


def test_results_of_another_request_are_left_out(outcomes: Outcomes, here: Path) -> None:
    text = (here / "s.toml").read_text().replace("quantize = true", "quantize = true\nseed = 7")
    (here / "s.toml").write_text(text)
    folder = RunsFolder.at("out")
    folder.keep_plan(plan_record(make_plan(read_sweep("s.toml"), folder)))
    found = read_outcomes("out")
    assert [run.state for run in found.runs] == ["not done"] * 3 + ["failed"]
    assert found.notes[1].startswith("Not done, 3 of 4 runs: s/default/quamba2-x-w4a8, ")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "There is no folder 'r', expected the folder of a sweep."),
        (lambda path: path.mkdir(), "'r' holds no sweep (it has no sweep.json), expected the folder that"),
    ],
    ids=["missing", "empty"],
)
def test_no_sweep(here: Path, make: Callable[[Path], None], sentence: str) -> None:
    make(here / "r")
    with pytest.raises(QuambaError) as caught:
        read_outcomes("r")
    assert str(caught.value).startswith(sentence)
