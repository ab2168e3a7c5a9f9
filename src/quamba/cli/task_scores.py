"""lm-eval's tasks for the commands: which, on what, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quamba.cli.console import TqdmProgress, say, table
from quamba.errors import QuambaError, nearest

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.evaluation.answers import AnswerStore
    from quamba.evaluation.tasks import TaskResults, TaskSet

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Samples of a task, and windows of a text, with --testing.
TESTING_SAMPLES = 100

LOG_DIR_HELP = (
    "Write a JSON log of the run into DIR. Finished tasks are kept there until the log is written, and the"
    " same command goes on after them if it was cut off."
)


def task_names(listed: str) -> list[str]:
    """``a,b,c`` as names."""
    names = [name.strip() for name in listed.split(",")]
    if not all(names):
        raise QuambaError(f"--task_list is '{listed}', expected names with commas between them.")
    return names


class _BatchSize(click.ParamType):
    """A number of at least 1, or ``auto``, which is None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'.{nearest(str(value), ['auto'])}", param, ctx)
        if number < 1:
            self.fail(
                f"{number} is not in the range x>=1; 'auto' takes as many as memory allows.", param, ctx
            )
        return number


def batch_size_option() -> Callable[[_Function], _Function]:
    return click.option(
        "--batch_size",
        type=_BatchSize(),
        metavar="N|auto",
        default="auto",
        show_default=True,
        help="Windows or texts at once; auto: as memory allows.",
    )


def score_tasks(
    model: Model,
    tasks: TaskSet,
    progress: TqdmProgress,
    *,
    shots: Sequence[int | None],
    limit: int | None,
    batch_size: int | None,
    max_length: int | None,
    seed: int,
    store: AnswerStore | None = None,
) -> list[TaskResults]:
    """The tasks once for each number of examples in ``shots`` (None: as each task says)."""
    from quamba.evaluation.lm_eval_model import MAX_LENGTH, TaskModel
    from quamba.evaluation.tasks import run_tasks

    runs = []
    for number in shots:
        asked = TaskModel(
            model.network,
            model.require_tokenizer(),
            batch_size=batch_size,
            max_length=max_length or MAX_LENGTH,
            progress=progress if progress.enabled else None,
            seed=seed,
        )
        runs.append(run_tasks(asked, tasks, fewshot=number, limit=limit, store=store))
    progress.close()
    if store is not None and store.taken_over:
        listed = ", ".join(store.taken_over)
        say(f"Taken over from a run that was cut off: {listed} (from '{store.folder}').")
    return runs


def answer_store(model: Model, log_dir: str | None, max_length: int | None, seed: int) -> AnswerStore | None:
    """Where finished tasks are kept until the log is written; None without a log folder."""
    if log_dir is None:
        return None
    from quamba.evaluation.answers import FOLDER, AnswerStore, weights_digest

    network, tokenizer = model.network, model.require_tokenizer()
    identity = {
        "config": model.config.to_dict(),
        "recipe": None if model.recipe is None else model.recipe.to_dict(),
        "weights": weights_digest(network),
        "tokenizer": tokenizer.fingerprint() if tokenizer.files else "",
        "device": model.device.type,
        "dtype": str(network.lm_head.compute_dtype),
        "kernels": network.kernels.name,
        "max_length": max_length,
        "seed": seed,
    }
    return AnswerStore(Path(log_dir).expanduser() / FOLDER, identity)


def add_to_record(record: dict[str, Any], runs: Sequence[TaskResults]) -> None:
    """``lm_eval`` as published, {task: metrics}; a task's second run is there as ``TASK@SHOTS``."""
    from importlib.metadata import version

    for run in runs:
        for task, values in run.raw.items():
            key = f"{task}@{run.shots.get(task, 0)}" if task in record["lm_eval"] else task
            record["lm_eval"][key] = values
    record["tasks"] = [asdict(metric) for run in runs for metric in run.metrics]
    if runs:
        record["versions"]["lm_eval"] = version("lm_eval")
    record["timings"].update({f"tasks {i}": run.seconds for i, run in enumerate(runs, start=1)})


def print_task_scores(runs: Sequence[TaskResults]) -> None:
    rows = [
        (
            metric.task,
            "-" if metric.shots is None else metric.shots,
            "-" if metric.samples is None else metric.samples,
            metric.metric,
            f"{metric.value:.4f}",
            "-" if metric.stderr is None else f"{metric.stderr:.4f}",
        )
        for run in runs
        for metric in run.metrics
    ]
    click.echo(table(("task", "shots", "samples", "metric", "value", "stderr"), rows))
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        say(note)
