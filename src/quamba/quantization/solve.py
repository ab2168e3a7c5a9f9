"""Feed the weight solver with what each projection reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.models.lm import Block
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm
from quamba.quantization.convert import nearest
from quamba.quantization.gptq import (
    GptqConfig,
    Problem,
    SolveLosses,
    accumulate_code_moments,
    accumulate_cross,
    accumulate_hessian,
    joined,
)
from quamba.quantization.streams import Stream
from quamba.recipes.recipe import Solver


class ProjectionSolver:
    """Quantizes projections one by one, in the order data meets them.

    stream        the calibration set, on its way through the model as it is quantized; None: weights are
                  rounded to nearest
    float_stream  the same on its way through the float model, whose outputs are aimed at then
    """

    def __init__(self, solver: Solver, stream: Stream | None, float_stream: Stream | None) -> None:
        self._solver, self._stream, self._float_stream = solver, stream, float_stream

    def solve_projection(
        self, block: Block, float_block: Block | None, name: str, format: WeightFormat
    ) -> SolveLosses | None:
        """Quantize projection ``name`` of a block in place.

        float_block  the same block before anything was rounded; for a float stream
        """
        linear: Linear = getattr(block.mixer, name)
        if self._stream is None:
            linear.set_weight(self.round(linear.float_weight, format))
            return None
        targets: Iterable[Activation] | None = None
        if self._float_stream is not None and float_block is not None:
            targets = self._float_stream.inputs(float_block, name)
        if linear.input_scale_folded and targets is not None:
            # In the units of the codes, since the weight's columns contain their scale.
            scale = block.mixer.conv1d.out_scale
            assert scale is not None
            targets = (as_float(x) / scale for x in targets)
        hessian, cross = moments(linear, self._stream.inputs(block, name), targets, self._stream.masks)
        problem = Problem(hessian, solver_config(self._solver), cross=cross, like=linear.float_weight)
        del hessian, cross
        weight, losses = joined([problem.solve(linear.float_weight, format)])
        linear.set_weight(weight)
        return losses

    def head_moments(self, head: Linear, norm_f: AddNorm, float_norm_f: AddNorm) -> dict[str, Tensor]:
        """Moments of what the head reads: "hessian", and "cross" with a float stream."""
        assert self._stream is not None
        targets = None if self._float_stream is None else self._float_stream.normed(float_norm_f)
        hessian, cross = moments(head, self._stream.normed(norm_f), targets, self._stream.masks)
        return {"hessian": hessian} if cross is None else {"hessian": hessian, "cross": cross}

    def round(self, weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        return nearest(weight, format, self._solver.scale if format.bits == 4 else "absmax")

    def problem(self, moments: dict[str, Tensor], like: Tensor) -> Problem:
        """Of ``head_moments``, or of the loss metric of an embedding as "hessian"."""
        config = solver_config(self._solver)
        return Problem(moments["hessian"], config, cross=moments.get("cross"), like=like)


def moments(
    linear: Linear,
    inputs: Iterable[Activation],
    targets: Iterable[Activation] | None,
    masks: list[Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Second moments of the inputs, (K, K) float32, and of the float model's inputs with them."""
    hessian = cross = None
    others = iter(()) if targets is None else iter(targets)
    count = cross_count = 0
    for seen, mask in zip(inputs, masks, strict=True):
        seen = _in_units_of(linear, seen)
        x = _valid(as_float(seen), mask)
        if hessian is None:
            hessian = torch.zeros(linear.in_features, linear.in_features, device=x.device)
            cross = None if targets is None else torch.zeros_like(hessian)
        if isinstance(seen, Quantized) and seen.scale.ndim == 0 and seen.codes.is_cuda:
            count = accumulate_code_moments(hessian, _valid(seen.codes, mask), seen.scale, count)
        else:
            count = accumulate_hessian(hessian, x, count)
        if cross is not None:
            cross_count = accumulate_cross(cross, _valid(as_float(next(others)), mask), x, cross_count)
    assert hessian is not None, "no batches"
    return hessian, cross


def _in_units_of(linear: Linear, x: Activation) -> Activation:
    """What the columns of the weight are multiplied with: codes of scale 1 where they contain the scale."""
    if linear.input_scale_folded and isinstance(x, Quantized):
        return Quantized(x.codes, torch.ones((), device=x.codes.device))
    return x


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x[mask]


def report_line(name: str, format: WeightFormat, losses: SolveLosses | None) -> dict[str, Any]:
    """One entry of ``Report.layers``."""
    line: dict[str, Any] = {"name": name, "bits": format.bits, "granularity": format.granularity}
    return line if losses is None else {**line, "relative_loss_rtn": losses.rtn, "relative_loss": losses.gptq}


def solver_config(solver: Solver) -> GptqConfig:
    return GptqConfig(
        damping=solver.damping,
        act_order=solver.act_order,
        scale=solver.scale,
        refinements=solver.refinements,
    )
