"""Feed the weight solver with what each projection reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.activation import Activation, Quantized, as_float
from quamba.formats.weight import WeightFormat
from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear
from quamba.quantization.convert import nearest
from quamba.quantization.gptq import (
    GptqConfig,
    accumulate_code_moments,
    accumulate_cross,
    accumulate_hessian,
    solve,
)
from quamba.quantization.streams import Stream
from quamba.recipes.recipe import Solver


class ProjectionSolver:
    """Quantizes projections one by one, in the order data meets them.

    For GPTQ the calibration set walks through the model as it is quantized, and with
    ``propagate_error`` through the float model beside it.
    """

    def __init__(
        self, model: MambaLM, float_model: MambaLM | None, solver: Solver, calibration: Any | None
    ) -> None:
        self._model, self._solver = model, solver
        self._stream: Stream | None = None
        self._float_stream: Stream | None = None
        if solver.kind == "gptq":
            if calibration is None:
                raise QuambaError("GPTQ needs calibration text; give some or use the solver 'rtn'.")
            self._stream = Stream(model, calibration, solver.samples)
            if float_model is not None:
                self._float_stream = Stream(float_model, calibration, solver.samples)

    def solve_projection(self, layer: int, name: str, format: WeightFormat) -> dict[str, Any]:
        """Quantize ``blocks[layer].mixer.name`` in place; a line for the report."""
        mixer = self._model.blocks[layer].mixer
        linear: Linear = getattr(mixer, name)
        label = f"layers.{layer}.mixer.{name}"
        if self._stream is None:
            return self._round(label, linear, format)
        targets = None if self._float_stream is None else self._float_stream.inputs(layer, name)
        if linear.input_scale_folded and targets is not None:
            # In the units of the codes, since the weight's columns contain their scale.
            scale = mixer.conv1d.out_scale
            assert scale is not None
            targets = (as_float(x) / scale for x in targets)
        return self._solve(label, linear, format, self._stream.inputs(layer, name), targets)

    def solve_head(self, format: WeightFormat) -> dict[str, Any]:
        head = self._model.lm_head
        if self._stream is None:
            return self._round("lm_head", head, format)
        targets = None if self._float_stream is None else self._float_stream.head_inputs()
        return self._solve("lm_head", head, format, self._stream.head_inputs(), targets)

    def advance(self, layer: int) -> None:
        """Go on to the next block; the weights of this one are all in place."""
        for stream in (self._stream, self._float_stream):
            if stream is not None:
                stream.advance(layer)

    def _round(self, label: str, linear: Linear, format: WeightFormat) -> dict[str, Any]:
        scale = self._solver.scale if format.bits == 4 else "absmax"
        linear.set_weight(nearest(linear.float_weight, format, scale))
        return report_line(label, format)

    def _solve(
        self,
        label: str,
        linear: Linear,
        format: WeightFormat,
        inputs: Iterable[Activation],
        targets: Iterable[Activation] | None,
    ) -> dict[str, Any]:
        assert self._stream is not None
        hessian, cross = moments(linear, inputs, targets, self._stream.masks)
        weight, losses = solve(linear.float_weight, hessian, format, solver_config(self._solver), cross=cross)
        linear.set_weight(weight)
        return report_line(label, format, losses.rtn, losses.gptq)


def moments(
    linear: Linear,
    inputs: Iterable[Activation],
    targets: Iterable[Activation] | None,
    masks: list[Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Second moments of the inputs, (K, K) float32, and of the float model's inputs with them."""
    size, device = linear.in_features, linear.weight.data.device
    hessian = torch.zeros(size, size, device=device)
    cross = None if targets is None else torch.zeros(size, size, device=device)
    others = iter(()) if targets is None else iter(targets)
    count = cross_count = 0
    for seen, mask in zip(inputs, masks, strict=True):
        seen = _in_units_of(linear, seen)
        x = _valid(as_float(seen), mask)
        if isinstance(seen, Quantized) and seen.scale.ndim == 0 and seen.codes.is_cuda:
            count = accumulate_code_moments(hessian, _valid(seen.codes, mask), seen.scale, count)
        else:
            count = accumulate_hessian(hessian, x, count)
        if cross is not None:
            cross_count = accumulate_cross(cross, _valid(as_float(next(others)), mask), x, cross_count)
    return hessian, cross


def _in_units_of(linear: Linear, x: Activation) -> Activation:
    """What the columns of the weight are multiplied with: codes of scale 1 where they contain the scale."""
    if linear.input_scale_folded and isinstance(x, Quantized):
        return Quantized(x.codes, torch.ones((), device=x.codes.device))
    return x


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x[mask]


def report_line(
    name: str, format: WeightFormat, rtn: float | None = None, solved: float | None = None
) -> dict[str, Any]:
    """One entry of ``Report.layers``."""
    line: dict[str, Any] = {"name": name, "bits": format.bits, "granularity": format.granularity}
    return line if solved is None else {**line, "relative_loss_rtn": rtn, "relative_loss": solved}


def solver_config(solver: Solver) -> GptqConfig:
    return GptqConfig(
        damping=solver.damping,
        act_order=solver.act_order,
        scale=solver.scale,
        refinements=solver.refinements,
    )
