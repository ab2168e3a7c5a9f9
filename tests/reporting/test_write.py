"""Files appear together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from quamba.errors import QuambaError
from quamba.reporting.write import check_file, check_folder, write_all


def test_all_files_are_written_and_no_drafts_stay(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    write_all({folder / "a": lambda p: p.write_text("1"), folder / "b": lambda p: p.write_text("2")})
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "1", "b": "2"}


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    old = tmp_path / "a"
    old.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        write_all({old: lambda p: p.write_text("new"), tmp_path / "new" / "deep" / "b": fail})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert old.read_text() == "old"


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(QuambaError, match=r"--out '.*file/x' cannot be made: '.*file' is a file"):
        check_folder("--out", file / "x")
    with pytest.raises(QuambaError, match=r"--csv '.*' is a folder, expected a file"):
        check_file("--csv", tmp_path)
    with pytest.raises(QuambaError, match=r"is in no folder that exists; make '.*none' first"):
        check_file("--csv", tmp_path / "none" / "x.csv")
    assert check_folder("--out", tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()
