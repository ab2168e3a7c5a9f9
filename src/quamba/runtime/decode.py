"""Decoding: a step after the other, each ending in the choice of the next ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.choice import Choice, Chooser
from quamba.runtime.graph import BatchGraphs
from quamba.runtime.step import step_of

#: Steps that make up for the capture of a graph.
CAPTURE_STEPS = 4


@torch.inference_mode()
def decode_step(network: MambaLM, ids: Tensor, cache: MambaCache) -> Tensor:
    """One token of each sequence: ids (B,) int64 -> logits (B, padded_vocab). The cache is advanced."""
    return network(ids[:, None], cache, last_only=True)[:, 0]


def new_decoder(
    network: MambaLM,
    logits: Tensor,
    cache: MambaCache,
    choice: Choice,
    *,
    steps: int,
    graphs: BatchGraphs | None = None,
) -> EagerDecoder | GraphDecoder:
    """Decoding after a prompt: its logits (B, padded_vocab) and cache, which is advanced or copied.

    steps   that may follow: a graph that is not there yet is captured for more than a few
    graphs  None: eager. The ids are the same.
    """
    if graphs is not None and (
        steps > CAPTURE_STEPS or graphs.decode(choice.vocab, choice.params.rules) is not None
    ):
        return GraphDecoder(network, logits, cache, choice, graphs)
    return EagerDecoder(network, logits, cache, choice)


class EagerDecoder:
    """Asks for each id before the next step begins. The first ids are chosen from the prompt's logits.

    cache         has read all ids but the newest
    shares_cache  whether others will overwrite it
    """

    shares_cache = False

    @torch.inference_mode()
    def __init__(self, network: MambaLM, logits: Tensor, cache: MambaCache, choice: Choice) -> None:
        self.cache = cache
        self._network = network
        self._step: Callable[[Tensor], Tensor] | None = None  # bound to the cache when it is first wanted
        self._chooser = Chooser(len(logits), choice.vocab, choice.params.rules, network.device).begin(choice)
        self._ids = self._choose(logits)

    def tokens(self, ahead: bool = False) -> list[int]:
        """The newest id of each line of the batch; waits for the device."""
        return self._ids.tolist()

    @torch.inference_mode()
    def go_on(self) -> None:
        """Take one more step."""
        if self._step is None:
            self._step = step_of(self._network, self.cache)
        self._ids = self._choose(self._step(self._ids))

    @torch.inference_mode()
    def keep(self, lines: Sequence[int]) -> None:
        """Go on with these lines of the batch only."""
        kept = torch.tensor(lines, device=self._ids.device)
        self._ids, self.cache = self._ids[kept], self.cache.select(kept)
        self._step = None
        self._chooser.keep(lines)

    def _choose(self, logits: Tensor) -> Tensor:
        self._chooser.prepare()
        return self._chooser.choose(logits)


class GraphDecoder:
    """Steps as replays of one graph, at most one of them ahead of what was asked for.

    Meanwhile the ids before go to the host, so the device never waits for Python. Lines that have ended are
    computed along. A graph that is not there yet is captured with the first step, after the first ids.

    cache  of the graph, once there was a step
    """

    shares_cache = True

    @torch.inference_mode()
    def __init__(
        self, network: MambaLM, logits: Tensor, cache: MambaCache, choice: Choice, graphs: BatchGraphs
    ) -> None:
        vocab, rules = choice.vocab, choice.params.rules
        self.cache = cache
        self._network, self._graphs = network, graphs
        self._graph = graphs.decode(vocab, rules)
        if self._graph is not None and self._graph.chooser is not None:
            self._chooser = self._graph.chooser
        else:
            self._chooser = Chooser(graphs.batch, vocab, rules, network.device)
        self._chooser.begin(choice).prepare()
        self._ids = self._chooser.choose(logits)
        self._coming = deque([_Readback(self._ids)])
        if self._graph is not None:
            self._graph.ids.copy_(self._ids)
            self._graph.take(cache)
            self.cache = self._graph.cache

    def tokens(self, ahead: bool = False) -> list[int]:
        """The newest id of each line that was not asked for yet. With ``ahead`` the next step is under way
        before they are waited for."""
        if ahead and self._graph is not None:
            self._advance()
        return self._coming.popleft().tolist()

    def go_on(self) -> None:
        """Take one more step, unless it is under way."""
        if self._graph is None:
            self._capture()
        if not self._coming:
            self._advance()

    def _advance(self) -> None:
        assert self._graph is not None
        self._coming.append(_Readback(self._graph.advance()))

    @torch.inference_mode()
    def _capture(self) -> None:
        shared = self.cache is self._graphs.cache(self._network)
        cache = self.cache.clone() if shared else self.cache
        graph = self._graphs.capture_decode(self._network, self._chooser.vocab, self._chooser.rules)
        assert graph.chooser is not None
        graph.chooser.take(self._chooser)
        graph.ids.copy_(self._ids)
        graph.take(cache)
        self._graph, self._chooser, self.cache = graph, graph.chooser, graph.cache


class _Readback:
    """Ids (B,) on their way to the host; the tensor may be overwritten by what is launched later."""

    def __init__(self, ids: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if ids.device.type == "cuda":
            self._ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(ids.device))
        else:
            self._ids = ids.clone()

    def tolist(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._ids.tolist()
