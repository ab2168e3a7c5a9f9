"""Names, places, and when a stored model is the one asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quamba.calibration.data import CalibrationSpec
from quamba.cli.store import (
    check_replaceable,
    default_calibration,
    differences,
    find_model,
    quamba_name,
    stored_folder,
)
from quamba.errors import QuambaError
from quamba.recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("model", "label", "hybrid", "name"),
    [
        ("state-spaces/mamba-130m", "w8a8", None, "quamba-130m-w8a8"),
        ("state-spaces/mamba2-2.7b", "w4a8", None, "quamba2-2.7b-w4a8"),
        ("./pretrained_models/mamba2-8b-converted/", "w4a16", None, "quamba2-8b-converted-w4a16"),
        ("havenhq/mamba-chat", "w4a8", None, "quamba-chat-w4a8"),
        ("someone/Mamba-on-MAMBA", "w4a8", None, "quamba-on-quamba-w4a8"),
        ("mamba2-8b-converted", "w4aX", None, "quamba2-8b-converted-w4aX"),
        (
            "mamba2-8b-converted",
            "w4aX",
            "configs/hybrid_blocks_config.json",
            "quamba2-8b-converted-w4aX-hybrid_blocks_config",
        ),
    ],
)
def test_the_published_names(model: str, label: str, hybrid: str | None, name: str) -> None:
    assert quamba_name(model, label, hybrid) == name


def test_the_name_of_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mamba-x").mkdir()
    monkeypatch.chdir(tmp_path / "mamba-x")
    assert quamba_name(".", "w8a8") == "quamba-x-w8a8"


@pytest.mark.parametrize(
    ("subdir", "alpha", "folder"),
    [
        (None, None, "p/ut-enyac/n"),
        (None, 0.99, "p/ut-enyac/n"),
        ("S", None, "p/S/default/n"),
        ("S", 1.0, "p/S/pa-1/n"),
        ("S", 0.9995, "p/S/pa-0.9995/n"),
        ("S", 0.99999, "p/S/pa-0.99999/n"),
    ],
)
def test_where_a_model_is_stored(subdir: str | None, alpha: float | None, folder: str) -> None:
    assert stored_folder("p", "n", subdir, alpha).as_posix() == folder


def _model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_stored_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = _model_at(tmp_path / "p" / "ut-enyac" / "quamba-x-w8a8")
    other = _model_at(tmp_path / "p" / "S" / "default" / "quamba-y-w8a8")
    root = str(tmp_path / "p")
    assert find_model("ut-enyac/quamba-x-w8a8", root) == str(plain)
    assert find_model("quamba-x-w8a8", root) == str(plain)
    assert find_model("S/default/quamba-y-w8a8", root) == str(other)
    assert find_model("quamba-y-w8a8", root, "S") == str(other)
    assert find_model("p/ut-enyac/quamba-x-w8a8", None) == "p/ut-enyac/quamba-x-w8a8"
    assert find_model("state-spaces/mamba-130m", root) == "state-spaces/mamba-130m"
    with pytest.raises(QuambaError, match=r"'quamba-x-w8a8'.* Did you mean 'quamba-x-w8a8'"):
        find_model("quamba-x-w8a9", root)
    with pytest.raises(QuambaError, match="give --pretrained_dir DIR"):
        find_model("quamba-x-w8a8", None)
    # Published ones that are not stored are on the hub.
    assert find_model("ut-enyac/quamba-z-w8a8", None) == "ut-enyac/quamba-z-w8a8"
    assert find_model("ut-enyac/quamba-z-w8a8", root) == "ut-enyac/quamba-z-w8a8"


def _stored(**calibration: Any) -> dict[str, Any]:
    settings = {"source": "c.txt", "num": 8, "seqlen": 16, "seed": 1, **calibration}
    recipe = json.loads(json.dumps(load_recipe("w4a8").to_dict()))
    return {"recipe": recipe, "source": "mamba2-tiny", "calibration": settings}


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CalibrationSpec:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("text")
    return CalibrationSpec(data="c.txt", num=8, seqlen=16, seed=1, batch_size=3)


def test_the_same_request_differs_in_nothing(spec: CalibrationSpec, tmp_path: Path) -> None:
    recipe = load_recipe("w4a8")
    assert differences(_stored(), recipe, "mamba2-tiny", spec) == []
    # Another way to write the same path is the same place.
    assert differences(_stored(source=str(tmp_path / "c.txt")), recipe, "mamba2-tiny", spec) == []


@pytest.mark.parametrize(("key", "value"), [("num", 9), ("seqlen", 17), ("seed", 2), ("source", "d.txt")])
def test_other_calibration_is_named(spec: CalibrationSpec, key: str, value: object) -> None:
    (line,) = differences(_stored(**{key: value}), load_recipe("w4a8"), "mamba2-tiny", spec)
    assert line.startswith("calibration")
    assert str(value) in line


def test_another_recipe_and_source_are_named(spec: CalibrationSpec) -> None:
    changed = load_recipe("w4a8").replace(percentile_alpha=0.9, group_heads=None)
    lines = differences(_stored(), changed, "mamba2-other", spec)
    assert lines == [
        "recipe.percentile_alpha null instead of 0.9",
        'recipe.group_heads {"heads": 4, "channels": 4} instead of null',
        "source 'mamba2-tiny' instead of 'mamba2-other'",
    ]


def test_calibration_against_none(spec: CalibrationSpec) -> None:
    recipe = load_recipe("w4a8")
    assert len(differences(_stored(), recipe, "mamba2-tiny", None)) == 1
    assert len(differences({**_stored(), "calibration": {}}, recipe, "mamba2-tiny", spec)) == 1
    assert differences({**_stored(), "calibration": {}}, recipe, "mamba2-tiny", None) == []


def test_force_replaces_models_only(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", force=False)
    model = _model_at(tmp_path / "model")
    check_replaceable(model, force=True)
    with pytest.raises(QuambaError, match="--force replaces a model"):
        check_replaceable(model, force=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(QuambaError, match="holds no model"):
        check_replaceable(tmp_path / "home", force=True)
    with pytest.raises(QuambaError, match="is a file"):
        check_replaceable(tmp_path / "home" / "letter.txt", force=True)


def test_bundled_models_have_bundled_calibration_text(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(assets.parent)
    text = default_calibration(Path("assets/models/mamba2-demo"))
    assert text == Path("assets/data/calibration.txt")
    assert default_calibration(tmp_path) is None
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "calibration.txt").write_text("not under a folder named assets")
    assert default_calibration(tmp_path / "models" / "m") is None
