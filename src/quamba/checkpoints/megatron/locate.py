"""From what the user names to the file of every tensor-parallel rank."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quamba.errors import QuambaError

RANK_FILE = "model_optim_rng.pt"
_LATEST = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_\d+|release")
_RANK_FOLDER = re.compile(r"mp_rank_(\d\d)")
_STAGE_FOLDER = re.compile(r"mp_rank_\d\d_\d\d\d(_\d\d\d)?")


def rank_files(checkpoint: str | Path) -> tuple[Path, ...]:
    """The ``model_optim_rng.pt`` of every rank, in order.

    checkpoint  such a file, its ``mp_rank_00`` (then all ranks beside it), the folder of the ranks
                (``iter_0000500``, ``release``), or the folder above, whose
                ``latest_checkpointed_iteration.txt`` says which iteration
    Raises QuambaError for anything else, and for a rank that is missing between others.
    """
    path = Path(
        os.path.abspath(Path(checkpoint).expanduser())
    )  # symlinks stay: the hub cache is made of them
    if path.is_file():
        is_rank = path.name == RANK_FILE and _RANK_FOLDER.fullmatch(path.parent.name)
        return _ranks(path.parent.parent) if is_rank else (path,)
    if not path.is_dir():
        raise QuambaError(
            f"'{checkpoint}' was not found, expected a Megatron checkpoint: {RANK_FILE} or a folder with it."
        )
    if _RANK_FOLDER.fullmatch(path.name):
        return _ranks(path.parent)
    if (path / RANK_FILE).is_file():
        return (path / RANK_FILE,)
    return _ranks(path if _rank_folders(path) else _iteration(path))


def missing_rank(file: Path, ranks: int) -> QuambaError:
    return QuambaError(f"'{file}' is missing, expected the files of all {ranks} ranks.")


def _ranks(folder: Path) -> tuple[Path, ...]:
    found = _rank_folders(folder)
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise QuambaError(
            f"'{folder}' is in Megatron's distributed format, expected {RANK_FILE}; convert it with "
            "Megatron's --ckpt-convert-format torch."
        )
    staged = [name for name in found if _STAGE_FOLDER.fullmatch(name)]
    if staged:
        raise QuambaError(
            f"'{folder}' is split into pipeline stages ('{staged[0]}'), expected tensor-parallel ranks only "
            "(mp_rank_00, mp_rank_01, ...); save it with pipeline size 1."
        )
    numbers = [int(match[1]) for name in found if (match := _RANK_FOLDER.fullmatch(name))]
    if not numbers:
        raise QuambaError(f"'{folder}' has no folder mp_rank_00, expected those of a Megatron checkpoint.")
    files = tuple(folder / f"mp_rank_{number:02d}" / RANK_FILE for number in range(max(numbers) + 1))
    for file in files:
        if not file.is_file():
            raise missing_rank(file, len(files))
    return files


def _rank_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("mp_rank_*") if entry.is_dir())


def _iteration(folder: Path) -> Path:
    """The folder of the latest iteration, or of the only one; the folder itself if it holds none."""
    latest = folder / _LATEST
    if latest.is_file():
        word = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\d{1,9}|release", word):
            raise QuambaError(f"'{latest}' says {word[:40]!r}, expected a number or 'release'.")
        place = folder / (word if word == "release" else f"iter_{int(word):07d}")
        if not place.is_dir():
            raise QuambaError(f"'{latest}' says {word!r}, but there is no folder '{place}'.")
        return place
    found = [
        entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _ITERATION.fullmatch(entry.name)
    ]
    if len(found) > 1:
        raise QuambaError(
            f"'{folder}' has {len(found)} iterations ({', '.join(entry.name for entry in found[:3])}) and no "
            f"{_LATEST}; give the folder of one."
        )
    return found[0] if found else folder
