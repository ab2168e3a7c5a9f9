"""Where quantized models are kept, under which names, and when a kept one is the one asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quamba.cli.console import say
from quamba.errors import QuambaError, nearest

if TYPE_CHECKING:
    from quamba.calibration.data import CalibrationSpec
    from quamba.recipes.recipe import Recipe

#: The folder of published models under the root of all.
OWNER = "ut-enyac"
_CALIBRATION_DATA = Path("data") / "calibration.txt"


def model_name(model: str | Path) -> str:
    """The last part of a path or hub id, lower-cased."""
    return (Path(model).name or Path(model).resolve().name).lower()


def quamba_name(model: str | Path, label: str, hybrid_config: str | Path | None = None) -> str:
    """The published name: every ``mamba`` becomes ``quamba``, then ``-w4a8``, or ``-w4aX-CONFIG``.

    label          "w4a8" and the like; "w4aX" for hybrid blocks
    hybrid_config  the file with the precision of every block
    """
    suffix = "" if hybrid_config is None else f"-{Path(hybrid_config).stem}"
    return f"{model_name(model).replace('mamba', 'quamba')}-{label}{suffix}"


def stored_folder(root: str | Path, name: str, subdir: str | None, alpha: float | None) -> Path:
    """ROOT/ut-enyac/NAME; with a subdirectory S: ROOT/S/default/NAME, or ROOT/S/pa-ALPHA/NAME."""
    root = Path(root).expanduser()
    if subdir is None:
        return root / OWNER / name
    return root / subdir / ("default" if alpha is None else f"pa-{_shortest(alpha)}") / name


def find_model(model: str, root: str | None, subdir: str | None = None) -> str:
    """A folder as it is, a stored model by its name (``ut-enyac/`` may be left out), else MODEL, a hub id.

    Published models that are not stored (``ut-enyac/quamba2-2.7b-w4a8``) come from the hub.
    """
    if Path(model).expanduser().exists():
        return model
    if root is not None:
        base = Path(root).expanduser()
        places = [base / model, base / OWNER / model]
        if subdir is not None:
            places += [base / subdir / model, base / subdir / "default" / model]
        for folder in places:
            if (folder / "config.json").is_file():
                return str(folder)
    if model_name(model).startswith("quamba") and str(Path(model).parent) == ".":
        raise _not_stored(model, root)
    return model


def check_replaceable(folder: Path, force: bool) -> None:
    """Refuse, before any work, to write over what is there: anything without --force, no model with it."""
    if folder.exists() and not folder.is_dir():
        raise QuambaError(f"'{folder}' is a file, expected a folder to write.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise QuambaError(
            f"'{folder}' exists and is not empty, expected a new folder; --force replaces a model."
        )
    if not (folder / "config.json").is_file():
        raise QuambaError(
            f"'{folder}' holds no model (it has no config.json), so --force does not replace it."
        )


def check_same(folder: Path, recipe: Recipe, source: str, calibration: CalibrationSpec | None) -> None:
    """Refuse a stored model that is not what is asked for, saying what differs; take a published one."""
    from quamba.checkpoints.quantized import read_quantization_config
    from quamba.checkpoints.stored import stored_format

    format = stored_format(folder)
    if format == "zoo":
        say(f"'{folder}' is a published model: how it was calibrated is not known, and not compared.")
        return
    if format is None:
        raise QuambaError(f"'{folder}' exists and is no quantized model; choose another --pretrained_dir.")
    stored = read_quantization_config(folder)
    found = differences(stored, recipe, source, calibration)
    if found:
        raise QuambaError(
            f"'{folder}' was made with {', '.join(found)}; --force quantizes again and replaces it."
        )


def differences(
    stored: Mapping[str, Any], recipe: Recipe, source: str, calibration: CalibrationSpec | None
) -> list[str]:
    """What a ``quantization_config`` says otherwise than asked, each as ``num 512 instead of 64``.

    The calibration text is compared by its name, not by its content: that would mean reading it.
    """
    from quamba.recipes.recipe import Recipe

    # By way of a Recipe: a field that is newer than the stored model has its default there.
    kept = json.loads(json.dumps(Recipe.from_dict(stored["recipe"]).to_dict()))
    found = _differing(kept, json.loads(json.dumps(recipe.to_dict())), "recipe")
    if not _same_place(stored["source"], source):
        found.append(f"source '{stored['source']}' instead of '{source}'")
    return found + _calibration_differences(stored["calibration"], calibration)


def default_calibration(folder: Path) -> Path | None:
    """The text bundled with a bundled model: ``assets/data/calibration.txt`` for ``assets/models/NAME``."""
    for place in (folder, folder.resolve()):  # as it was given where possible: reports name the text
        if (place.parent.parent.name, place.parent.name) == ("assets", "models"):
            text = place.parent.parent / _CALIBRATION_DATA
            return text if text.is_file() else None
    return None


def _calibration_differences(stored: Mapping[str, Any], asked: CalibrationSpec | None) -> list[str]:
    from quamba.calibration.reading import resolve_source, source_name

    if asked is None or not stored:
        if asked is None and not stored:
            return []
        return ["calibration text instead of none" if stored else "no calibration text instead of some"]
    found = [
        f"calibration {key} {stored.get(key)} instead of {getattr(asked, key)}"
        for key in ("num", "seqlen", "seed")
        if stored.get(key) != getattr(asked, key)
    ]
    name = source_name(resolve_source(asked.data))
    if not _same_place(str(stored.get("source")), name):
        found.append(f"calibration text '{stored.get('source')}' instead of '{name}'")
    return found


def _differing(stored: Any, asked: Any, name: str) -> list[str]:
    """The leaves of two JSON values that differ, by dotted name."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = [*asked, *(key for key in stored if key not in asked)]
        return [line for key in keys for line in _differing(stored.get(key), asked.get(key), f"{name}.{key}")]
    return [] if stored == asked else [f"{name} {json.dumps(stored)} instead of {json.dumps(asked)}"]


def _same_place(a: str, b: str) -> bool:
    """Equal names, or two names of one file or folder."""
    if a == b:
        return True
    first, second = Path(a).expanduser(), Path(b).expanduser()
    return first.exists() and second.exists() and first.samefile(second)


def _shortest(alpha: float) -> str:
    """The shortest decimal: 1, 0.9995, 0.99999."""
    return repr(float(alpha)).removesuffix(".0")


def _not_stored(model: str, root: str | None) -> QuambaError:
    if root is None:
        return QuambaError(
            f"There is no folder '{model}'; give --pretrained_dir DIR to find a stored model by its name."
        )
    base = Path(root).expanduser()
    names = sorted(f.parent.name for f in base.glob("*/**/config.json")) if base.is_dir() else []
    listed = ", ".join(f"'{name}'" for name in names[:5]) or "none"
    return QuambaError(
        f"There is no model '{model}' under '{root}', which has {listed}.{nearest(Path(model).name, names)}"
    )
