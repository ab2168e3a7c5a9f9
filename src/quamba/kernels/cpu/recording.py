"""The compiled ops of a piece of Python as one program: recorded once, then run by one call without Python.

Nothing runs while it is recorded. What torch computes then is computed once, so it may depend on weights and
sizes only, not on what the ops will give: a piece that does more with that than take views has no program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quamba.kernels.cpu import library
from quamba.kernels.cpu.library import Program

Result = TypeVar("Result")
_BUFFERS = (
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
)


class NotRecordableError(Exception):
    """Says what torch would have to compute in between."""


def record(piece: Callable[[], Result], inputs: Iterable[Tensor]) -> tuple[Program, Result]:
    """The program of all compiled ops that a call of ``piece`` runs, and what that returned, to be filled.

    inputs  tensors that change between runs of the program: read and written where they are now
    Raises NotRecordableError. The program holds its inputs and every tensor that was made on the way, but not
    the weights.
    """
    inputs = list(inputs)
    watch = _Watch(inputs)
    with library.recording() as ops, torch.inference_mode(), watch:
        result = piece()
    return Program(ops, (inputs, watch.made)), result


class _Watch(TorchDispatchMode):
    """Keeps what is made, and stops where torch computes with what programs write."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._written = {_storage(t) for t in inputs}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch imports its compiler, a second and 100 MB, to tell it not to look here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.made += made
        name = func.name().partition(".")[0]
        if name in _BUFFERS:
            self._written.update(_storage(t) for t in made)
            return result
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        views = bool(made) and all(_storage(t) in given for t in made) and not func._schema.is_mutable
        if not views and given & self._written:
            raise NotRecordableError(f"{name.removeprefix('aten::')} is computed by torch")
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
