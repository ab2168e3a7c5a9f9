"""benchmarks/large.py with a narrow model: what its stages write, and that it goes on after a stop."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from quamba.checkpoints.float import read_float_config
from quamba.checkpoints.quantized import read_plan

SMALL = ["--layers", "2", "--d_model", "256", "--vocab", "500", "--device", "cpu"]
SMALL += ["--samples", "2", "--seqlen", "130", "--refinements", "0", "--max_memory", "1M"]


@pytest.fixture
def large(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = repo_root / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ is missing: it comes with the repository, not with the installed package")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("large")
    for name in ("large", "random_models"):
        del sys.modules[name]


def test_stages(large: ModuleType, tmp_path: Path) -> None:
    options = large._options([*SMALL, "--folder", str(tmp_path)])
    found = {
        stage: large._measured(large.STAGE_FUNCTIONS[stage], options)
        for stage in ("make", "quantize", "load", "generate")
    }
    assert read_float_config(tmp_path / "float") == large.model_config(2, 256, 500)
    plan = read_plan(tmp_path / "w4a8")
    assert plan.config.padded_vocab_size == 512
    assert plan.group_heads is not None
    assert (plan.embedding.bits, plan.head.bits) == (4, 4)
    assert all(record["peak_rss_gb"] > 0.1 and record["seconds"] >= 0 for record in found.values())
    assert found["quantize"]["worst_relative_loss"] < 0.1
    assert found["load"]["bytes"] <= found["quantize"]["bytes"]
    assert not (tmp_path / "work").exists()
    assert large.quantize(options) == {"quantized": "is there already"}


def test_a_drawn_model_is_of_the_same_plan(large: ModuleType, tmp_path: Path) -> None:
    options = large._options([*SMALL, "--folder", str(tmp_path)])
    assert large.draw(options) == {"made": True}
    assert large.load(options)["bytes"] > 0
    assert read_plan(tmp_path / "w4a8").recipe == large._recipe(options, large.model_config(2, 256, 500))


@pytest.mark.slow
def test_each_stage_is_a_process_within_the_time(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo_root / "benchmarks" / "large.py"), *SMALL, "--folder", str(tmp_path)]
    stopped = subprocess.run([*command, "--max_seconds", "0"], capture_output=True, text=True)
    assert stopped.returncode == 1
    assert "out of time" in json.loads(stopped.stdout)["stages"]["make"]["error"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["stages"]) == ["make", "quantize", "load", "generate"]
    assert json.loads((tmp_path / "large.json").read_text()) == json.loads(done.stdout)
