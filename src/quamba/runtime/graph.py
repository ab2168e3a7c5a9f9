"""Decoding as a CUDA graph: one launch a token instead of hundreds."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM

# Steps before the capture: kernels are compiled and libraries choose their algorithms in them.
WARM_UP_STEPS = 2


class DecodeGraph:
    """The step of a batch, captured: reads ``ids``, advances ``cache``, writes ``logits``.

    ids     (B,) int64
    cache   states at the addresses that the graph knows; ``take`` copies others into them
    logits  (B, padded_vocab), overwritten by every step
    """

    def __init__(self, network: MambaLM, batch: int) -> None:
        self.ids = torch.zeros(batch, dtype=torch.int64, device=network.device)
        self.cache = network.new_cache(batch)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(network.device), torch.inference_mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._step(network)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self.logits = self._step(network)

    def _step(self, network: MambaLM) -> Tensor:
        return network(self.ids[:, None], self.cache, last_only=True)[:, 0]

    def take(self, cache: MambaCache) -> None:
        """Go on from these states."""
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            mine.conv_state.copy_(theirs.conv_state)
            mine.ssm_state.copy_(theirs.ssm_state)

    def step(self, ids: Tensor) -> Tensor:
        """ids (B,) int64 -> logits (B, padded_vocab), valid until the next step."""
        self.ids.copy_(ids)
        self._graph.replay()
        return self.logits


_graphs: WeakKeyDictionary[MambaLM, dict[int, DecodeGraph]] = WeakKeyDictionary()


def decode_graph(network: MambaLM, batch: int) -> DecodeGraph:
    """The graph of a network and a batch size, captured when it is first asked for."""
    of_network = _graphs.setdefault(network, {})
    if batch not in of_network:
        of_network[batch] = DecodeGraph(network, batch)
    return of_network[batch]
