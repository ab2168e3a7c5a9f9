"""lm-eval's tasks for the commands: which, on what, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import TqdmProgress, say, table
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.evaluation.tasks import TaskResults, TaskSet

#: Samples of a task, and windows of a text, with --testing.
TESTING_SAMPLES = 100


def task_names(listed: str) -> list[str]:
    """``a,b,c`` as names."""
    names = [name.strip() for name in listed.split(",")]
    if not all(names):
        raise QuambaError(f"--task_list is '{listed}', expected names with commas between them.")
    return names


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
            progress=progress,
            seed=seed,
        )
        runs.append(run_tasks(asked, tasks, fewshot=number, limit=limit))
    progress.close()
    return runs


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
