"""Write several files so that either all of them are there or none is new."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from quamba.errors import QuambaError


def check_folder(option: str, folder: str | Path) -> Path:
    """The folder, which is there or can be made; refused before any work otherwise."""
    path = Path(folder).expanduser()
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise QuambaError(f"{option} '{folder}' cannot be made: '{existing}' is a file, expected a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise QuambaError(f"{option} '{folder}' cannot be written: '{existing}' does not let you.")
    return path


def check_file(option: str, file: str | Path) -> Path:
    path = Path(file).expanduser()
    if path.is_dir():
        raise QuambaError(f"{option} '{file}' is a folder, expected a file to write.")
    if not path.parent.is_dir():
        raise QuambaError(f"{option} '{file}' is in no folder that exists; make '{path.parent}' first.")
    check_folder(option, path.parent)
    return path


def write_all(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Each writer gets a draft beside its file; all drafts take their names when the last one is written."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in writers}
    made: list[Path] = []
    try:
        for path, write in writers.items():
            made += _make(path.parent)
            write(drafts[path])
        for path, draft in drafts.items():
            draft.replace(path)
        made.clear()
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        for folder in reversed(made):
            folder.rmdir()


def _make(folder: Path) -> list[Path]:
    """The folders that were not there, outermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
