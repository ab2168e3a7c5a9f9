"""The whole job: a float model, a recipe and calibration text in; a model of integers and a report out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from quamba.errors import QuambaError
from quamba.models.lm import MambaLM
from quamba.quantization.embedding import metric_batches
from quamba.quantization.keys import Keys
from quamba.quantization.memory import Budget, in_large_batches, peak_memory_bytes, reset_peak_memory
from quamba.quantization.source import FloatModel, Release
from quamba.quantization.stages import Progress, Stages, Texts
from quamba.quantization.streams import first_sequences
from quamba.quantization.work import WorkFolder, float_identity
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Recipe
from quamba.recipes.report import Report
from quamba.recipes.skeleton import skeleton

__all__ = ["HEAD_STATISTICS_SEQUENCES", "Progress", "Silent", "quantize_model"]

# Enough text for means of channels; the scales, which are extremes, come from all of it.
HEAD_STATISTICS_SEQUENCES = 128


class Silent:
    def stage(self, name: str, total: int) -> None:
        pass

    def step(self, count: int = 1) -> None:
        pass


@torch.no_grad()
def quantize_model(
    model: MambaLM,
    recipe: Recipe,
    calibration: Any,
    progress: Progress | None = None,
    *,
    work: WorkFolder | None = None,
    budget: Budget | None = None,
    identity: str | None = None,
    release: Release | None = None,
) -> tuple[MambaLM, Plan, Report]:
    """Quantize a float model block by block; the given one stays as it is, wherever its tensors lie.

    calibration  a ``CalibrationSet``; may be None for recipes without int8 activations, int8 states and GPTQ
    work         where results of stages are kept and looked for, so that a run that was interrupted goes on,
                 and runs of several recipes share what they have in common
    budget       the device that computes and the memory it may take; None: the model's, all of it
    identity     what identifies the model in ``work``; None: its tensors' bytes, which are read for that
    release      told of tensors of the model that are not needed for a while
    returns      the quantized model, on the given model's device, its plan and a report
    Raises QuambaError before any work if the recipe does not fit the model or names no way to round weights.
    """
    plan = resolve(recipe, model.config)
    if recipe.solver.kind == "unknown":
        raise QuambaError(
            f"The recipe '{recipe.name}' says that another program made the weights (solver 'unknown'),"
            " expected the solver 'rtn' or 'gptq'."
        )
    if recipe.solver.kind == "gptq" and calibration is None:
        raise QuambaError("GPTQ needs calibration text; give some or use the solver 'rtn'.")
    budget = budget or Budget(model.device)
    report = Report(recipe.to_dict(), calibration.to_dict() if calibration is not None else {})
    clock = _Clock(report.seconds, budget.device)
    reset_peak_memory(budget.device)
    with ExitStack() as cleanup:
        texts = _texts(plan, calibration, budget)
        if work is not None and identity is None:
            identity = float_identity(model.named_tensors(), model.config.to_dict())
        keys = _keys(identity or "", plan, budget, texts)
        source = FloatModel(model, plan, budget.device, release)
        stages = Stages(
            source,
            plan,
            texts,
            keys,
            budget,
            progress or Silent(),
            work=work,
            scratch=_scratch(cleanup, work),
            home=model.device,
        )
        with clock("head grouping"):
            source.orders = stages.head_orders()
            report.head_groups = [order.to_dict() for order in source.orders.values()]
        with clock("activation scales"):
            scales, head_scale = stages.activation_scales()
        result = skeleton(plan)
        with clock("embedding"):
            report.layers += stages.embedding(result)
        with clock("weights"):
            report.layers += stages.weights(result, scales, head_scale)
    report.peak_gpu_bytes = peak_memory_bytes(budget.device)
    return result, plan, report


def _texts(plan: Plan, calibration: Any, budget: Budget) -> Texts:
    if calibration is None:
        return Texts()
    calibration = in_large_batches(calibration, plan.config, budget)
    batches = list(calibration.batches())
    texts = Texts(scales=batches)
    if plan.group_heads is not None:
        texts.statistics = first_sequences(batches, HEAD_STATISTICS_SEQUENCES)
    if plan.recipe.solver.kind == "gptq":
        texts.solver = first_sequences(batches, plan.recipe.solver.samples)
        texts.metric = metric_batches(batches, plan.config, budget.device)
    return texts


def _keys(identity: str, plan: Plan, budget: Budget, texts: Texts) -> Keys:
    return Keys(
        identity,
        plan,
        budget.device,
        statistics_batches=texts.statistics,
        scales_batches=texts.scales,
        solver_batches=texts.solver,
        metric_batches=texts.metric,
    )


def _scratch(cleanup: ExitStack, work: WorkFolder | None) -> Callable[[], Path]:
    """Makes a folder when one is asked for, which goes with the job."""
    made: list[Path] = []

    def folder() -> Path:
        if not made:
            if work is not None:
                made.append(cleanup.enter_context(work.scratch()))
            else:
                made.append(Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="quamba-"))))
        return made[0]

    return folder


class _Clock:
    """Adds the wall time of a ``with`` block to a stage, until the GPU has done what it asked for."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[stage] = round(self._seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
