"""A plan carried out by an engine, with progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from quamba.experiments.engines.local import LocalEngine
from quamba.experiments.plan import Plan, PlannedRun, estimate_seconds, plan_record
from quamba.experiments.run import RUNNER, Done, Job
from quamba.experiments.spec import RunSpec


class Engine(Protocol):
    @property
    def processes(self) -> int:
        """Runs at once."""
        ...

    def run(
        self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Done], None]
    ) -> None: ...


@dataclass
class Summary:
    """Names by outcome; failed: with the sentence."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_sweep(
    plan: Plan,
    engine: Engine,
    tell: Callable[[str], None],
    *,
    retry_failed: bool = False,
    force: bool = False,
    share: bool = True,
    offline: bool = False,
    runner: str = RUNNER,
) -> Summary:
    """Do what is due. Failed runs that are left out count as failed, finished ones as skipped.

    tell   is given one line at a time
    force  quantize again what is stored
    """
    due = plan.due(retry_failed)
    summary = Summary(skipped=[run.name for run in plan.of_state("done")])
    if not retry_failed:
        summary.failed = {run.name: run.reason for run in plan.of_state("failed")}
    plan.folder.keep_plan(plan_record(plan))
    out, place = str(plan.folder.path.absolute()), os.getcwd()
    jobs = [
        Job(run.name, _arguments(run, force), run.spec.model, out, place, share, offline, runner)
        for run in due
    ]
    progress = _Progress(plan, due, engine.processes, tell)
    start = time.perf_counter()

    def ended(done: Done) -> None:
        if done.ok:
            summary.done.append(done.name)
        else:
            summary.failed[done.name] = done.sentence
        progress.ended(done)

    if jobs:
        engine.run(jobs, progress.started, ended)
    summary.seconds = time.perf_counter() - start
    return summary


def choose_engine(name: str, processes: int | None, address: str | None) -> Engine:
    """The engine of that name with what this machine has."""
    gpus = visible_gpus()
    if name == "ray":
        from quamba.experiments.engines.ray import RayEngine

        return RayEngine(processes, address, len(gpus))
    return LocalEngine(processes or max(1, len(gpus)), gpus)


def visible_gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[:count] if listed else [str(i) for i in range(count)]


def _arguments(run: PlannedRun, force: bool) -> tuple[str, ...]:
    return (*run.spec.arguments, "--force") if force and run.spec.flags.quantize else run.spec.arguments


class _Progress:
    """One line a run, with the time left as the finished ones took."""

    def __init__(
        self, plan: Plan, due: Sequence[PlannedRun], processes: int, tell: Callable[[str], None]
    ) -> None:
        self._plan, self._tell, self._processes = plan, tell, max(1, processes)
        self._left = {run.name: run.spec for run in due}
        self._total = len(due)
        self._timed: list[tuple[RunSpec, float]] = []

    def started(self, job: Job) -> None:
        self._tell(f"{job.name}: started, log '{_relative(self._plan.folder.log_file(job.name))}'")

    def ended(self, done: Done) -> None:
        spec = self._left.pop(done.name)
        if done.ok:
            self._timed.append((spec, done.seconds))
        said = f"done, {self._measured(done.name)}" if done.ok else f"FAILED: {done.sentence}"
        number = self._total - len(self._left)
        self._tell(
            f"[{number}/{self._total}] {done.name}: {said} ({said_seconds(done.seconds)}{self._time_left()})"
        )

    def _measured(self, name: str) -> str:
        record = self._plan.folder.result(name) or {}
        parts = [f"{text} {value:.4f}" for text, value in record.get("ppl", {}).items() if _finite(value)]
        parts += [
            f"{one['task']} {one['metric']} {one['value']:.4f}"
            for one in record.get("tasks", [])
            if one.get("metric", "").startswith("acc") and _finite(one.get("value"))
        ]
        return ", ".join(parts) or "nothing measured"

    def _time_left(self) -> str:
        times = [estimate_seconds(spec, self._timed) for spec in self._left.values()]
        known = [seconds for seconds in times if seconds is not None]
        if not known:
            return ""
        return f"; about {said_seconds(sum(known) / min(self._processes, len(known)))} left"


def said_bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def said_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _finite(value: object) -> bool:
    return isinstance(value, int | float)


def _relative(path: Path) -> str:
    return os.path.relpath(path)
