"""What each result of a quantization depends on, as keys of a ``WorkFolder``.

A key names the float model, the batches, the fields of the plan that matter, and the keys of whatever comes
before. Two recipes share a result exactly where nothing before it tells them apart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quamba.calibration.collect import Batch
from quamba.quantization.work import key_of
from quamba.recipes.plan import Plan

# To be counted up when a stage computes something else than before.
_VERSION = 1


class Keys:
    """
    model       what identifies the float model
    device      kind of the device that computes: sums in another order are other sums
    statistics_batches, scales_batches, solver_batches, metric_batches
                what each stage reads; how sequences are put together counts too
    """

    def __init__(
        self,
        model: str,
        plan: Plan,
        device: torch.device,
        *,
        statistics_batches: Sequence[Batch],
        scales_batches: Sequence[Batch],
        solver_batches: Sequence[Batch],
        metric_batches: Sequence[Tensor],
    ) -> None:
        self._plan = plan
        self._base = key_of(_VERSION, model, device.type, plan.config.to_dict())
        self._statistics_text = _text(statistics_batches)
        self._scales_text = _text(scales_batches)
        self._solver_text = _text(solver_batches)
        self._metric_text = _text((ids, None) for ids in metric_batches)

    def statistics(self, i: int) -> str:
        """Channel means of block i."""
        return key_of(self._base, "statistics", self._statistics_text, self._plan.folds_norms, i)

    def scales(self, i: int) -> str:
        """``BlockScales`` of block i."""
        plan, block = self._plan, self._plan.blocks[i]
        own = [block.int8_activations, block.state, plan.alpha, plan.recipe.activation_scales]
        return key_of(self._base, "scales", self._scales_text, self._before(i + 1), self._states, own)

    def head_scale(self) -> str:
        before = self._before(len(self._plan.blocks))
        return key_of(self._base, "head scale", self._scales_text, before, self._states)

    def scales_stream(self, i: int) -> str:
        """Hidden states at the entrance of block i of the stage of activation scales."""
        return key_of(self._base, "scales stream", self._scales_text, self._before(i), self._states)

    def statistics_stream(self, i: int) -> str:
        return key_of(self.statistics(i), "stream")

    def metric(self) -> str:
        """The loss metric of the embedding."""
        plan = self._plan
        head = plan.recipe.parameters if plan.head is None else "float32"
        before = self._before(len(plan.blocks))
        return key_of(self._base, "metric", self._metric_text, before, plan.folds_norms, head)

    def embedding(self, slab: int) -> str:
        """Rows of the quantized table."""
        return key_of(self._table, slab)

    def weights(self, i: int) -> str:
        """The finished block i."""
        return key_of(self._finished(i + 1), "block")

    def weights_stream(self, i: int) -> str:
        return key_of(self._finished(i), self._float_before(i), "stream")

    def moments(self) -> str:
        """Moments of what the head reads."""
        layers = len(self._plan.blocks)
        scale = self.head_scale() if self._plan.int8_head_input else ""
        return key_of(self._finished(layers), self._float_before(layers), "head moments", scale)

    def head(self, slab: int) -> str:
        return key_of(self.moments(), _fields(self._plan.head), slab)

    @property
    def _states(self) -> bool:
        """Whether calibration carries states, as it does in all blocks if any block needs them."""
        return any(block.state == "int8" for block in self._plan.blocks)

    @functools.cached_property
    def _table(self) -> str:
        """What the quantized model's first block reads."""
        plan, solver = self._plan, dataclasses.asdict(self._plan.recipe.solver)
        if plan.embedding is None:
            return key_of(self._base, "table", plan.rotate, plan.recipe.parameters)
        metric = self.metric() if plan.recipe.solver.kind == "gptq" and plan.embedding.bits == 4 else ""
        return key_of(self._base, "table", plan.rotate, _fields(plan.embedding), solver, metric)

    @functools.cache  # noqa: B019 - one job long
    def _before(self, i: int) -> str:
        """The function of the blocks before i with rounded parameters, and of the embedding."""
        plan = self._plan
        if i == 0:
            table = plan.recipe.parameters if plan.embedding is None else "float32"
            return key_of("rounded", plan.rotate, plan.folds_norms, table)
        return key_of(self._before(i - 1), self._function(i - 1), self._rounding(i - 1))

    @functools.cache  # noqa: B019 - one job long
    def _float_before(self, i: int) -> str:
        plan = self._plan
        if i == 0:
            return key_of("float", plan.rotate, plan.folds_norms)
        return key_of(self._float_before(i - 1), self._function(i - 1))

    @functools.cache  # noqa: B019 - one job long
    def _finished(self, i: int) -> str:
        """The quantized blocks before i and all that made them."""
        solver = self._plan.recipe.solver
        if i == 0:
            table = self._table if solver.kind == "gptq" else ""  # rounding looks at no other weight
            return key_of(self._base, "finished", table, self._solver_text, dataclasses.asdict(solver))
        before = self._finished(i - 1) if solver.kind == "gptq" else self._finished(0)
        block = _fields(self._plan.blocks[i - 1])
        scales = self.scales(i - 1) if self._plan.needs_activation_scales else ""
        return key_of(before, i, block, self._function(i - 1), self._rounding(i - 1), scales)

    def _function(self, i: int) -> list[Any]:
        """What block i is rewritten to."""
        plan = self._plan
        groups = None if plan.group_heads is None else [self.statistics(i), _fields(plan.group_heads)]
        return [plan.rotate, plan.folds_norms, groups]

    def _rounding(self, i: int) -> Any:
        """What its small parameters are rounded to."""
        plan, block = self._plan, self._plan.blocks[i]
        if plan.recipe.parameters == "float32":
            return None
        conv = _fields(block.conv)
        return [plan.recipe.parameters, block.int8_parameters, sorted(block.weights), conv]


def _fields(value: Any) -> Any:
    return None if value is None else dataclasses.asdict(value)


def _text(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for ids, mask in batches:
        digest.update(f"{list(ids.shape)} {mask is None}".encode())
        digest.update(ids.cpu().contiguous().numpy().data)
        if mask is not None:
            digest.update(mask.cpu().contiguous().numpy().data)
    return digest.hexdigest()
