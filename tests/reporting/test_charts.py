"""The picture: what is drawn, and that matplotlib is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_records import log, profile, quantized, task, text
from test_merge import compared

from quamba.errors import QuambaError
from quamba.reporting import charts

Write = Callable[..., Path]


def test_error_bars_are_standard_errors_and_percentiles(write: Write) -> None:
    found = compared(write("q", quantized(tasks=[task("t", "acc", 0.005)], profile=profile())))
    ends = {p.title: (p.bars[0].low, p.bars[0].high) for p in charts.panels(found)}
    assert ends["t acc"] == (0.0, 0.015)
    assert ends["TPOT, ms"] == (7.2, 9.6)
    assert ends["weights, MiB"] == (None, None)


def test_what_models_share_is_drawn_first_and_the_rest_counted(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "MOST_PANELS", 2)
    tasks = [task(f"t{i}", "acc", 0.5) for i in range(4)]
    found = compared(write("f", log(tasks=tasks)), write("q", quantized(tasks=tasks[2:])))
    assert [p.title for p in charts.panels(found)] == ["t2 acc", "t3 acc", "weights, MiB"]
    assert charts.undrawn(found) == 2


def test_rows_of_one_model_have_one_colour(write: Write) -> None:
    found = compared(write("a", log()), write("b", quantized()), write("c", log("models/other")))
    (panel,) = charts.panels(found)
    assert [(bar.colour, bar.quantized) for bar in panel.bars] == [(0, False), (0, True), (1, False)]


@pytest.mark.parametrize("count", [1, 20])
def test_a_picture_is_drawn(write: Write, tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'quamba[plot]'")
    paths = [
        write(f"r{i}", quantized(f"models/$m{i}^^x$", scored={"e": text("inf" if i == 1 else 30.0 + i)}))
        for i in range(count)
    ]
    drawn = charts.panels(compared(*paths))
    charts.draw(drawn, tmp_path / "p.png", "a $title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with pytest.raises(QuambaError, match=r"pip install 'quamba\[plot\]'"):
        charts.require_pictures()
