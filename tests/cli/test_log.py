"""One JSON file a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from quamba.cli.log import check_log_dir, write_log
from quamba.errors import QuambaError


def test_every_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    paths = [write_log(tmp_path / "logs", "mamba_fp16", {"run": i}) for i in range(3)]
    assert sorted((tmp_path / "logs").iterdir()) == sorted(paths)
    assert [json.loads(path.read_text()) for path in paths] == [{"run": i} for i in range(3)]
    assert all(path.name.startswith("mamba_fp16-") for path in paths)


def test_what_json_lacks_becomes_text(tmp_path: Path) -> None:
    path = write_log(tmp_path, "n", {"ppl": {"a": math.inf, "b": [math.nan, 1.5]}, "t": (1, 2)})

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(path.read_text(), parse_constant=no_constant)
    assert read == {"ppl": {"a": "inf", "b": ["nan", 1.5]}, "t": [1, 2]}


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_log(tmp_path, "n", {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_log_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    check_log_dir(None)
    check_log_dir(str(tmp_path / "new"))
    with pytest.raises(QuambaError, match="is a file"):
        check_log_dir(str(tmp_path / "f"))
