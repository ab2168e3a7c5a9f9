"""The whole job: a float model, a recipe and calibration text in; a model of integers and a report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from quamba.calibration.collect import Batch, StateWatch, Watch, collect
from quamba.calibration.observers import AbsMax, ChannelMean
from quamba.calibration.sites import BlockObservers, BlockScales, scale_of
from quamba.errors import QuambaError
from quamba.kernels.registry import REFERENCE
from quamba.models.config import Mamba2Config
from quamba.models.lm import MambaLM
from quamba.models.mamba2 import Mamba2Mixer
from quamba.quantization.convert import nearest, set_block_formats
from quamba.quantization.embedding import loss_metric
from quamba.quantization.gptq import solve
from quamba.quantization.memory import Batches, in_large_batches, peak_memory_bytes, reset_peak_memory
from quamba.quantization.parameters import round_parameters
from quamba.quantization.solve import ProjectionSolver, report_line, solver_config
from quamba.quantization.streams import first_sequences
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Recipe
from quamba.recipes.report import Report
from quamba.transforms.fuse_norm import fuse_norms
from quamba.transforms.head_grouping import ChannelOrder, group_heads
from quamba.transforms.reorder import reorder
from quamba.transforms.rotate import rotate

# Enough text for means of channels; the scales, which are extremes, come from all of it.
HEAD_STATISTICS_SEQUENCES = 128


class Progress(Protocol):
    """Told of each stage and of each unit of work done in it."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, count: int = 1) -> None: ...


class Silent:
    def stage(self, name: str, total: int) -> None:
        pass

    def step(self, count: int = 1) -> None:
        pass


@torch.no_grad()
def quantize_model(
    model: MambaLM, recipe: Recipe, calibration: Any, progress: Progress | None = None
) -> tuple[MambaLM, Plan, Report]:
    """Quantize a float model; the given one stays as it is.

    calibration  a ``CalibrationSet``; may be None for recipes without int8 activations, int8 states and GPTQ
    Raises QuambaError before any work if the recipe does not fit the model or names no way to round weights.
    """
    plan = resolve(recipe, model.config)
    if recipe.solver.kind == "unknown":
        raise QuambaError(
            f"The recipe '{recipe.name}' says that another program made the weights (solver 'unknown'),"
            " expected the solver 'rtn' or 'gptq'."
        )
    progress = progress or Silent()
    report = Report(recipe.to_dict(), calibration.to_dict() if calibration is not None else {})
    device = model.device
    clock = _Clock(report.seconds, device)
    reset_peak_memory(device)
    if calibration is not None:
        calibration = in_large_batches(calibration, model.config, device)
    with clock("transforms"):
        # The reference kernels: calibration hooks and gradients need nothing but torch.
        model = copy.deepcopy(model).set_compute_dtype(torch.float32).use_kernels(REFERENCE)
        if plan.folds_norms:
            fuse_norms(model)
        if plan.embedding is not None:
            model.untie()
    with clock("head grouping"):
        orders = _group_heads(model, plan, calibration, progress)
        report.head_groups = [order.to_dict() for order in orders.values()]
    with clock("transforms"):
        if plan.rotate:
            rotate(model)
        float_model = copy.deepcopy(model) if _aims_at_float_outputs(plan) else None
        round_parameters(model, plan)
    with clock("activation scales"):
        blocks, head_scale = _activation_scales(model, plan, orders, calibration, progress)
    with clock("weights"):
        _quantize_weights(model, float_model, plan, blocks, head_scale, calibration, progress, report)
    report.peak_gpu_bytes = peak_memory_bytes(device)
    return model, plan, report


def _aims_at_float_outputs(plan: Plan) -> bool:
    return plan.recipe.solver.kind == "gptq" and plan.recipe.solver.propagate_error


def _group_heads(
    model: MambaLM, plan: Plan, calibration: Batches, progress: Progress
) -> dict[int, ChannelOrder]:
    """Layer -> order, for a plan with head groups; the model is reordered in place."""
    if plan.group_heads is None:
        return {}
    config = plan.config
    assert isinstance(config, Mamba2Config)
    observers = {i: ChannelMean(config.d_inner, model.device) for i in range(config.n_layer)}
    watches = [
        Watch(f"backbone.layers.{i}.mixer.conv1d", slice(0, config.d_inner), observer)
        for i, observer in observers.items()
    ]
    batches = first_sequences(calibration.batches(), HEAD_STATISTICS_SEQUENCES)
    _watch(model, batches, watches, [], "Head statistics", progress)
    orders = {}
    for i, observer in observers.items():
        stats = observer.value().view(config.ngroups, -1, config.headdim)
        orders[i] = group_heads(stats, plan.group_heads.heads, plan.group_heads.channels)
        mixer = model.blocks[i].mixer
        assert isinstance(mixer, Mamba2Mixer)
        reorder(mixer, orders[i])
    return orders


def _activation_scales(
    model: MambaLM, plan: Plan, orders: dict[int, ChannelOrder], calibration: Batches, progress: Progress
) -> tuple[list[BlockScales], Tensor | None]:
    """Scales of every block, and of the head's input."""
    if not plan.needs_activation_scales:
        return [BlockScales() for _ in plan.blocks], None
    device = model.device
    observers = [
        BlockObservers(plan, i, orders[i].group if i in orders else None, device)
        for i in range(len(plan.blocks))
    ]
    head = AbsMax(torch.zeros(plan.config.d_model, dtype=torch.int64, device=device), 1)
    watches = [w for o in observers for w in o.watches]
    if plan.int8_head_input:
        watches.append(Watch("backbone.norm_f", slice(None), head))
    _watch(
        model,
        list(calibration.batches()),
        watches,
        [w for o in observers for w in o.state_watches],
        "Activation scales",
        progress,
    )
    return [o.scales() for o in observers], scale_of(head.value())[0] if plan.int8_head_input else None


def _quantize_weights(
    model: MambaLM,
    float_model: MambaLM | None,
    plan: Plan,
    blocks: list[BlockScales],
    head_scale: Tensor | None,
    calibration: Batches | None,
    progress: Progress,
    report: Report,
) -> None:
    """Embedding, blocks in order, head. Each solver sees what the quantized layers before it give.

    float_model  the same function before anything was rounded, or None: not to be aimed at
    """
    progress.stage("Weights", len(plan.blocks) + 1)
    if plan.embedding is not None:
        report.layers.append(_quantize_embedding(model, plan, calibration))
    projections = ProjectionSolver(model, float_model, plan.recipe.solver, calibration)
    for i, block in enumerate(model.blocks):
        set_block_formats(block, plan.blocks[i], blocks[i])
        for name, format in plan.blocks[i].weights.items():
            report.layers.append(projections.solve_projection(i, name, format))
        projections.advance(i)
        progress.step()
    model.backbone.norm_f.out_scale = head_scale
    if plan.head is not None:
        report.layers.append(projections.solve_head(plan.head))
    progress.step()


def _quantize_embedding(model: MambaLM, plan: Plan, calibration: Batches | None) -> dict[str, Any]:
    """Rows rounded for what their errors cost in loss, or to nearest; a line for the report."""
    table, format, solver = model.backbone.embedding, plan.embedding, plan.recipe.solver
    assert format is not None
    if solver.kind == "rtn" or format.bits == 8 or calibration is None:
        scale = solver.scale if format.bits == 4 else "absmax"
        table.set_weight(nearest(table.float_weight, format, scale))
        return report_line("embedding", format)
    metric = loss_metric(model, calibration.batches())
    weight, losses = solve(table.float_weight, metric, format, solver_config(solver))
    table.set_weight(weight)
    return report_line("embedding", format, losses.rtn, losses.gptq)


def _watch(
    model: MambaLM,
    batches: list[Batch],
    watches: list[Watch],
    states: list[StateWatch],
    what: str,
    progress: Progress,
) -> None:
    progress.stage(what, sum(ids.shape[0] for ids, _ in batches))
    collect(model, batches, watches, states, on_batch=progress.step)


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
