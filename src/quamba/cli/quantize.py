"""``quamba quantize``: a float model and a recipe in, a folder out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, NearestChoice, TqdmProgress, mib, say, table
from quamba.cli.flags import (
    calibration_options,
    device_option,
    percentile_option,
    seed_option,
    state_option,
    with_state,
)

if TYPE_CHECKING:
    from quamba.recipes.recipe import Recipe
    from quamba.recipes.report import Report


def _calibration(function: Any) -> Any:
    for option in reversed(calibration_options()):
        function = option(function)
    return function


@click.command(cls=Command)
@click.argument("model")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe or a .toml file.")
@click.option("-o", "--output", required=True, metavar="OUT", help="Folder to write.")
@_calibration
@click.option(
    "--batch_size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples at once; a GPU takes more.",
)
@seed_option()
@percentile_option()
@state_option()
@click.option("--solver", type=NearestChoice(["rtn", "gptq"]), help="Instead of the recipe's.")
@device_option()
@click.option("--force", is_flag=True, help="Replace the model in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, output: str, force: bool, as_json: bool, verbose: bool, **options: Any) -> None:
    """Quantize MODEL, a folder or hub id of a float model, and save it to OUT."""
    from quamba.api import load, quantize, save
    from quamba.checkpoints.float import read_float_config
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.cli.obtain import calibration_for, read_calibration
    from quamba.cli.store import check_replaceable

    recipe = _recipe(options)
    folder = Path(output).expanduser()
    check_replaceable(folder, force)
    local = resolve_source(model)
    spec = calibration_for(
        recipe,
        read_float_config(local),
        local,
        options["calib_data"],
        num=options["calib_data_num"],
        seqlen=options["calib_seqlen"],
        seed=options["seed"],
        batch_size=options["batch_size"],
    )
    loaded = load(model, options["device"])
    calibration = None if spec is None else read_calibration(loaded, spec)
    say(f"Quantizing '{model}' by the recipe {recipe.name}.")
    if calibration is not None:
        say(f"Calibrating on {calibration.description}.")
    with TqdmProgress(verbose) as progress:
        small, report = quantize(loaded, recipe, calibration, progress=progress)
    save(small, folder, overwrite=force)
    _print(report, local, folder, as_json)


def _recipe(options: dict[str, Any]) -> Recipe:
    """The named recipe with what the other options change."""
    import dataclasses

    from quamba.recipes.recipe import load_recipe

    recipe = with_state(load_recipe(options["recipe"]), options["state_dtype"])
    if options["percentile_alpha"] is not None:
        recipe = recipe.replace(percentile_alpha=options["percentile_alpha"])
    if options["solver"] is not None:
        recipe = recipe.replace(solver=dataclasses.replace(recipe.solver, kind=options["solver"]))
    return recipe


def _print(report: Report, source: Path, folder: Path, as_json: bool) -> None:
    from quamba.checkpoints.tensors import open_tensors

    before, after = (mib(open_tensors(where).size_bytes()) for where in (source, folder))
    if as_json:
        sizes = {"size_mib": after, "size_before_mib": before, "folder": str(folder)}
        click.echo(json.dumps({**sizes, **report.to_dict()}, indent=2))
        return
    keys = ["name", "bits", "granularity", "relative_loss_rtn", "relative_loss"]
    header = ["weights", "bits", "scales", "loss, nearest", "loss, GPTQ"]
    if not any("relative_loss" in line for line in report.layers):  # rounding alone does not measure it
        keys, header = keys[:3], header[:3]
    click.echo(table(header, [[_cell(line.get(key)) for key in keys] for line in report.layers]))
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
    click.echo(f"{sum(report.seconds.values()):.1f} s ({stages}); weights {before:.1f} -> {after:.1f} MiB.")
    if report.peak_gpu_bytes is not None:
        click.echo(f"Peak GPU memory {report.peak_gpu_bytes / 2**30:.1f} GiB, the float model included.")
    click.echo(f"Saved to '{folder}'.")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3e}" if isinstance(value, float) else str(value)
