"""Runs as tasks of a Ray cluster: one that is running, or one on this machine for this sweep alone.

Ray schedules. A task says which CPUs and GPUs it needs; when its process or its machine dies, Ray runs it
again elsewhere, and it goes on with what it has stored. The machines of a cluster need this package, and see
the working folder under the same path.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import quamba
from quamba.errors import QuambaError, missing_extra
from quamba.experiments.engines.local import cores
from quamba.experiments.run import Done, Job, execute
from quamba.experiments.spec import RunSpec
from quamba.experiments.state import RunsFolder

#: How often a run is taken up again after its process has died.
RETRIES = 3
_PATIENCE_S = 5.0


@dataclass
class RayEngine:
    """
    processes  tasks at once, None: as many as the cluster has room for
    address    of a running cluster, None: start one here
    gpus       of this machine, for a cluster that is started here
    """

    asked: int | None = None
    address: str | None = None
    gpus: int = 0

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise missing_extra("ray", "ray", "The engine 'ray'")

    @property
    def processes(self) -> int:
        """At once, as far as is known before there is a cluster."""
        return self.asked or max(1, self.gpus)

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], ended: Callable[[Done], None]) -> None:
        import ray

        with redirect_stdout(sys.stderr), self._cluster(ray):  # Ray reports dead workers on stdout
            has_gpus = ray.cluster_resources().get("GPU", 0) > 0
            task = ray.remote(_task)
            waiting = list(jobs)
            running: dict[Any, Job] = {}
            while waiting or running:
                while waiting and len(running) < (self.asked or len(jobs)):
                    job = waiting.pop(0)
                    needs = {"num_cpus": self._cpus_each(), "num_gpus": int(has_gpus and uses_gpu(job))}
                    running[task.options(max_retries=RETRIES, name=job.name, **needs).remote(job)] = job
                    started(job)
                (handle, *_), _ = ray.wait(list(running), num_returns=1)
                ended(_outcome(ray, handle, running.pop(handle)))

    @contextmanager
    def _cluster(self, ray: Any) -> Iterator[None]:
        if self.address is not None:
            _check_answers(self.address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is not None:
                ray.init(address=self.address, **quiet)
            else:
                places = [str(Path(quamba.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
                paths = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
                count = max(cores(), self.processes)
                ray.init(
                    address="local",
                    num_cpus=count,
                    num_gpus=self.gpus,
                    include_dashboard=False,
                    runtime_env={"env_vars": paths},
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where, hint = "started here", "--engine local needs none"
            if self.address is not None:
                where, hint = f"reached at '{self.address}'", "set RAY_AUTH_MODE=token if it asks for one"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise QuambaError(f"No Ray cluster could be {where} ({reason}); {hint}.") from None
        try:
            yield
        finally:
            ray.shutdown()

    def _cpus_each(self) -> int:
        """Here the cores are shared out among the tasks; of a cluster a task takes one."""
        return max(1, cores() // self.processes) if self.address is None else 1


def _check_answers(address: str) -> None:
    """Ray waits for minutes, and in the end ends the process, where nothing answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise QuambaError(f"--ray_address is '{address}', expected HOST:PORT such as '192.168.0.2:6379'.")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise QuambaError(
            f"No Ray cluster answers at '{address}' ({reason}); start one with 'ray start --head', or leave "
            "--ray_address out for one on this machine."
        ) from None


def uses_gpu(job: Job) -> bool:
    return RunSpec(job.name, job.arguments).options["device"] != "cpu"


def _task(job: Job) -> tuple[Done, dict[str, Any] | None]:
    """In a process of the cluster; the record too, for a machine whose files are not seen here."""
    done = execute(job)
    return done, RunsFolder.at(job.out).result(job.name) if done.ok else None


def _outcome(ray: Any, handle: Any, job: Job) -> Done:
    folder = RunsFolder.at(job.out)
    try:
        done, record = ray.get(handle)
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        sentence = f"Ray gave it up after {RETRIES} more attempts ({type(error).__name__}: {reason})."
        if isinstance(error, ray.exceptions.RayTaskError):
            sentence = f"Its task failed ({type(error.cause).__name__}: {error.cause})."
        folder.keep_failure(job.name, sentence, job.arguments)
        return Done(job.name, sentence, 0.0)
    if record is not None and folder.result(job.name) is None:
        folder.keep_result(job.name, record)
    if not done.ok:
        folder.keep_failure(job.name, done.sentence, job.arguments)
    return Done(done.name, done.sentence, done.seconds)
