"""lm-eval's tasks: find them by name, run them on a model, and what came out."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.calibration.reading import first_line, import_datasets, read_jsonl
from quamba.errors import QuambaError, nearest
from quamba.evaluation.answers import AnswerStore
from quamba.evaluation.lm_eval_model import TaskModel, import_lm_eval, lm_eval_model

OFFLINE_TASK = "lambada_local"
_TASK_FILES = Path(__file__).parent / "task_files"
_LAMBADA = Path("assets", "data", "lambada_openai_test.jsonl")
# lm-eval draws 100,000 times for an error of two digits, which takes minutes for a perplexity.
_BOOTSTRAP_DRAWS = 1000
_NO_NUMBERS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class TaskMetric:
    """One number of a task or of a group of tasks.

    shots    examples in each context, samples  texts asked; None for groups
    metric   lm-eval's name of it, with that of the answers' filter in brackets if there is one
    stderr   standard error of value, None if there is no estimate
    """

    task: str
    shots: int | None
    samples: int | None
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResults:
    """metrics in the order of the tasks; raw: lm-eval's own, {task: {"metric,filter": value}}."""

    metrics: list[TaskMetric]
    raw: dict[str, dict[str, Any]]
    shots: dict[str, int]
    samples: dict[str, int]
    limit: int | None
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their data.

    loaded     lm-eval's ``TaskDict``
    own_shots  examples in each context as the task says; None where it says nothing
    """

    loaded: dict[str, Any]
    own_shots: dict[str, int | None]


def load_tasks(names: Sequence[str], task_dir: str | Path | None = None, *, seed: int = 1234) -> TaskSet:
    """The tasks, groups and tags of these names, data sets included; ``mmlu_*`` is all of that pattern.

    task_dir  a folder with task files of the user's own, which come before lm-eval's of the same name
    seed      of tasks that shuffle their data
    Raises QuambaError for names that nobody knows, data that cannot be had and tasks that cannot be run.
    """
    if not names:
        raise QuambaError(f"The list of tasks is empty, expected names such as '{OFFLINE_TASK}'.")
    found, manager = _find(names, task_dir)
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in found:
        try:
            with _quiet(), _seeded(seed):
                loaded = manager.load(name)
        except QuambaError:
            raise
        except Exception as error:  # of the data sets library, its network client, or a task's own code
            raise _not_loaded(name, error) from error
        for key, part in merged.items():
            part.update(loaded.get(key, {}))
    for name, task in merged["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise QuambaError(f"The task '{name}' runs code that the model wrote, which is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise QuambaError(f"The task '{name}' shows pictures or sound, expected a task of text only.")
    own = {name: task.get_config("num_fewshot") for name, task in merged["tasks"].items()}
    return TaskSet(merged, own)


def run_tasks(
    model: TaskModel,
    tasks: TaskSet,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    store: AnswerStore | None = None,
) -> TaskResults:
    """Run tasks on a model, as often as one likes.

    fewshot  examples in each context; None: as each task says. A task that fixes 0 keeps it.
    limit    only the first so many samples of each task
    store    where the answers of each task are kept as it ends, and taken from
    """
    for name, value, least in (("fewshot", fewshot, 0), ("limit", limit, 1)):
        if value is not None and (isinstance(value, bool) or value < least):
            raise QuambaError(f"The tasks' {name} is {value!r}, expected an integer of at least {least}.")
    started = time.perf_counter()
    _set_shots(tasks, fewshot, model)
    with _quiet(bars=model.progress is not None), _seeded(model.seed):
        results = import_lm_eval().evaluator.evaluate(
            lm=lm_eval_model(model, store),
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=False,
        )
    return _read_results(results, limit, time.perf_counter() - started, model.notes)


def lambada_dataset(**_: Any) -> dict[str, Any]:
    """What ``lambada_local`` scores: {"test": rows of {"text"}}, of the file that the repository bundles."""
    datasets = import_datasets(f"The task '{OFFLINE_TASK}'")
    return {"test": datasets.Dataset.from_dict({"text": list(read_jsonl(lambada_file()))})}


def lambada_file() -> Path:
    """The bundled file, of the repository that this code is in or that is the working folder."""
    for root in (Path(__file__).parents[3], Path(".")):
        if (root / _LAMBADA).is_file():
            return root / _LAMBADA
    raise QuambaError(
        f"The task '{OFFLINE_TASK}' needs '{_LAMBADA.as_posix()}' of the Quamba repository, which is not "
        "installed with the package; run this from the repository, or take 'lambada_openai' from the network."
    )


def _find(names: Sequence[str], task_dir: str | Path | None) -> tuple[list[str], Any]:
    """Names that lm-eval knows, each once, and its ``TaskManager`` that knows them.

    Names that are all in our folder or the user's are found without reading lm-eval's thousands of files.
    """
    library = import_lm_eval()
    folders = [_TASK_FILES, *([] if task_dir is None else [_checked_folder(task_dir)])]
    include = [str(folder) for folder in folders]
    with _quiet():
        local = library.tasks.TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(local.all_subtasks):
            return list(dict.fromkeys(names)), local
        manager = library.tasks.TaskManager(include_path=include)
    known = set(manager.all_tasks)
    found: list[str] = []
    for name in names:
        matches = [name] if name in known else sorted(fnmatch.filter(known, name))
        if not matches:
            where = "lm-eval" if task_dir is None else f"lm-eval or '{task_dir}'"
            raise QuambaError(
                f"There is no task '{name}' in {where}, expected one such as '{OFFLINE_TASK}' or "
                f"'lambada_openai'.{nearest(name, known)}"
            )
        found += matches
    return list(dict.fromkeys(found)), manager


def _not_loaded(name: str, error: Exception) -> QuambaError:
    if isinstance(error, OSError):  # files, and all that goes wrong on the way to the hub
        hint = f"a task whose data is not in the cache needs the network, '{OFFLINE_TASK}' does not"
    else:
        hint = "expected a task that lm-eval can read"
    return QuambaError(f"The task '{name}' cannot be loaded ({first_line(error)}); {hint}.")


def _set_shots(tasks: TaskSet, fewshot: int | None, model: TaskModel) -> None:
    """The number of examples of each task, and the seed that draws them."""
    for name, task in tasks.loaded["tasks"].items():
        own = tasks.own_shots[name]
        if own == 0 and fewshot:
            model.notes.append(f"The task '{name}' is defined without examples: --fewshot is left out there.")
            fewshot_here = 0
        else:
            fewshot_here = fewshot if fewshot is not None else own or 0
        task.set_config(key="num_fewshot", value=fewshot_here)
        task.set_fewshot_seed(seed=model.seed)


def _read_results(results: Any, limit: int | None, seconds: float, notes: list[str]) -> TaskResults:
    found = {**results["results"], **results.get("groups", {})}
    raw = {task: {key: _plain(value) for key, value in values.items()} for task, values in found.items()}
    shots = {name: int(n) for name, n in results.get("n-shot", {}).items()}
    samples = {name: int(n["effective"]) for name, n in results.get("n-samples", {}).items()}
    metrics = []
    for task, values in raw.items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if key in _NO_NUMBERS or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            metrics.append(
                TaskMetric(
                    task,
                    shots.get(task),
                    samples.get(task),
                    name if filtered in ("", "none") else f"{name} ({filtered})",
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                )
            )
    return TaskResults(metrics, raw, shots, samples, limit, seconds, list(notes))


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, for JSON."""
    return value.item() if hasattr(value, "item") else value


def _checked_folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise QuambaError(f"The task folder '{folder}' {what}, expected a folder with task files (.yaml).")
    if not os.access(path, os.R_OK | os.X_OK):
        raise QuambaError(f"The task folder '{folder}' cannot be read, expected a folder that may be read.")
    if not any(path.rglob("*.yaml")):
        raise QuambaError(f"The task folder '{folder}' has no task file, expected at least one .yaml file.")
    return path


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """lm-eval and its tasks draw from the global generators; they are put back afterwards."""
    import numpy as np
    import torch

    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(torch_state)


@contextlib.contextmanager
def _quiet(bars: bool = True) -> Iterator[None]:
    """lm-eval prints to stdout, which belongs to results, warns of what it does by design, and forks workers.

    Forked workers of a process that has threads, as torch does, can hang. Its bars cannot be switched off:
    without ``bars`` all that it prints is dropped.
    """
    logger, variable = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    os.environ[variable] = "1"
    try:
        if bars:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        else:
            sink = io.StringIO()
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
    finally:
        logger.setLevel(level)
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
