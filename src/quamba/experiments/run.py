"""One run of a sweep, in whatever process: the command line of ``main.py``, its output in a log."""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import out_of_memory
from quamba.errors import QuambaError
from quamba.experiments.spec import RunSpec
from quamba.experiments.state import RunsFolder

if TYPE_CHECKING:
    from quamba.api import Model

RUNNER = "quamba.experiments.run:measure"


@dataclass(frozen=True)
class Job:
    """What an engine sends to a process. Plain values only.

    out        the folder of the sweep
    place      the working folder, which paths of the command line are relative to
    share      keep results of stages in ``out``/work for other runs
    offline    take from the hub what is in its cache
    runner     "module:function" that does the work
    """

    name: str
    arguments: tuple[str, ...]
    model: str
    out: str
    place: str
    share: bool = True
    offline: bool = False
    runner: str = RUNNER


@dataclass(frozen=True)
class Done:
    """sentence  why the run failed; empty for one that did not"""

    name: str
    sentence: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.sentence


def execute(job: Job) -> Done:
    """Do one run and keep its result or its failure; raises nothing that a run can cause."""
    start = time.perf_counter()
    os.chdir(job.place)
    if job.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    folder = RunsFolder.at(job.out)
    sentence = ""
    with _output_to(folder.log_file(job.name)):
        print(f"$ python main.py {shlex.join(job.arguments)}", flush=True)
        try:
            module, _, function = job.runner.partition(":")
            record = getattr(import_module(module), function)(job)
            seconds = round(time.perf_counter() - start, 3)
            asked = {"name": job.name, "arguments": list(job.arguments), "seconds": seconds}
            folder.keep_result(job.name, {**record, "sweep": {**asked, **record.get("sweep", {})}})
        except Exception as error:
            sentence = _sentence(error)
            print(f"Error: {sentence}", file=sys.stderr, flush=True)
    if sentence:
        folder.keep_failure(job.name, sentence, job.arguments)
    return Done(job.name, sentence, time.perf_counter() - start)


def measure(job: Job) -> dict[str, Any]:
    """What ``main.py`` does, with the float model and stages that earlier runs have left."""
    from quamba.cli.published import perform

    run = RunSpec(job.name, job.arguments)
    work = None
    if job.share:
        from quamba.quantization.work import WorkFolder

        work = WorkFolder(RunsFolder.at(job.out).work)
    record = perform(run.context, load_float=_float_models.load, work=work)
    return {**record, "sweep": {"request": run.request}}


class _FloatModels:
    """The float model that was read last: runs of one model come one after another."""

    def __init__(self) -> None:
        self._key: tuple[str, str, str] | None = None
        self._model: Model | None = None

    def load(self, source: str, device: str, *, backend: str) -> Model:
        from quamba.api import load

        key = (source, device, backend)
        if self._model is None or self._key != key:
            self._model = None  # before the next one is read
            self._model = load(source, device, backend=backend)
            self._key = key
        return self._model


_float_models = _FloatModels()


def _sentence(error: Exception) -> str:
    """Bad input as it is said; of a defect its first line, with the traceback in the log."""
    if isinstance(error, QuambaError):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}': {error.strerror}."
    if out_of_memory(error):
        return "There is not enough memory for this run; a smaller --batch_size needs less."
    traceback.print_exc()
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """All output of this process, of libraries in C too, at the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    kept = (os.dup(1), os.dup(2))
    with path.open("a", encoding="utf-8", buffering=1) as log:
        try:
            for stream in streams:
                stream.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = log
            yield
        finally:
            log.flush()
            sys.stdout, sys.stderr = streams
            for descriptor, number in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
