"""Feed the weight solver: which inputs a projection sees, and where the stream of activations goes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quamba.errors import QuambaError
from quamba.formats.activation import Activation, Quantized, as_float
from quamba.formats.weight import WeightFormat
from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear
from quamba.quantization.convert import nearest
from quamba.quantization.gptq import GptqConfig, accumulate_cross, accumulate_hessian, solve
from quamba.recipes.recipe import Solver


class _ReachedError(Exception):
    """Stops a forward pass at the projection whose input is wanted."""


class BlockSolver:
    """Quantizes projections one by one, in the order data meets them.

    For GPTQ it keeps the sum of residual and hidden of every calibration batch at the current block:
    the quantized stream, and with ``propagate_error`` the float one beside it.
    """

    def __init__(
        self, model: MambaLM, float_model: MambaLM | None, solver: Solver, calibration: Any | None
    ) -> None:
        self.model, self.float_model, self.solver = model, float_model, solver
        self.streams: list[Tensor] = []
        self.float_streams: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        if solver.kind == "gptq":
            if calibration is None:
                raise QuambaError("GPTQ needs calibration text; give some or use the solver 'rtn'.")
            self._start(calibration)

    def solve_projection(self, layer: int, name: str, format: WeightFormat) -> dict[str, Any]:
        """Quantize ``layers.{layer}.mixer.{name}`` in place; a line for the report."""
        linear: Linear = getattr(self.model.backbone.layers[layer].mixer, name)
        twin: Linear | None = None
        if self.float_model is not None:
            twin = getattr(self.float_model.backbone.layers[layer].mixer, name)
        return self._solve(f"layers.{layer}.mixer.{name}", linear, twin, format, layer)

    def solve_head(self, format: WeightFormat) -> dict[str, Any]:
        twin = None if self.float_model is None else self.float_model.lm_head
        return self._solve("lm_head", self.model.lm_head, twin, format, None)

    def advance(self, layer: int) -> None:
        """Move the streams through a block whose weights are all in place."""
        for model, streams in ((self.model, self.streams), (self.float_model, self.float_streams)):
            for b, stream in enumerate(streams):
                assert model is not None
                hidden, residual = model.backbone.layers[layer](stream, None, None, self.masks[b])
                streams[b] = residual + hidden

    def _start(self, calibration: Any) -> None:
        remaining = self.solver.samples
        for ids, mask in calibration.batches():
            if remaining is not None:
                ids, mask = ids[:remaining], None if mask is None else mask[:remaining]
                remaining -= ids.shape[0]
            if ids.shape[0] == 0:
                break
            ids = ids.to(self.model.device)
            self.masks.append(None if mask is None else mask.to(ids.device))
            self.streams.append(self.model.backbone.embedding(ids))
            if self.float_model is not None:
                self.float_streams.append(self.float_model.backbone.embedding(ids))

    def _solve(
        self, name: str, linear: Linear, twin: Linear | None, format: WeightFormat, layer: int | None
    ) -> dict[str, Any]:
        line = {"name": name, "bits": format.bits, "granularity": format.granularity}
        if self.solver.kind == "rtn":
            linear.set_weight(
                nearest(linear.weight, format, self.solver.scale if format.bits == 4 else "absmax")
            )
            return line
        hessian, cross = self._moments(linear, twin, layer)
        weight, losses = solve(linear.weight, hessian, format, solver_config(self.solver), cross=cross)
        linear.set_weight(weight)
        return {**line, "relative_loss_rtn": losses.rtn, "relative_loss": losses.gptq}

    def _moments(
        self, linear: Linear, twin: Linear | None, layer: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Second moments of the inputs, (K, K) float32, and their moments with the float model's inputs."""
        size = linear.in_features
        hessian = torch.zeros(size, size, device=self.model.device)
        cross = torch.zeros_like(hessian) if twin is not None else None
        count = cross_count = 0
        for b, mask in enumerate(self.masks):
            x = self._input(self.model, linear, layer, self.streams[b], mask)
            count = accumulate_hessian(hessian, _valid(x, mask), count)
            if cross is not None and twin is not None:
                x_float = self._input(self.float_model, twin, layer, self.float_streams[b], mask)
                if linear.input_scale_folded:  # in the units of the codes, as the weight is
                    x_float = x_float / self.model.backbone.layers[layer].mixer.conv1d.out_scale
                cross_count = accumulate_cross(cross, _valid(x_float, mask), _valid(x, mask), cross_count)
        return hessian, cross

    def _input(
        self, model: MambaLM | None, linear: Linear, layer: int | None, stream: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What ``linear`` multiplies its weight with, as floats: codes alone where it holds their scale."""
        assert model is not None
        seen: list[Activation] = []

        def stop(module: nn.Module, args: tuple[Activation, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        handle = linear.register_forward_pre_hook(stop)
        try:
            if layer is None:
                linear(model.backbone.norm_f(stream, None)[0])
            else:
                model.backbone.layers[layer](stream, None, None, mask)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        x = seen[0]
        return x.codes.float() if linear.input_scale_folded and isinstance(x, Quantized) else as_float(x)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x[mask]


def solver_config(solver: Solver) -> GptqConfig:
    return GptqConfig(
        damping=solver.damping, act_order=solver.act_order, scale=solver.scale, refinements=solver.refinements
    )
