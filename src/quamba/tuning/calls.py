"""The calls that a network makes of its kernels: what they move, compute and give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quamba.formats.activation import Quantized, shape_of
from quamba.formats.hadamard import hadamard_factors
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.registry import REFERENCE, Kernels
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.profiling.size import leaves

OPS = tuple(f.name for f in dataclasses.fields(Kernels) if f.name != "name")
#: Where an op takes its weight: the argument that is read from memory on every call.
_WEIGHT = {"linear": 1, "causal_conv1d": 1}
# What the gate allows. Floats are float16 and their sums in another order; codes move where they meet a tie.
_RELATIVE_NORM = 1e-3
_RELATIVE_MAXIMUM = 2e-2
_MOVED_CODES = 0.01


@dataclass
class Call:
    """One call of an op, with its tensors as they were before it.

    leaf  last part of the name of the leaf that makes it
    """

    op: str
    leaf: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...] = field(default=())

    def copy(self) -> Call:
        """With a weight and a state of its own, other tensors shared."""
        args = tuple(_copied(a) if i == _WEIGHT.get(self.op) else a for i, a in enumerate(self.args))
        kwargs = {name: _copied(value) if name == "state" else value for name, value in self.kwargs.items()}
        return Call(self.op, self.leaf, args, kwargs, self.results)

    def bound(self, kernels: Kernels) -> Callable[[], object]:
        function = getattr(kernels, self.op)
        return lambda: function(*self.args, **self.kwargs)

    def outcome(self, kernels: Kernels) -> list[Tensor]:
        """What the op returns, and the state it leaves."""
        state = self.kwargs.get("state")
        return [*_flat(self.bound(kernels)()), *([] if state is None else [state])]

    @property
    def device(self) -> torch.device:
        return next(t.device for value in self.args for t in _flat(value))

    @property
    def signature(self) -> tuple[Any, ...]:
        """Op, leaf, and shapes, dtypes and values of what it is called with."""
        values = [*self.args, *(self.kwargs[name] for name in sorted(self.kwargs))]
        return (self.op, self.leaf, *(_described(value) for value in values))

    @property
    def rotated_bytes(self) -> int:
        weight = self.args[_WEIGHT[self.op]] if self.op in _WEIGHT else None
        return sum(t.nbytes for value in (weight, self.kwargs.get("state")) for t in _flat(value))

    @property
    def moved_bytes(self) -> int:
        """Inputs and results once, the state twice; of an embedding table the rows looked up."""
        values = [*self.args, *self.kwargs.values()]
        total = sum(t.nbytes for value in values for t in _flat(value))
        if self.op == "embedding":
            ids, table = self.args[:2]
            whole = sum(t.nbytes for t in _flat(table))
            total += ids.numel() * whole // table.shape[0] - whole
        state = self.kwargs.get("state")
        return total + sum(t.nbytes for t in self.results) + (0 if state is None else state.nbytes)

    @property
    def operations(self) -> int | None:
        """Additions and multiplications of the definition; None for ops that are hardly any arithmetic."""
        x = shape_of(self.args[0])
        if self.op == "linear":
            return 2 * math.prod(x) * self.args[1].shape[0]
        if self.op == "causal_conv1d":
            return 2 * math.prod(x) * self.args[1].shape[1]
        if "hadamard" in self.op:
            m, k = hadamard_factors(x[-1])
            return math.prod(x) * (m + k)
        if self.op.startswith(("ssd", "selective_scan")):
            elements = self.kwargs["state"][0].numel() * math.prod(x[:-1])
            return elements * (5 if self.op.startswith("ssd") else 7)
        return None


@torch.inference_mode()
def recorded_calls(network: MambaLM, batch: int, length: int) -> list[Call]:
    """Those of reading ``length`` more tokens of ``batch`` sequences, in order, computed by the reference."""
    calls: list[Call] = []
    before = network.kernels
    ids = torch.randint(network.config.vocab_size, (batch, length), device=network.device)
    try:
        for name, leaf in leaves(network).items():
            leaf.kernels = _recording(name.rsplit(".", 1)[-1], calls)
        network(ids, random_cache(network, batch), last_only=True)
    finally:
        network.use_kernels(before)
    return calls


def random_cache(network: MambaLM, batch: int) -> MambaCache:
    """States that are not zero, or no op would be tested on them."""
    cache = network.new_cache(batch)
    for layer in cache.layers:
        for state in (layer.conv_state, layer.ssm_state):
            if state.is_floating_point():
                state.normal_()
            else:
                state.random_(-127, 128)
    return cache


def _recording(leaf: str, calls: list[Call]) -> Kernels:
    def recorded(op: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            call = Call(op, leaf, args, {n: _copied(v) if n == "state" else v for n, v in kwargs.items()})
            result = getattr(REFERENCE, op)(*args, **kwargs)
            call.results = tuple(_flat(result))
            calls.append(call)
            return result

        return function

    return Kernels(name="recording", **{op: recorded(op) for op in OPS})


def difference(found: Tensor, expected: Tensor) -> str | None:
    """None where they differ by rounding alone, else a few words."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {list(found.shape)} for {expected.dtype} {list(expected.shape)}"
    if found.dtype == torch.int8:
        apart = (found.int() - expected.int()).abs()
        moved, most = float((apart > 0).float().mean()), int(apart.max())
        return (
            f"{moved:.2%} of the codes differ, by up to {most}" if most > 1 or moved > _MOVED_CODES else None
        )
    a, b = found.double(), expected.double()
    norm = float((a - b).norm() / b.norm().clamp(min=1e-30))
    worst = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    if norm <= _RELATIVE_NORM and worst <= _RELATIVE_MAXIMUM:
        return None
    return f"relative difference {norm:.1e} of the norm, {worst:.1e} of the largest"


def _flat(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, QuantizedWeight):
        return list(value.buffers())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for part in value for tensor in _flat(part)]
    return []


def _copied(value: Any) -> Any:
    """Tensors with the strides they have."""
    if isinstance(value, Tensor):
        own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return own.copy_(value)
    if isinstance(value, QuantizedWeight):
        row = value.channel_scale
        return QuantizedWeight(
            value.data.clone(), value.scale.clone(), value.format, None if row is None else row.clone()
        )
    return value


def _described(value: Any) -> object:
    if isinstance(value, Tensor | Quantized | QuantizedWeight):
        return tuple((t.dtype, tuple(t.shape), _strides(t)) for t in _flat(value))
    return str(value)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """0 for dimensions of one element, where they mean nothing."""
    return tuple(step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
