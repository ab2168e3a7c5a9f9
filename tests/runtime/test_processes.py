"""Several processes share the work; one that fails or hangs harms nobody."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from quamba.kernels.cases import all_cases
from quamba.kernels.registry import REFERENCE
from quamba.runtime import check_ahead
from quamba.runtime.check_model import checked_models
from quamba.runtime.processes import run_side_by_side


def write_number(number: int, jobs: int, folder: str) -> None:
    print("not to be seen")
    if number == 1:
        raise ValueError("one fails")
    Path(folder, f"{number} of {jobs}").touch()


def hang(number: int, jobs: int) -> None:
    time.sleep(60)


def test_each_process_has_a_number(tmp_path: Path, capfd: object) -> None:
    run_side_by_side(write_number, str(tmp_path), jobs=3, seconds=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 3", "2 of 3"]
    assert capfd.readouterr() == ("", "")  # type: ignore[attr-defined]


def test_time_is_bounded() -> None:
    start = time.monotonic()
    run_side_by_side(hang, jobs=1, seconds=0.2)
    assert time.monotonic() - start < 30


def test_shares_are_all_of_the_checks() -> None:
    cpu, jobs = torch.device("cpu"), 40
    models = len(checked_models())
    assert models == 8
    for number, with_model in ((0, 1), (models - 1, 1), (models, 0), (jobs - 1, 0)):
        cases = len(all_cases("cpu")[number::jobs])
        assert check_ahead.check_share(REFERENCE, cpu, number, jobs) == cases + with_model
