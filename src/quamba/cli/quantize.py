"""``quamba quantize``: a float model and a recipe in, a folder out."""

from __future__ import annotations

import json
import sys
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
from quamba.errors import QuambaError

if TYPE_CHECKING:
    import torch

    from quamba.api import Model
    from quamba.quantization.work import WorkFolder
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
@click.option(
    "--max_gpu_memory",
    metavar="SIZE",
    help="Of a GPU, such as 8G: smaller batches, more in files. Default: all.",
)
@click.option(
    "--max_memory", metavar="SIZE", help="Of the machine, such as 12G: more in files. Default: what is free."
)
@click.option(
    "--resume", is_flag=True, help="Keep finished blocks in OUT.work until all is saved; go on from there."
)
@click.option("--work_dir", metavar="DIR", help="As --resume, in DIR; runs of other recipes may share it.")
@click.option("--keep_work", is_flag=True, help="Do not remove the work folder at the end.")
@click.option("--force", is_flag=True, help="Replace the model in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, output: str, force: bool, as_json: bool, verbose: bool, **options: Any) -> None:
    """Quantize MODEL, a folder or hub id of a float model, and save it to OUT."""
    from quamba.api import choose_device, open_float, quantize, save
    from quamba.checkpoints.float import read_float_config
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.cli.obtain import calibration_for, read_calibration
    from quamba.cli.store import check_replaceable
    from quamba.quantization.memory import parse_size

    device = choose_device(options["device"])
    limits = {
        name: None if options[name] is None else parse_size(options[name])
        for name in ("max_gpu_memory", "max_memory")
    }
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
    opened = open_float(model)
    _check_space(recipe, opened, folder, device)
    work = _work_folder(folder, options)
    calibration = None if spec is None else read_calibration(opened, spec)
    say(f"Quantizing '{model}' by the recipe {recipe.name}.")
    if calibration is not None:
        say(f"Calibrating on {calibration.description}.")
    with TqdmProgress(verbose) as progress:
        small, report = quantize(
            opened,
            recipe,
            calibration,
            progress=progress,
            device=device,
            backend=options["backend"],
            work=work,
            **limits,
        )
    save(small, folder, overwrite=force)
    if work is not None and not options["keep_work"]:
        work.clear()
    _print(report, local, folder, as_json)


def _work_folder(folder: Path, options: dict[str, Any]) -> WorkFolder | None:
    from quamba.quantization.work import WorkFolder

    if options["work_dir"] is None and not options["resume"]:
        if options["keep_work"]:
            raise QuambaError("--keep_work has no effect alone, expected --work_dir DIR or --resume with it.")
        return None
    work = WorkFolder(options["work_dir"] or folder.with_name(f"{folder.name}.work"))
    size = work.size_bytes()
    if size:
        say(f"Going on with what is in '{work.path}' ({mib(size):,.0f} MiB).")
    return work


def _check_space(recipe: Recipe, model: Model, folder: Path, device: torch.device) -> None:
    """Refuse before any work what could not be saved after it."""
    import torch

    from quamba.checkpoints.quantized import check_space
    from quamba.recipes.plan import resolve
    from quamba.recipes.skeleton import skeleton

    empty = skeleton(resolve(recipe, model.config))
    empty.set_compute_dtype(torch.float16 if device.type == "cuda" else torch.float32)
    check_space(folder, empty.named_tensors())


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
    peaks = [f"{_peak_memory() / 2**30:.1f} GiB"]
    if report.peak_gpu_bytes is not None:
        peaks.append(f"{report.peak_gpu_bytes / 2**30:.1f} GiB on the GPU")
    click.echo(f"Peak memory {', '.join(peaks)}.")
    click.echo(f"Saved to '{folder}'.")


def _peak_memory() -> int:
    """Bytes that this process had at most, pages of mapped files included."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3e}" if isinstance(value, float) else str(value)
