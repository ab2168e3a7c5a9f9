"""The picture: what is refused without matplotlib, and that one is drawn with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import tiny_config, tiny_model

from quamba.errors import QuambaError
from quamba.profiling import machine, plot
from quamba.profiling.profile import ProfileReport, profile
from quamba.profiling.spec import Mode, ProfileSpec


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "copy_bytes", lambda device: 1 << 16)


def report(*modes: Mode) -> ProfileReport:
    network = tiny_model(tiny_config("mamba2"))
    return profile(network, ProfileSpec(modes=modes, prompt_len=4, gen_len=2, repeats=2))


def test_without_matplotlib_the_install_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(QuambaError, match=r"pip install 'quamba\[plot\]'"):
        plot.plot({"a": report("size")}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match=r"is '.pgn', expected one of .* Did you mean '.png'\?"):
        plot.plot({"a": report("size")}, tmp_path / "p.pgn")


@pytest.mark.parametrize("modes", [("size",), ("tpot",), ("size", "ttft", "tpot", "ttlt")], ids="-".join)
@pytest.mark.parametrize("models", [1, 2])
def test_a_picture_is_drawn(tmp_path: Path, modes: tuple[Mode, ...], models: int) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'quamba[plot]'")
    reports = {f"model {i}": report(*modes) for i in range(models)}
    plot.plot(reports, tmp_path / "p.png", "a title")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plot.plot(reports, tmp_path / "p.svg", "a title")
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<!-- model 0 -->") == len(modes)
    assert "<!-- model 1 -->" in text or models == 1
    assert "matplotlib.pyplot" not in sys.modules
