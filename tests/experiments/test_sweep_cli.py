"""``quamba sweep`` and ``quamba report`` as typed, and the script of the published runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_spec import published_runs

from quamba.cli.report import command as report
from quamba.cli.sweep import command as sweep
from quamba.experiments.state import RunsFolder


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])  # type: ignore[arg-type]


def test_the_published_command_lines(repo_root: Path, here: Path) -> None:
    done = subprocess.run(
        ["bash", str(repo_root / "run_correct_experiments.sh"), "--dry_run"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"python main.py {line}" for _, line in published_runs()]
    assert "20 runs, 20 to run. Disk for models: " in done.stderr
    assert list(here.iterdir()) == []


TINY = """
name = "tiny"
[defaults]
model = "mamba2-tiny"
quantize = true
eval_ppl = true
ppl_dataset = "eval.txt"
max_windows = 2
calib_data = "calib.txt"
calib_data_num = 4
calib_seqlen = 32
device = "cpu"
pretrained_dir = "p"
group_heads = true
[[grid]]
set = { output_subdir = "s" }
vary = { precision = ["w4a8", "w8a8"] }
[[run]]
name = "hub"
set = { model = "owner/mamba2-none" }
"""


@pytest.mark.slow
def test_a_sweep_of_tiny_models_to_its_report(
    tiny_models_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tiny_models_here
    (here / "tiny.toml").write_text(TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = run(sweep, "tiny.toml", "--offline", "--out", "out")
    assert first.exit_code == 1, first.output
    assert first.stdout.startswith("2 done, 1 failed, 0 skipped in ")
    (failed,) = [line for line in first.stderr.splitlines() if line.startswith("Failed: ")]
    assert "hub: There is no folder 'owner/mamba2-none', and the hub model" in failed
    assert "Traceback" not in RunsFolder.at("out").log_file("hub").read_text()
    for precision in ("w4a8", "w8a8"):
        assert (here / f"p/s/default/quamba2-tiny-{precision}/config.json").is_file()
    assert list((here / "out/work").rglob("*.safetensors"))  # a run has failed, so what they share is kept
    again = run(sweep, "tiny.toml", "--out", "out")
    assert again.stdout.startswith("0 done, 1 failed, 2 skipped in ")
    full = run(
        sweep, "tiny.toml", "--out", "out", "--full", "--only", "s/default/quamba2-tiny-w8a8", "--dry_run"
    )
    assert full.exit_code == 0
    assert "its result is of max_windows 2, asked is None" in full.stderr
    assert "--max_windows" not in full.stdout
    told = run(report, "out", "--json")
    (here / "tiny.toml").write_text(TINY.split("[[run]]")[0])
    assert run(sweep, "tiny.toml", "--out", "out", "--keep_work").exit_code == 0
    assert (here / "out/work").is_dir()
    assert run(sweep, "tiny.toml", "--out", "out").exit_code == 0
    assert not (here / "out/work").exists()
    runs = {one["name"]: one for one in json.loads(told.stdout)["runs"]}
    assert [one["state"] for one in runs.values()] == ["done", "done", "failed"]
    (value,) = runs["s/default/quamba2-tiny-w8a8"]["values"][1:]
    stored = RunsFolder.at("out").result("s/default/quamba2-tiny-w8a8") or {}
    assert value["value"] == stored["ppl"]["eval.txt"]
    assert (here / "out/report/report.html").is_file()


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (sweep, ("none.toml",), "Error: There is no sweep file 'none.toml'."),
        (sweep, (".",), "Error: '.' is a folder, expected a .toml file of a sweep."),
        (sweep, ("t.toml", "--only", "b"), "Error: 't.toml' has no run 'b'."),
        (sweep, ("t.toml", "--engine", "rey"), "'rey' is not one of 'local', 'ray'. Did you mean 'ray'?"),
        (sweep, ("t.toml", "--ray_address", "h:1"), "Error: --ray_address has no effect on the local engine"),
        (sweep, ("t.toml", "--out", "t.toml"), "Error: --out 't.toml' is a file, expected a folder."),
        (sweep, ("t.toml", "--processes", "0"), "0 is not in the range x>=1"),
        (report, ("none",), "Error: There is no folder 'none', expected the folder of a sweep."),
        (report, (".",), "Error: '.' holds no sweep"),
    ],
)
def test_wrong_input_is_one_sentence(
    here: Path, command: object, arguments: tuple[str, ...], sentence: str
) -> None:
    (here / "t.toml").write_text('[[run]]\nname = "a"\nset = { model = "m", quantize = true }')
    result = run(command, *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in here.iterdir()] == ["t.toml"]
