"""What a sweep's processes do in tests instead of quantizing: fast, and as bad as asked for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError
from quamba.experiments.run import Job
from quamba.experiments.spec import RunSpec

MODULE = "stand_ins"


def record(job: Job, value: float = 0.5) -> dict[str, Any]:
    """What ``main.py`` would log, with an accuracy."""
    run = RunSpec(job.name, job.arguments)
    task = {"task": "lambada_local", "shots": 0, "samples": 5153, "metric": "acc"}
    return {
        "args": run.options,
        "ppl": {},
        "lm_eval": {},
        "tasks": [{**task, "value": value, "stderr": 0.007}],
        "model": {"source": job.model, "device": "cpu", "config": {}},
        "recipe": {"name": run.flags.label},
        "calibration": {},
        "size_mib": 10.0,
        "versions": {},
        "timings": {},
        "sweep": {"request": run.request},
    }


def measure(job: Job) -> dict[str, Any]:
    """Notes who did what; ``*bad*`` fails, ``*defect*`` has one, ``*dies*`` takes its process along.

    ``*slow*`` waits until the file ``go`` is there, ``*once*`` dies the first time.
    """
    folder = Path(job.out)
    with (folder / "diary").open("a") as diary:
        diary.write(f"{os.getpid()} {job.name}\n")
    print(f"measuring {job.name}")
    if "bad" in job.name:
        raise QuambaError("There is no folder 'nowhere'.")
    if "defect" in job.name:
        raise ValueError("a defect\nof two lines")
    if "dies" in job.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "once" in job.name and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while "slow" in job.name and not (folder / "go").exists():
        time.sleep(0.02)
    return record(job)


def diary(folder: Path) -> list[tuple[int, str]]:
    """Process and run, in the order in which runs were begun."""
    path = folder / "diary"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]
