"""Calls that a model makes, to be tried with other launches: of single ops, and those of a fused step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from quamba.kernels.check import PoisonedAllocations
from quamba.kernels.registry import REFERENCE, Kernels
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.fused_step import MOST_SEQUENCES, FusedStep, fused_step
from quamba.tuning.calls import Call, difference, random_cache, recorded_calls
from quamba.tuning.step_reference import KNOWN, arguments_of, results_of, wanted_of

#: Rows up to which they are sequences of one token each; more are the tokens of one prompt.
MOST_DECODED = 64
#: What the ops of the launches of a fused step begin with.
STEP = "decode"
_MOST_COPIES = 512

#: What makes kernels take the launch that is tried.
Force = Callable[[], AbstractContextManager[Any]]


class Trial(Protocol):
    """One call.

    op  the name of the ``LaunchChoice`` it makes, or its first part
    """

    op: str
    device: torch.device

    def run(self) -> None:
        """Once, as it is."""

    def compile(self, force: Force) -> None:
        """Once under ``force``, whatever its inputs are."""

    def fault(self, force: Force) -> str | None:
        """What is wrong with the results under ``force``; None where the reference has the same."""

    def runs(self, force: Force) -> list[Callable[[], object]]:
        """To be timed in turn under ``force``. Each has weights and states of its own, so that they come from
        memory and not from the caches."""


def trials(network: MambaLM, rows: int, ops: Collection[str]) -> Iterator[Trial]:
    """Calls of these ops for so many rows, those of a step first.

    ops  "linear", "decode", ...
    """
    if STEP in ops and rows <= MOST_SEQUENCES:
        yield from _step_trials(network, rows)
    if set(ops) - {STEP}:
        batch, length = (rows, 1) if rows <= MOST_DECODED else (1, rows)
        for call in recorded_calls(network, batch, length):
            if call.op in ops:
                yield OpTrial(call, network.kernels)


class OpTrial:
    """A call of an op of ``Kernels``."""

    def __init__(self, call: Call, kernels: Kernels) -> None:
        self.op, self.device = call.op, call.device
        self._call, self._kernels = call, kernels
        self._copies: list[Call] = []

    def run(self) -> None:
        self._call.copy().outcome(self._kernels)

    def compile(self, force: Force) -> None:
        with force():
            self.run()

    def fault(self, force: Force) -> str | None:
        with force(), PoisonedAllocations():
            found = self._call.copy().outcome(self._kernels)
        return _first_fault(found, self._wanted)

    def runs(self, force: Force) -> list[Callable[[], object]]:
        if not self._copies:
            count = _count(self._call.rotated_bytes, self.device)
            self._copies = [self._call.copy() for _ in range(count)]
        return [copy.bound(self._kernels) for copy in self._copies]

    @functools.cached_property
    def _wanted(self) -> list[Tensor]:
        return self._call.copy().outcome(REFERENCE)


class StepTrial:
    """One launch of a fused step.

    Some buffers are as large as the launch wants them, so the step is made anew each time; the launches
    before it fill what it reads.
    """

    def __init__(self, network: MambaLM, cache: MambaCache, ids: Tensor, index: int, op: str) -> None:
        self.op, self.device = op, network.device
        self._network, self._cache, self._ids, self._index = network, cache, ids, index
        self._copies: list[Any] = []

    def run(self) -> None:
        self._launch(nullcontext)()

    def compile(self, force: Force) -> None:
        with force():
            self._step().launches[self._index]()

    def fault(self, force: Force) -> str | None:
        launch = self._launch(force)
        wanted = wanted_of(launch)
        for buffer in results_of(launch):
            buffer.fill_(math.nan if buffer.is_floating_point() else 90)
        with force():
            launch()
        return _first_fault([read() for read, _ in wanted], [value for _, value in wanted])

    def runs(self, force: Force) -> list[Callable[[], object]]:
        launch = self._launch(force)
        given = arguments_of(launch)
        name = "matrix" if "matrix" in given else "state"
        if name not in given:
            return [launch]
        if not self._copies:
            count = _count(sum(t.nbytes for t in _tensors(given[name])), self.device)
            self._copies = [_copied(given[name]) for _ in range(count)]
        return [functools.partial(launch.func, **given | {name: copy}) for copy in self._copies]

    def _launch(self, force: Force) -> functools.partial[None]:
        with force():
            step = self._step()
        step.embed(self._ids)
        for before in step.launches[: self._index]:
            before()
        launch = step.launches[self._index]
        assert isinstance(launch, functools.partial)
        return launch

    def _step(self) -> FusedStep:
        step = fused_step(self._network, self._cache.clone())
        assert isinstance(step, FusedStep)
        return step


@torch.inference_mode()
def _step_trials(network: MambaLM, batch: int) -> list[StepTrial]:
    cache = random_cache(network, batch)
    step = fused_step(network, cache.clone())
    if isinstance(step, str):
        return []
    ids = torch.randint(network.config.vocab_size, (batch,), device=network.device)
    names = [launch.func.__name__ for launch in step.launches if isinstance(launch, functools.partial)]
    assert len(names) == len(step.launches)
    return [
        StepTrial(network, cache, ids, i, f"{STEP}.{name}") for i, name in enumerate(names) if name in KNOWN
    ]


def _first_fault(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    return next((fault for pair in zip(found, wanted, strict=True) if (fault := difference(*pair))), None)


def _count(rotated_bytes: int, device: torch.device) -> int:
    """Copies that are three times the cache together, as far as the memory has room for them."""
    if device.type != "cuda" or rotated_bytes == 0:
        return 1
    wanted = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / rotated_bytes)
    room = torch.cuda.mem_get_info(device)[0] // 4 // rotated_bytes
    return max(1, min(wanted, room, _MOST_COPIES))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in (value.data, value.scale) if t is not None]


def _copied(value: Any) -> Any:
    """Of a state, or of the ``Matrix`` of a projection."""
    if isinstance(value, Tensor):
        return value.clone()
    scale = None if value.scale is None else value.scale.clone()
    return dataclasses.replace(value, data=value.data.clone(), scale=scale)
