"""``quamba sweep``: many runs of main.py from one file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quamba.cli.console import Command, NearestChoice, say, table
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.experiments.plan import Plan
    from quamba.experiments.sweep import Summary

EXIT_FAILED_RUNS = 1


@click.command(cls=Command)
@click.argument("file", metavar="FILE.toml")
@click.option(
    "--dry_run", is_flag=True, help="Print the plan, and the command lines of its runs; run nothing."
)
@click.option(
    "--engine",
    type=NearestChoice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: processes of this machine; ray (extra 'ray'): tasks of a cluster.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs at once. Default: one a GPU, else one; with ray, as many as the cluster has room for.",
)
@click.option("--ray_address", metavar="HOST:PORT", help="A running cluster. Default: one for this sweep.")
@click.option("--only", multiple=True, metavar="NAME", help="These runs, or all under NAME; may be repeated.")
@click.option("--retry_failed", is_flag=True, help="Runs that failed before, too.")
@click.option("--force", is_flag=True, help="Quantize again and replace stored models.")
@click.option("--full", is_flag=True, help="All samples and windows: without limit, max_windows and testing.")
@click.option("--offline", is_flag=True, help="Take from the hub what is in its cache, without asking it.")
@click.option("--keep_work", is_flag=True, help="Keep what runs share when all of them are done.")
@click.option("--no_sharing", is_flag=True, help="Keep no results of stages for other runs.")
@click.option("--out", metavar="DIR", help="Results and logs. Default: runs/NAME-OF-THE-SWEEP.")
def command(
    file: str,
    dry_run: bool,
    engine: str,
    processes: int | None,
    ray_address: str | None,
    only: tuple[str, ...],
    retry_failed: bool,
    force: bool,
    full: bool,
    offline: bool,
    keep_work: bool,
    no_sharing: bool,
    out: str | None,
) -> int:
    """Do the runs of FILE.toml, those that are not done yet.

    A run that fails does not stop the others; the exit status is 1 if any has failed. The same command goes
    on after a sweep that was ended in any way.
    """
    from quamba.experiments.plan import make_plan
    from quamba.experiments.spec import SUBSET, read_sweep
    from quamba.experiments.state import RunsFolder
    from quamba.experiments.sweep import choose_engine, run_sweep

    sweep = read_sweep(file)
    if ray_address is not None and engine != "ray":
        raise QuambaError("--ray_address has no effect on the local engine, expected --engine ray with it.")
    if full:
        sweep = sweep.with_flags(**dict.fromkeys(SUBSET))
    folder = RunsFolder.at(out or Path("runs") / sweep.name)
    if folder.path.exists() and not folder.path.is_dir():
        raise QuambaError(f"--out '{folder.path}' is a file, expected a folder.")
    plan = make_plan(sweep, folder, only)
    _show_plan(plan, retry_failed, not no_sharing)
    if dry_run:
        for run in plan.runs:
            click.echo(f"python main.py {shlex.join(run.spec.arguments)}")
        return 0
    chosen = choose_engine(engine, processes, ray_address)
    with folder.held():
        summary = run_sweep(
            plan, chosen, say, retry_failed=retry_failed, force=force, share=not no_sharing, offline=offline
        )
        if not (summary.failed or only or keep_work):
            folder.clear_work()
    _show_summary(plan, summary)
    return EXIT_FAILED_RUNS if summary.failed else 0


def _show_plan(plan: Plan, retry_failed: bool, share: bool) -> None:
    """On stderr: stdout is for command lines and results."""
    from quamba.experiments.sweep import said_bytes, said_seconds

    rows = [
        (
            run.name,
            run.state,
            said_bytes(run.size_bytes),
            said_bytes(run.memory_bytes),
            "-" if run.state == "done" else said_seconds(run.seconds),
        )
        for run in plan.runs
    ]
    say(table(("run", "state", "model", "memory", "time"), rows))
    for run in plan.runs:
        if run.reason:
            say(f"{run.name}: {run.reason}")
    say(_totals(plan, retry_failed, share))
    if not retry_failed and plan.of_state("failed"):
        say("Runs that failed before are left out; --retry_failed runs them again.")


def _totals(plan: Plan, retry_failed: bool, share: bool) -> str:
    """``20 runs (9 done), 11 to run. Disk for models: ...``"""
    from quamba.experiments.sweep import said_bytes, said_seconds

    due = plan.due(retry_failed)
    said = {"done": "done", "failed": "failed before", "stored": "with a stored model"}
    states = [run.state for run in plan.runs]
    counts = [f"{states.count(state)} {words}" for state, words in said.items() if state in states]
    done = f" ({', '.join(counts)})" if counts else ""
    line = f"{len(plan.runs)} runs{done}, {len(due)} to run."
    if not due:
        return line
    disk = said_bytes(plan.disk_bytes) + (", about as much for what they share" if share else "")
    memory = said_bytes(max((run.memory_bytes or 0 for run in due), default=0) or None)
    times = [run.seconds for run in due if run.seconds is not None]
    time = said_seconds(sum(times)) if len(times) == len(due) else "not known before a run is finished"
    return (
        f"{line} Disk for models: {disk}. Memory of the largest, without activations: {memory}. "
        f"Time, one after another: {time}."
    )


def _show_summary(plan: Plan, summary: Summary) -> None:
    from quamba.experiments.sweep import said_seconds

    for name, sentence in summary.failed.items():
        say(f"Failed: {name}: {sentence}")
    click.echo(
        f"{len(summary.done)} done, {len(summary.failed)} failed, {len(summary.skipped)} skipped in "
        f"{said_seconds(summary.seconds)}. Results: '{plan.folder.path}'; "
        f"report: quamba report {shlex.quote(str(plan.folder.path))}"
    )
