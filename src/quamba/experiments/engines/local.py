"""Runs in processes of this machine: one a GPU, or as many as asked for.

A process does runs of one float model, one after another, and ends with them. When it dies the run that it
was doing has failed, and another process goes on with the rest.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from quamba.experiments.run import Done, Job, execute
from quamba.experiments.state import RunsFolder

Started = Callable[[Job], None]
Ended = Callable[[Done], None]


@dataclass
class _Worker:
    process: BaseProcess
    link: Connection
    model: str
    slot: int
    job: Job | None = None
    since: float = field(default_factory=time.perf_counter)


@dataclass
class LocalEngine:
    """processes  at once; gpus: their numbers, which processes take in turn, none on a CPU"""

    processes: int
    gpus: Sequence[str] = ()

    def run(self, jobs: Sequence[Job], started: Started, ended: Ended) -> None:
        """Do all jobs; ``ended`` is told of each, failed ones too."""
        waiting = list(jobs)
        workers: list[_Worker] = []
        try:
            while waiting or workers:
                while waiting and len(workers) < self.processes:
                    workers.append(self._start(_next_model(waiting, workers), workers))
                    _give(workers[-1], waiting, started)
                for worker in _finished(workers):
                    if worker.job is not None:
                        ended(_outcome(worker, worker.job))
                        worker.job = None
                    if not (worker.process.is_alive() and _give(worker, waiting, started)):
                        _end(worker)
                        workers.remove(worker)
        finally:
            for worker in workers:
                worker.process.terminate()
                worker.process.join()

    def _start(self, model: str, workers: Sequence[_Worker]) -> _Worker:
        slot = min(set(range(self.processes)) - {worker.slot for worker in workers})
        environment = {}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.processes))
        context = get_context("spawn")  # a GPU cannot be used in a forked process
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, environment), daemon=False)
        process.start()
        there.close()
        return _Worker(process, here, model, slot)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next_model(waiting: Sequence[Job], workers: Sequence[_Worker]) -> str:
    """One that no process has, if there is one: its float model is then read once."""
    busy = {worker.model for worker in workers}
    return next((job.model for job in waiting if job.model not in busy), waiting[0].model)


def _give(worker: _Worker, waiting: list[Job], started: Started) -> bool:
    """Send the next run of the worker's model; False where none is left."""
    job = next((job for job in waiting if job.model == worker.model), None)
    if job is None:
        return False
    try:
        worker.link.send(job)
    except OSError:  # it died between two runs, for which no run is to blame
        return False
    waiting.remove(job)
    worker.job, worker.since = job, time.perf_counter()
    started(job)
    return True


def _finished(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait until a process has answered or died."""
    ready = set(wait([worker.link for worker in workers]))
    return [worker for worker in workers if worker.link in ready]


def _outcome(worker: _Worker, job: Job) -> Done:
    """The answer; of a process that died without one, how it did."""
    try:
        answer = worker.link.recv()
        assert isinstance(answer, Done)
        return answer
    except (EOFError, OSError):
        worker.process.join()
        sentence = f"Its process {_death(worker.process.exitcode)}; the log has its last words."
        RunsFolder.at(job.out).keep_failure(job.name, sentence, job.arguments)
        return Done(job.name, sentence, time.perf_counter() - worker.since)


def _death(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _end(worker: _Worker) -> None:
    worker.link.close()
    worker.process.join()


def _work(link: Connection, environment: dict[str, str]) -> None:
    """The loop of a process: runs come, outcomes go, and the end of the link is the end."""
    os.environ.update(environment)  # before anything imports torch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job: Any = link.recv()
        except EOFError:
            return
        link.send(execute(job))


def _end_with_parent() -> None:
    """A process whose sweep was killed must not go on beside the sweep that resumes it."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
