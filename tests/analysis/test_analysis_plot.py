"""Pictures of every kind of analysis are drawn whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, random_ids, rounded, shipped

from quamba.analysis.analyze import Analysis, analyze
from quamba.analysis.plot import PICTURES, plot
from quamba.quantization.pipeline import quantize_model

pytest.importorskip("matplotlib")


def analysis(family: str, *, quantize: bool = True, **changes: object) -> Analysis:
    model = tiny_model(tiny_config(family, **changes))
    network = model
    if quantize:
        recipe = rounded(shipped("w4a8", model.config))
        network, _, _ = quantize_model(model, recipe, calibration_set(model.config))
    return analyze(network, model, random_ids(model.config, 2, 20))


CASES = {
    "mamba": lambda: analysis("mamba"),
    "one layer": lambda: analysis("mamba2", n_layer=1),
    "more layers than numbers fit": lambda: analysis("mamba", n_layer=33),
    "nothing but infinity": lambda: analysis("mamba2", quantize=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_all_pictures(case: str, tmp_path: Path) -> None:
    paths = plot(CASES[case](), tmp_path / "new" / "folder", "a title")
    assert [path.name for path in paths] == list(PICTURES)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(PICTURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fail(self: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot(analysis("mamba2"), tmp_path)
    assert list(tmp_path.iterdir()) == []
