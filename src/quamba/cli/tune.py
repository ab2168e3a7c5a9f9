"""``quamba tune``: the fastest launches of kernels for one model on this GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, say
from quamba.errors import QuambaError, nearest

if TYPE_CHECKING:
    import torch

    from quamba.recipes.plan import Plan
    from quamba.tuning.session import Session
    from quamba.tuning.tune import Found

EXIT_LOST = 1
_MODEL, _RECIPE = "mamba2-2.7b", "w4a8"
_ROWS = "1,2,4,16,64,512,2048"
#: The share of the time that compiling may take before anything is measured.
_COMPILING = 0.5


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--recipe", metavar="NAME|FILE", help="What a float MODEL is quantized by. Default: nothing.")
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option(
    "--ops",
    metavar="A,B,C",
    help="What to tune: linear.words, linear.tiles, linear.wide, decode.project, decode.mix,"
    " decode.ssd_gate, decode.scan_gate, ssd_step.launch, or linear, decode, ssd_step. Default: all.",
)
@click.option(
    "--rows",
    metavar="M,N",
    default=_ROWS,
    show_default=True,
    help="Rows of activations: up to 64 are sequences that are decoded, more are the tokens of a prompt.",
)
@click.option("--device", default="cuda", show_default=True, metavar="cuda|cuda:N", help="Which GPU.")
@click.option("--out", metavar="FILE.json", help="The table to fill. Default: the user's table of this GPU.")
@click.option(
    "--max_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="End after so long. What is measured by then is kept, and the next run goes on from there.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=min(8, os.cpu_count() or 1),
    show_default="CPU cores, at most 8",
    help="Processes that compile.",
)
@click.option("--again", is_flag=True, help="Measure what the table has already, too.")
def command(model: str | None, **options: Any) -> int:
    """Find the fastest launches of kernels on this GPU for MODEL, and keep them for all models of its sizes.

    MODEL is a folder, a hub id or a published size: mamba2-130m, mamba2-2.7b (the default, with --recipe
    w4a8), mamba2-8b, mamba-130m, mamba-2.8b. Only sizes and formats are read; weights are random. No launch
    is taken whose results differ from the reference. The table is found again by the GPU's name in
    ~/.config/quamba/tables, or where the variable QUAMBA_TABLES says: a folder, or one file.
    """
    rows = _numbers(options["rows"])
    device = _gpu(options["device"])
    from quamba.kernels.triton.launch_tables import user_table
    from quamba.kernels.triton.launches import gpu
    from quamba.models.lm import on_device
    from quamba.tuning.session import Session
    from quamba.tuning.tune import check_ops

    ops = check_ops([] if options["ops"] is None else [op.strip() for op in options["ops"].split(",")])
    plan = _plan(model, options["recipe"], options["pretrained_dir"])
    found = gpu(device.index)
    assert found is not None
    path = user_table(found) if options["out"] is None else Path(options["out"]).expanduser()
    session = Session(path, found, again=options["again"])
    with on_device(device):
        return _tune(plan, rows, ops, device, session, options["jobs"], options["max_seconds"])


def _numbers(listed: str) -> list[int]:
    """``1,16`` as numbers, each once."""
    numbers = []
    for text in listed.split(","):
        if not text.strip().isdecimal() or int(text) == 0:
            raise QuambaError(f"--rows is '{listed}', expected whole numbers from 1 on, such as 1,16,512.")
        numbers.append(int(text))
    return list(dict.fromkeys(numbers))


def _gpu(name: str) -> torch.device:
    import torch

    from quamba.api import choose_device
    from quamba.kernels.registry import choose_kernels

    if not torch.cuda.is_available():
        raise QuambaError("Launches are measured on an NVIDIA GPU, and torch sees none here.")
    device = choose_device(name)
    choose_kernels(device, "triton")  # says why not, where it cannot
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _plan(model: str | None, recipe: str | None, pretrained_dir: str | None) -> Plan:
    from quamba.cli.planned import read_plan
    from quamba.recipes.plan import resolve
    from quamba.recipes.recipe import Precision, Recipe, load_recipe
    from quamba.tuning.networks import PUBLISHED

    if model is None:
        return resolve(load_recipe(recipe or _RECIPE), PUBLISHED[_MODEL])
    if model in PUBLISHED and not Path(model).exists():
        asked = Recipe(name="float", blocks=Precision()) if recipe is None else load_recipe(recipe)
        return resolve(asked, PUBLISHED[model])
    try:
        return read_plan(model, recipe, pretrained_dir).plan
    except QuambaError as error:
        raise QuambaError(f"{error}{nearest(model, PUBLISHED)}") from None


def _tune(
    plan: Plan,
    rows: list[int],
    ops: list[str],
    device: torch.device,
    session: Session,
    jobs: int,
    max_seconds: float,
) -> int:
    from quamba.tuning.compilers import compile_ahead
    from quamba.tuning.networks import one_block_plans, random_network
    from quamba.tuning.tune import GraphTimer, LostError, search

    started, measured, lost = time.monotonic(), 0, ""
    plans = one_block_plans(plan)
    if jobs > 1:
        say(f"Compiling candidates in {jobs} processes ...")
        seconds = _COMPILING * max_seconds
        compile_ahead(plans, rows, ops, session.known, device=device, jobs=jobs, seconds=seconds)

    def is_over() -> bool:
        return time.monotonic() - started > max_seconds

    networks = [random_network(p, device) for p in plans]
    found = search(networks, rows, ops, timer=GraphTimer(device), is_known=session.knows, is_over=is_over)
    try:
        for result in found:
            session.keep(result)
            _print(result, first=measured == 0)
            measured += 1
    except LostError as error:
        lost = f"{error} "
    if lost or is_over():
        say(f"{lost or f'--max_seconds {max_seconds:g} are over. '}The same command goes on from here.")
    known = f", {len(session.known)} were there before" if session.known else ""
    say(f"{measured} measured{known}: '{session.path}'." if measured else f"Nothing was measured{known}.")
    return EXIT_LOST if lost else 0


def _print(found: Found, first: bool) -> None:
    """A line on stdout; on stderr, what was wrong with candidates."""
    from quamba.tuning.tune import fields_of

    if first:
        click.echo(f"{'op':<17} {'before us':>9} {'best us':>9} {'gain':>6}  for: the best launch")
    sizes = _named(found.sizes)
    before = found.us.get(found.before)
    if found.best is None:
        click.echo(f"{found.op:<17} {'-':>9} {'-':>9} {'-':>6}  {sizes}: no candidate was right")
    else:
        us = found.us[found.best]
        gain = "-" if before is None else f"{before / us:.2f}"
        old = "-" if before is None else f"{before:.2f}"
        click.echo(f"{found.op:<17} {old:>9} {us:>9.2f} {gain:>6}  {sizes}: {_named(fields_of(found.best))}")
    if found.wrong:
        launch, reason = next(iter(found.wrong.items()))
        tried = len(found.wrong) + len(found.us)
        say(f"{len(found.wrong)} of {tried} did not count, the first {launch}: {reason}")


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
