"""What a sweep will do: which runs are done, what the others need.

Reads config files; no weights, no network.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quamba.cli.flags import recipe_from_flags
from quamba.cli.log import jsonable
from quamba.errors import QuambaError
from quamba.experiments.spec import RunSpec, Sweep
from quamba.experiments.state import RunsFolder
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.recipes.recipe import Recipe

State = Literal["done", "failed", "stored", "to do"]

_FLOAT32, _FLOAT16 = 4, 2
_CONVERTED = re.compile(r"-converted$", re.IGNORECASE)
_VOCABULARY = {"mamba": 50280, "mamba2": 50288}


@dataclass(frozen=True)
class PlannedRun:
    """
    state         "stored": the quantized model is there and is only evaluated
    reason        why a finished run is not taken as done, or how it failed
    size_bytes    of the quantized model's tensors, None where the model's config is not at hand
    memory_bytes  for the quantization: the float model and the quantized one, and no activations
    seconds       as runs that are finished took; None before there is one
    """

    spec: RunSpec
    state: State
    reason: str = ""
    size_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Plan:
    """
    sweep  all of the file
    runs   those that are wanted, in the order of the file
    """

    sweep: Sweep
    folder: RunsFolder
    runs: tuple[PlannedRun, ...]

    def of_state(self, *states: State) -> list[PlannedRun]:
        return [run for run in self.runs if run.state in states]

    def due(self, retry_failed: bool) -> list[PlannedRun]:
        """What is to be run, runs of one model and calibration together: they share the most."""
        states: tuple[State, ...] = ("to do", "stored", "failed") if retry_failed else ("to do", "stored")
        found = self.of_state(*states)
        models = list(dict.fromkeys(run.spec.model for run in found))
        kinds = list(dict.fromkeys(_calibration(run.spec) for run in found))
        return sorted(
            found, key=lambda run: (models.index(run.spec.model), kinds.index(_calibration(run.spec)))
        )

    @property
    def disk_bytes(self) -> int | None:
        """Of models that are still to be written; None where no size is known."""
        sizes = [run.size_bytes for run in self.of_state("to do", "failed") if run.spec.folder is not None]
        known = [size for size in sizes if size is not None]
        return sum(known) if known or not sizes else None


def make_plan(sweep: Sweep, folder: RunsFolder, only: Sequence[str] = ()) -> Plan:
    """Compare what is asked for with what is there.

    only  names of runs, or what names begin with up to a ``/``; none: all
    """
    configs: dict[str, ModelConfig | None] = {}
    sizes = _Sizes()
    runs = []
    for spec in sweep.only(only).runs:
        if spec.model not in configs:
            configs[spec.model] = known_config(spec.model)
        runs.append(_planned(spec, folder, configs[spec.model], sizes))
    timed = _seconds(sweep, folder)
    return Plan(sweep, folder, tuple(_with_seconds(run, timed) for run in runs))


def known_config(model: str) -> ModelConfig | None:
    """From the model's folder or the hub's cache; of a published model without either, its known shape."""
    from huggingface_hub import try_to_load_from_cache

    from quamba.checkpoints.float import read_float_config

    place = Path(model).expanduser()
    if not place.is_dir():
        try:
            cached = try_to_load_from_cache(model, "config.json")
        except ValueError:  # no hub id
            cached = None
        place = Path(cached).parent if isinstance(cached, str) else place
    try:
        return read_float_config(place)
    except QuambaError:
        return _published_config(model)


def _published_config(model: str) -> ModelConfig | None:
    from quamba.reporting.published import model_id, model_shape

    name = model_id(_CONVERTED.sub("", model.rstrip("/")), {})
    if name is None:
        return None
    shape = model_shape(name)
    family = str(shape["family"])
    sizes: dict[str, Any] = {"d_model": shape["d_model"], "n_layer": shape["n_layer"]}
    if name == "mamba2-8b":  # its config is NVIDIA's
        return Mamba2Config(**sizes, vocab_size=256000, ngroups=8, chunk_size=128, tie_embeddings=False)
    cls: type[MambaConfig] | type[Mamba2Config] = MambaConfig if family == "mamba" else Mamba2Config
    return cls(**sizes, vocab_size=_VOCABULARY[family])


def _planned(spec: RunSpec, folder: RunsFolder, config: ModelConfig | None, sizes: _Sizes) -> PlannedRun:
    recipe = None
    if config is not None and spec.flags.quantize:
        try:
            recipe = recipe_from_flags(spec.flags, config)[0]
        except QuambaError as error:
            raise QuambaError(f"The run '{spec.name}': {error}") from None
    state, reason = _state(spec, folder, recipe)
    size = memory = None
    if config is not None:
        size, memory = sizes.of(config, recipe)
    return PlannedRun(spec, state, reason, size, memory)


def _state(spec: RunSpec, folder: RunsFolder, recipe: Recipe | None) -> tuple[State, str]:
    result = folder.result(spec.name)
    reason = ""
    if result is not None:
        reason = _difference(result, spec, recipe)
        if not reason:
            return "done", ""
    failure = folder.failure(spec.name)
    if failure is not None and failure.get("arguments") == list(spec.arguments):
        return "failed", str(failure.get("sentence", ""))
    stored = spec.folder is not None and (spec.folder / "config.json").is_file()
    return ("stored" if stored else "to do"), reason


def _difference(result: dict[str, Any], spec: RunSpec, recipe: Recipe | None) -> str:
    """Why a result is not what is asked for; "" if it is."""
    kept = result.get("sweep", {}).get("request")
    asked = json.loads(json.dumps(jsonable(spec.request)))
    if not isinstance(kept, dict):
        return "its result says nothing of what was asked"
    differing = [key for key in sorted({*kept, *asked}) if kept.get(key) != asked.get(key)]
    if differing:
        key = differing[0]
        return f"its result is of {key} {kept.get(key)!r}, asked is {asked.get(key)!r}"
    if recipe is not None and not _same_recipe(result.get("recipe"), recipe):
        return "its result is of another recipe than these flags mean now"
    return ""


def _same_recipe(stored: Any, asked: Recipe) -> bool:
    try:
        return Recipe.from_dict(stored) == asked  # fields newer than the result have their defaults
    except (QuambaError, TypeError, AttributeError):
        return False


class _Sizes:
    """Sizes from shapes alone; each pair of config and recipe once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def of(self, config: ModelConfig, recipe: Recipe | None) -> tuple[int, int]:
        """Bytes of the model that is made, and of the models that its quantization holds at once."""
        fields = None if recipe is None else {**recipe.to_dict(), "percentile_alpha": None}
        key = json.dumps([config.to_dict(), fields])
        if key not in self._known:
            self._known[key] = self._measure(config, recipe)
        return self._known[key]

    def _measure(self, config: ModelConfig, recipe: Recipe | None) -> tuple[int, int]:
        import torch

        from quamba.models.lm import MambaLM
        from quamba.recipes.plan import resolve
        from quamba.recipes.skeleton import skeleton

        with torch.device("meta"):
            parameters = sum(t.numel() for t in MambaLM(config).named_tensors().values())
        at_rest = _FLOAT16 if torch.cuda.is_available() else _FLOAT32
        if recipe is None:
            return _FLOAT16 * parameters, at_rest * parameters
        made = skeleton(resolve(recipe, config)).named_tensors().values()
        size = sum(t.numel() * (_FLOAT16 if t.dtype == torch.float32 else t.itemsize) for t in made)
        return size, size + at_rest * parameters


def _calibration(spec: RunSpec) -> tuple[Any, ...]:
    return tuple(spec.options[key] for key in ("calib_data", "calib_data_num", "calib_seqlen", "seed"))


Timed = Sequence[tuple[RunSpec, float]]


def _seconds(sweep: Sweep, folder: RunsFolder) -> Timed:
    """How long the finished runs took, whatever subset they scored."""
    found = []
    for spec in sweep.runs:
        taken = (folder.result(spec.name) or {}).get("sweep", {}).get("seconds")
        if isinstance(taken, int | float):
            found.append((spec, float(taken)))
    return found


def estimate_seconds(spec: RunSpec, timed: Timed) -> float | None:
    """The mean of the runs most like this one: of its model and precision, its model, or all."""
    likenesses: tuple[Callable[[RunSpec], Any], ...] = (
        lambda other: (other.model, other.flags.label),
        lambda other: other.model,
        lambda other: None,
    )
    for likeness in likenesses:
        found = [seconds for other, seconds in timed if likeness(other) == likeness(spec)]
        if found:
            return sum(found) / len(found)
    return None


def _with_seconds(run: PlannedRun, timed: Timed) -> PlannedRun:
    return dataclasses.replace(run, seconds=estimate_seconds(run.spec, timed))


def plan_record(plan: Plan) -> dict[str, Any]:
    """What ``sweep.json`` holds: all runs of the sweep, also those that are not wanted now."""

    def one(run: RunSpec) -> dict[str, Any]:
        expected = [dataclasses.asdict(value) for value in run.expected]
        return {"name": run.name, "arguments": run.arguments, "request": run.request, "expected": expected}

    return {
        "name": plan.sweep.name,
        "title": plan.sweep.title,
        "file": plan.sweep.file,
        "runs": [one(run) for run in plan.sweep.runs],
    }
