"""CUDA graphs of a network: one launch for a step of decoding or a piece of a prompt instead of hundreds.

A graph reads and writes tensors at fixed addresses. Those of a network and batch size share their states and
memory (``BatchGraphs``), so only one prompt or answer uses them at a time (``lease``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.choice import Chooser
from quamba.runtime.sampling import Rules
from quamba.runtime.step import step_of

#: Runs before a capture: kernels are compiled and libraries choose their algorithms in them.
WARM_UP_STEPS = 2
WARM_UP_PIECES = 1
#: What is kept of a network, the least recently used goes: batch sizes, and graphs of each.
KEPT_BATCHES = 4
KEPT_PREFILL_GRAPHS = 8
KEPT_DECODE_GRAPHS = 4

_ATTRIBUTE = "_captured_graphs"

_K = TypeVar("_K")
_V = TypeVar("_V")


class Replayable(Protocol):
    def replay(self) -> None: ...


def has_graphs(network: MambaLM) -> bool:
    """Whether a network is on a GPU with kernels of its own; the reference ones wait for the device."""
    return network.device.type == "cuda" and network.kernels.name != "reference"


def graph_wanted(asked: bool | None, network: MambaLM) -> bool:
    """What a caller's ``cuda_graph`` comes to; None: wherever there are graphs."""
    if asked and network.device.type != "cuda":
        raise QuambaError(f"A CUDA graph needs a CUDA device, and the model is on '{network.device}'.")
    return has_graphs(network) if asked is None else asked


def capture(run: Callable[[], None], device: torch.device, *, warm_ups: int, pool: Any = None) -> Replayable:
    """``run`` as a graph. It is run ``warm_ups`` times first; the capture itself computes nothing.

    pool  memory shared with other graphs: what one leaves there holds until the next one is replayed
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool):
            run()
    return graph


class DecodeGraph:
    """The step of a batch, captured: reads ``ids``, advances ``cache``, writes ``logits``, and with a
    ``chooser`` the next ``ids``.

    ids     (B,) int64
    cache   states at the addresses that the graph knows; ``take`` copies others into them
    logits  (B, padded_vocab), overwritten by every step
    """

    logits: Tensor

    def __init__(
        self,
        network: MambaLM,
        batch: int,
        chooser: Chooser | None = None,
        *,
        cache: MambaCache | None = None,
        pool: Any = None,
    ) -> None:
        self.ids = torch.zeros(batch, dtype=torch.int64, device=network.device)
        self.cache = network.new_cache(batch) if cache is None else cache
        self.chooser = chooser
        with torch.inference_mode():
            self._step = step_of(network, self.cache)  # kept: it may own memory that the graph works on

        def run() -> None:
            self.logits = self._step(self.ids)
            if chooser is not None:
                self.ids.copy_(chooser.choose(self.logits))

        self._graph = capture(run, network.device, warm_ups=WARM_UP_STEPS, pool=pool)

    @torch.inference_mode()
    def take(self, cache: MambaCache) -> None:
        """Go on from these states."""
        if cache is not self.cache:
            self.cache.copy_(cache)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """ids (B,) int64 -> logits (B, padded_vocab), valid until a graph of this network is replayed."""
        self.ids.copy_(ids)
        self._graph.replay()
        return self.logits

    def advance(self) -> Tensor:
        """Read the ids that were chosen last and choose the next: (B,) int64, overwritten by every step."""
        assert self.chooser is not None
        self.chooser.prepare()
        self._graph.replay()
        return self.ids


class PrefillGraph:
    """A piece of ``length`` tokens of each row, captured: reads them and their mask, advances ``cache``."""

    logits: Tensor

    def __init__(
        self, network: MambaLM, batch: int, length: int, cache: MambaCache, *, pool: Any = None
    ) -> None:
        self.cache = cache
        self._ids = torch.zeros(batch, length, dtype=torch.int64, device=network.device)
        self._mask = torch.ones(batch, length, dtype=torch.bool, device=network.device)

        def run() -> None:
            self.logits = network(self._ids, cache, self._mask, last_only=True)[:, 0]

        self._graph = capture(run, network.device, warm_ups=WARM_UP_PIECES, pool=pool)

    @torch.inference_mode()
    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, length) -> logits (B, padded_vocab) after the last token, valid until a graph of
        this network is replayed."""
        self._ids.copy_(ids)
        self._mask.copy_(mask)
        self._graph.replay()
        return self.logits


class _Latest(Generic[_K, _V]):
    """The ``size`` values that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K) -> _V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: _K, value: _V) -> _V:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


class BatchGraphs:
    """The graphs of a network for one batch size.

    Knows no network, because networks know their graphs: whoever asks for a graph says of which it is.
    """

    def __init__(self, batch: int, pool: Any) -> None:
        self.batch = batch
        self.in_use = threading.Lock()
        self._pool = pool
        self._caches: dict[bool, MambaCache] = {}
        self._prefill: _Latest[tuple[int, bool], PrefillGraph] = _Latest(KEPT_PREFILL_GRAPHS)
        self._read: set[tuple[int, bool]] = set()
        self._decode: _Latest[tuple[int, Rules], DecodeGraph] = _Latest(KEPT_DECODE_GRAPHS)

    def cache(self, network: MambaLM, working: bool = False) -> MambaCache:
        """The states that the graphs work on: as they are stored, or floats between pieces of a prompt."""
        if working not in self._caches:
            self._caches[working] = network.new_cache(self.batch, working=working)
        return self._caches[working]

    def prefill(self, network: MambaLM, length: int, *, working: bool, now: bool) -> PrefillGraph | None:
        """The graph of a piece of ``length`` tokens: captured for the second prompt that asks for it, or for
        the first if ``now``; None before that.

        A capture takes the time of about three eager runs, which one prompt alone would wait for in vain. It
        overwrites the states.
        """
        key = length, working
        found = self._prefill.get(key)
        if found is None and (now or key in self._read):
            cache = self.cache(network, working)
            found = self._prefill.put(key, PrefillGraph(network, self.batch, length, cache, pool=self._pool))
        self._read.add(key)
        return found

    def decode(self, vocab: int, rules: Rules) -> DecodeGraph | None:
        """The graph of a step and the choice after it, if it is there."""
        return self._decode.get((vocab, rules))

    def capture_decode(self, network: MambaLM, vocab: int, rules: Rules) -> DecodeGraph:
        """Overwrites the states."""
        chooser = Chooser(self.batch, vocab, rules, network.device)
        graph = DecodeGraph(network, self.batch, chooser, cache=self.cache(network), pool=self._pool)
        return self._decode.put((vocab, rules), graph)


class _Captured:
    """All graphs of a network, in an attribute of it. Copies of the network begin with none."""

    def __init__(self, made_for: Any = None, pool: Any = None) -> None:
        self.made_for = made_for
        self.pool = pool
        self.batches: _Latest[int, BatchGraphs] = _Latest(KEPT_BATCHES)

    def __reduce__(self) -> tuple[type[_Captured], tuple[()]]:
        return _Captured, ()


@contextmanager
def lease(network: MambaLM, batch: int) -> Iterator[BatchGraphs | None]:
    """The graphs of a network and a batch size for this prompt or answer; None while another has them."""
    graphs = _graphs_of(network, batch)
    if not graphs.in_use.acquire(blocking=False):
        yield None
        return
    try:
        yield graphs
    finally:
        graphs.in_use.release()


def _graphs_of(network: MambaLM, batch: int) -> BatchGraphs:
    # A graph calls the kernels and reads the weights that were there when it was captured.
    made_for = network.kernels, network.device, network.lm_head.compute_dtype
    captured = network.__dict__.get(_ATTRIBUTE)
    if captured is None or captured.made_for != made_for:
        pool = torch.cuda.graph_pool_handle() if network.device.type == "cuda" else None
        captured = network.__dict__[_ATTRIBUTE] = _Captured(made_for, pool)
    found = captured.batches.get(batch)
    return found or captured.batches.put(batch, BatchGraphs(batch, captured.pool))
