"""Sweeps of stand-in runs on processes: what is done, skipped, failed, resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import MODULE, diary

from quamba.errors import QuambaError
from quamba.experiments.engines.local import LocalEngine
from quamba.experiments.plan import Plan, make_plan
from quamba.experiments.spec import read_sweep
from quamba.experiments.state import RunsFolder
from quamba.experiments.sweep import Summary, run_sweep

RUNNER = f"{MODULE}:measure"
Files = Callable[..., Path]


def plan_of(file: Path, out: Path) -> Plan:
    return make_plan(read_sweep(file), RunsFolder.at(out))


def sweep(file: Path, out: Path, processes: int = 1, retry_failed: bool = False) -> tuple[Summary, list[str]]:
    lines: list[str] = []
    engine = LocalEngine(processes)
    plan = plan_of(file, out)
    return run_sweep(plan, engine, lines.append, retry_failed=retry_failed, share=False, runner=RUNNER), lines


def test_a_sweep_and_again(sweep_file: Files, here: Path) -> None:
    file = sweep_file("a", "part/b")
    summary, lines = sweep(file, here / "out")
    assert (summary.done, summary.failed, summary.skipped) == (["a", "part/b"], {}, [])
    assert "[2/2] part/b: done, lambada_local acc 0.5000" in lines[-1]
    folder = RunsFolder.at(here / "out")
    assert (folder.result("part/b") or {})["sweep"]["name"] == "part/b"
    log = folder.log_file("part/b").read_text().splitlines()
    assert log == ["$ python main.py part/b --quantize --device cpu", "measuring part/b"]
    again, lines = sweep(file, here / "out")
    assert (again.done, again.skipped, lines) == ([], ["a", "part/b"], [])
    assert len(diary(here / "out")) == 2


def test_failing_runs_leave_the_others_alone(sweep_file: Files, here: Path) -> None:
    summary, _ = sweep(sweep_file("bad", "a", "defect", "dies", "b"), here / "out")
    assert sorted(summary.done) == ["a", "b"]
    assert summary.failed == {
        "bad": "There is no folder 'nowhere'.",
        "defect": "ValueError: a defect",
        "dies": "Its process was ended by SIGKILL, as the system does when memory runs out; the log has its "
        "last words.",
    }
    folder = RunsFolder.at(here / "out")
    assert "Traceback" in folder.log_file("defect").read_text()
    assert "Traceback" not in folder.log_file("bad").read_text()
    assert not list((here / "out").rglob(".*.json*"))


def test_failed_runs_are_run_again_when_asked(sweep_file: Files, here: Path) -> None:
    file = sweep_file("a", "once")
    first, _ = sweep(file, here / "out")
    assert (first.done, list(first.failed)) == (["a"], ["once"])
    left, _ = sweep(file, here / "out")
    assert (left.done, list(left.failed), left.skipped) == ([], ["once"], ["a"])
    assert plan_of(file, here / "out").runs[1].state == "failed"
    again, _ = sweep(file, here / "out", retry_failed=True)
    assert (again.done, again.failed) == (["once"], {})
    assert RunsFolder.at(here / "out").failure("once") is None


def test_other_flags_are_another_run(sweep_file: Files, here: Path) -> None:
    sweep(sweep_file("a"), here / "out")
    text = (here / "trial.toml").read_text()
    (here / "trial.toml").write_text(text.replace("quantize = true", "quantize = true\nseed = 7"))
    (run,) = plan_of(here / "trial.toml", here / "out").runs
    assert (run.state, run.reason) == ("to do", "its result is of seed 1234, asked is 7")


def test_a_damaged_result_is_done_again(sweep_file: Files, here: Path) -> None:
    file = sweep_file("a")
    sweep(file, here / "out")
    RunsFolder.at(here / "out").result_file("a").write_text("{")
    assert sweep(file, here / "out")[0].done == ["a"]


def test_runs_of_a_model_share_a_process(here: Path) -> None:
    models = "".join(
        f'[[run]]\nname = "{m}/{i}"\nset = {{ model = "{m}", seed = {i} }}\n' for i in range(3) for m in "xy"
    )
    (here / "t.toml").write_text(f"[defaults]\nquantize = true\n{models}")
    sweep(here / "t.toml", here / "out", processes=2)
    by_process: dict[int, set[str]] = {}
    for process, name in diary(here / "out"):
        by_process.setdefault(process, set()).add(name.split("/")[0])
    assert all(len(models) == 1 for models in by_process.values())
    assert len(by_process) in (2, 3)  # one that is done with its model may help the other


def test_a_second_sweep_is_kept_out(here: Path) -> None:
    folder = RunsFolder.at(here / "out")
    second = RunsFolder.at(here / "out").held()
    with folder.held(), pytest.raises(QuambaError, match="Another sweep is running in"), second:
        pass
    with folder.held():
        pass


# Imports under the guard: the processes of the sweep read the file too.
SCRIPT = """
if __name__ == "__main__":
    from quamba.experiments.engines.local import LocalEngine
    from quamba.experiments.plan import make_plan
    from quamba.experiments.spec import read_sweep
    from quamba.experiments.state import RunsFolder
    from quamba.experiments.sweep import run_sweep
    plan = make_plan(read_sweep("trial.toml"), RunsFolder.at("out"))
    run_sweep(plan, LocalEngine(2), print, share=False, runner="stand_ins:measure")
"""


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
def test_killed_in_the_middle_and_resumed(sweep_file: Files, here: Path, whole_group: bool) -> None:
    file = sweep_file("a", "slow", "b", "c")
    (here / "run.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, "run.py"], start_new_session=True)
    _wait_for(lambda: {"slow", "c"} <= {name for _, name in diary(here / "out")})
    _wait_for(lambda: RunsFolder.at(here / "out").result("c") is not None)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _wait_for(lambda: all(_gone(worker) for worker, _ in diary(here / "out")))
    folder = RunsFolder.at(here / "out")
    done = [name for name in ("a", "b", "c", "slow") if folder.result(name) is not None]
    assert done == ["a", "b", "c"]
    (here / "out" / "go").touch()
    summary, _ = sweep(file, here / "out", processes=2)
    assert (summary.done, sorted(summary.skipped)) == (["slow"], ["a", "b", "c"])
