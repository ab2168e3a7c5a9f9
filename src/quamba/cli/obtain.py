"""From the MODEL argument and the published flags to a model: load it, find the stored one, or quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quamba.cli.console import TqdmProgress, say
from quamba.cli.flags import QuantizeFlags, recipe_from_flags
from quamba.cli.store import (
    check_replaceable,
    check_same,
    default_calibration,
    find_model,
    quamba_name,
    stored_folder,
)
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.calibration.data import CalibrationSet, CalibrationSpec
    from quamba.models.config import ModelConfig
    from quamba.quantization.work import WorkFolder
    from quamba.recipes.recipe import Recipe

Guard = Callable[["CalibrationSet", "Model"], None]
Load = Callable[..., "Model"]


@dataclass
class Obtained:
    """A model ready for use.

    folder   where it is stored; None for a float model and for one that is kept in memory only
    fresh    whether it was quantized just now
    seconds  wall time a stage
    """

    model: Model
    folder: Path | None = None
    fresh: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def obtain(
    argument: str,
    flags: QuantizeFlags,
    *,
    device: str,
    backend: str,
    seed: int,
    progress: TqdmProgress,
    check_calibration: Callable[[str | None], None] = lambda source: None,
    check_drawn: Guard = lambda calibration, model: None,
    load_float: Load | None = None,
    work: WorkFolder | None = None,
) -> Obtained:
    """
    check_calibration  told the calibration text's name before anything is computed; may refuse it
    check_drawn        told the samples drawn from it
    load_float         instead of ``api.open_float`` for the float model that is quantized
    work               where results of stages are kept and found
    """
    from quamba.api import choose_device, open_float
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.checkpoints.stored import stored_format

    choose_device(device)
    if flags.output_subdir is not None and flags.pretrained_dir is None:
        raise QuambaError("--output_subdir needs --pretrained_dir DIR, the folder that it is under.")
    source = find_model(argument, flags.pretrained_dir, flags.output_subdir)
    local = resolve_source(source)
    if stored_format(local) is not None:
        if flags.quantize:
            say(f"--quantize is ignored: '{source}' is quantized already.")
        return _timed_load(source, device, backend, local)
    if not flags.quantize:
        return _timed_load(source, device, backend, None)
    job = _plan(flags, source, local, seed)
    check_calibration(None if job.calibration is None else _named(job.calibration))
    if job.folder is not None and job.folder.is_dir() and any(job.folder.iterdir()):
        if not flags.force:
            check_same(job.folder, job.recipe, source, job.calibration)
            say(f"Using the stored model '{job.folder}'.")
            return _timed_load(str(job.folder), device, backend, job.folder)
        check_replaceable(job.folder, force=True)
    model = open_float(source) if load_float is None else load_float(source, device, backend=backend)
    return _quantize(model, job, progress, check_drawn, flags.force, work, device, backend)


@dataclass(frozen=True)
class _Job:
    recipe: Recipe
    calibration: CalibrationSpec | None
    folder: Path | None


def _plan(flags: QuantizeFlags, source: str, local: Path, seed: int) -> _Job:
    """Everything that can be refused without a weight read."""
    from quamba.checkpoints.float import read_float_config

    config = read_float_config(local)
    recipe, notes = recipe_from_flags(flags, config)
    for note in notes:
        say(note)
    calibration = calibration_for(
        recipe,
        config,
        local,
        flags.calib_data,
        num=flags.calib_data_num,
        seqlen=flags.calib_seqlen,
        seed=seed,
    )
    folder = None
    if flags.pretrained_dir is not None:
        hybrid = flags.hybrid_blocks_config if flags.hybrid_blocks else None
        name = quamba_name(source, flags.label, hybrid)
        folder = stored_folder(flags.pretrained_dir, name, flags.output_subdir, flags.percentile_alpha)
    return _Job(recipe, calibration, folder)


def calibration_for(
    recipe: Recipe,
    config: ModelConfig,
    local: Path,
    data: str | None,
    *,
    num: int,
    seqlen: int,
    seed: int,
    batch_size: int = 8,
) -> CalibrationSpec | None:
    """Which text to calibrate on; None where the recipe needs none. Refuses what does not fit the model.

    Without ``data``: the text bundled with a bundled model, else the library's default data set.
    """
    from quamba.calibration.data import CalibrationSpec
    from quamba.calibration.reading import resolve_source
    from quamba.recipes.plan import resolve

    if not resolve(recipe, config).needs_calibration:
        if data is not None:
            say("--calib_data is ignored: this recipe needs no calibration text.")
        return None
    chosen = data or default_calibration(local)
    resolve_source(chosen)
    return CalibrationSpec(data=chosen, num=num, seqlen=seqlen, seed=seed, batch_size=batch_size)


def read_calibration(model: Model, spec: CalibrationSpec) -> CalibrationSet:
    from quamba.calibration.data import load_calibration

    if model.tokenizer is None:
        raise QuambaError(
            f"Calibration needs a tokenizer, and '{model.source}' has none; "
            "put its tokenizer.json into the folder."
        )
    return load_calibration(spec, model.tokenizer)


def _quantize(
    model: Model,
    job: _Job,
    progress: TqdmProgress,
    check_drawn: Guard,
    overwrite: bool,
    work: WorkFolder | None,
    device: str,
    backend: str,
) -> Obtained:
    from quamba.api import quantize, save

    calibration = None
    if job.calibration is not None:
        calibration = read_calibration(model, job.calibration)
        check_drawn(calibration, model)
        say(f"Calibrating on {calibration.description}.")
    small, report = quantize(
        model, job.recipe, calibration, progress=progress, work=work, device=device, backend=backend
    )
    progress.close()
    if job.folder is None:
        say("The quantized model is kept in memory only; --pretrained_dir DIR stores it.")
    else:
        save(small, job.folder, overwrite=overwrite)
        say(f"Saved to '{job.folder}'.")
    return Obtained(small, job.folder, True, dict(report.seconds))


def _timed_load(source: str, device: str, backend: str, folder: Path | None) -> Obtained:
    import time

    from quamba.api import load

    start = time.perf_counter()
    model = load(source, device, backend=backend)
    return Obtained(model, folder, seconds={"load": round(time.perf_counter() - start, 3)})


def _named(spec: CalibrationSpec) -> str:
    from quamba.calibration.reading import resolve_source

    return str(resolve_source(spec.data))
