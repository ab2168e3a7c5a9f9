"""CUDA graphs on a CPU: what ``capture`` gives, as a recording of tensor operations that is run again.

As with the real ones, Python runs once, at the capture; a replay reads and writes the same memory as then; an
operation that waits for the device cannot be captured; and what a graph gave is gone when another one that
shares its memory is replayed (floats become NaN then).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quamba.profiling import latency, profile
from quamba.runtime import conversation, generate, graph, prefill


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device; it cannot be captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors_in(result)))
        return result


class EmulatedGraph:
    """``made``: tensors that came to be in the capture, in the memory that graphs share."""

    def __init__(self, run: Callable[[], None], graphs: Graphs) -> None:
        with torch.inference_mode(), _Recorder() as recorder:
            run()
        self._calls, self._graphs = recorder.calls, graphs
        self.made: list[Tensor] = []
        known: set[int] = set()
        for _, args, kwargs, results in self._calls:
            known |= {_storage(t) for t in tensors_in((args, kwargs))}
            self.made += [t for t in results if _storage(t) not in known]
            known |= {_storage(t) for t in results}

    @torch.inference_mode()
    def replay(self) -> None:
        self._graphs.replayed.append(self)
        for other in self._graphs.captured:
            for t in other.made:
                if other is not self and t.is_floating_point():
                    t.fill_(float("nan"))
        for func, args, kwargs, results in self._calls:
            for kept, new in zip(results, tensors_in(func(*args, **kwargs)), strict=True):
                if new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Graphs:
    """captured: all graphs so far; replayed: one entry for each replay."""

    def __init__(self) -> None:
        self.captured: list[EmulatedGraph] = []
        self.replayed: list[EmulatedGraph] = []

    def capture(
        self, run: Callable[[], None], device: torch.device, *, warm_ups: int, pool: Any = None
    ) -> EmulatedGraph:
        with torch.inference_mode():
            for _ in range(warm_ups):
                run()
        self.captured.append(EmulatedGraph(run, self))
        return self.captured[-1]


def emulate_graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """From now on networks on the CPU have graphs, and they are wanted unless a caller says no."""
    graphs = Graphs()
    monkeypatch.setattr(graph, "capture", graphs.capture)
    for module in (graph, prefill):
        monkeypatch.setattr(module, "has_graphs", lambda network: True)
    for module in (graph, prefill, generate, conversation, latency, profile):
        monkeypatch.setattr(module, "graph_wanted", lambda asked, network: asked is not False)
    return graphs
