"""The page: well formed, self-contained, everything escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_records import log, profile, quantized, task, text
from test_merge import compared

from quamba.reporting.charts import panels
from quamba.reporting.page import comparison_page, document

Write = Callable[..., Path]
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks that tags close in order, and keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def page(write: Write) -> str:
    full = {"scored": {"e": text(33.0)}, "tasks": [task("t", "acc", 0.4)]}
    found = compared(
        write("f", log(**full, profile=profile(precision="float32", size=None))),
        write("q", quantized(**full, profile=profile())),
        write("i", quantized("models/<b>&bad", scored={"e": text("inf")})),
    )
    return comparison_page(found, 'A "title" <script>alert(1)</script>')


def test_it_is_well_formed_and_has_all_parts(page: str) -> None:
    reader = read(page)
    assert page.startswith("<!DOCTYPE html>")
    assert (reader.tags.count("h2"), reader.tags.count("table"), reader.tags.count("figure")) == (5, 5, 8)
    words = " ".join(reader.words)
    for part in ("demo w8a8", "33.000", "-69.1%", "0 shots, 100 samples; higher is better", "inf"):
        assert part in words
    assert "\n".join(reader.words).count("0.4000±0.0100") == 4


def test_texts_are_escaped(page: str) -> None:
    assert read(page).tags.count("script") == 1
    assert "<b>" not in re.sub(r"<b>[^<]*</b>", "", page)
    assert "&lt;b&gt;&amp;bad w8a8" in page


def test_it_needs_no_network_and_reads_without_script(page: str) -> None:
    reader = read(page)
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert not {name for name, _ in reader.attributes} & {"src", "href", "onclick", "style"}
    before = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "33.000" in before and "prefers-color-scheme: dark" in before


def test_bars_keep_their_proportions(write: Write) -> None:
    found = compared(
        write("f", log(scored={"e": text(40.0)})), write("q", quantized(scored={"e": text(10.0)}))
    )
    drawn = panels(found)
    assert [(p.title, p.most, [b.value for b in p.bars]) for p in drawn] == [
        ("e perplexity", 40.0, [40.0, 10.0]),
        ("weights, MiB", 28.75, [28.75, 8.886]),
    ]
    widths = re.findall(r'<rect[^>]* width="([0-9.]+)"', comparison_page(found, "t"))
    assert widths == ["1000.0", "250.0", "1000.0", "309.1"]


def test_infinity_has_no_bar_and_no_sort_key(page: str) -> None:
    assert re.search(r"<span>[^<]*bad w8a8</span><b>inf</b><svg[^>]*></svg>", page)
    assert 'data-v="inf"' not in page


def test_a_document_of_ones_own(page: str) -> None:
    assert read(document("a & b", "<p>c</p>")).words.count("a & b") == 1
