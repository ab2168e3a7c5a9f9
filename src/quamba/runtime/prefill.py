"""Reading prompts: in pieces of bounded memory, as CUDA graphs where Python would be slower than the GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.graph import BatchGraphs, PrefillGraph, graph_wanted, has_graphs, lease

#: Tokens of each prompt read at once: bounds the memory of a long prompt.
PREFILL_PIECE = 2048
#: Tokens of a batch from which on a GPU works longer than it takes Python to launch the work. Eagerly 8 x
#: 1,024 of a model of 130 M parameters took 17 ms in every precision.
GRAPH_TOKENS = 16384


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a prompt, and how many of padding before them."""

    start: int
    stop: int
    padding: int = 0

    @property
    def length(self) -> int:
        return self.padding + self.stop - self.start


def padded_length(length: int) -> int:
    """The next multiple of 64 up to 512, of 256 beyond: the lengths that graphs are captured of."""
    step = 64 if length <= 512 else 256
    return -(-length // step) * step


def cut(length: int, piece: int, *, padded: bool = False) -> list[Piece]:
    """A prompt as a first piece of 1 to ``piece`` tokens and full ones after it.

    padded  the first one is padded to one of the lengths that graphs are captured of
    """
    first = (length - 1) % piece + 1
    padding = min(padded_length(first), piece) - first if padded else 0
    full = [Piece(start, start + piece) for start in range(first, length, piece)]
    return [Piece(0, first, padding), *full]


@torch.inference_mode()
def prefill(
    network: MambaLM,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cache: MambaCache | None = None,
    piece: int | None = None,
    graph: bool | None = None,
    before_piece: Callable[[], None] | None = None,
) -> tuple[Tensor, MambaCache]:
    """Read prompts: ids (B, L) int64, L >= 1 -> logits (B, padded_vocab) after the last token, and a cache.

    mask          (B, L) bool, False at left padding, or None
    cache         the states to go on from, which are left as they are; None: nothing was read yet. With a
                  cache there is no padding.
    piece         tokens of a row read at once; None: PREFILL_PIECE
    graph         None: pieces are replayed as CUDA graphs where ``BatchGraphs.prefill`` has them, which are
                  captured at the second prompt of about the same length; True: captured at once, as a
                  benchmark needs it; False: none. The results are the same.
    before_piece  called before each piece; what it raises ends the reading

    Between pieces the states are floats and are rounded to the cache's format once, after the last one: the
    result is that of one pass to float rounding. Memory does not grow with the length but for ids and mask.
    """
    wanted = graph is not False and cache is None and graph_wanted(graph, network) and has_graphs(network)
    with lease(network, len(ids)) if wanted else nullcontext() as graphs:
        logits, states = read(
            network,
            ids,
            mask,
            cache=cache,
            piece=piece,
            graphs=graphs,
            now=bool(graph),
            before_piece=before_piece,
        )
        return (logits, states) if graphs is None else (logits.clone(), states.clone())


@torch.inference_mode()
def read(
    network: MambaLM,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cache: MambaCache | None = None,
    piece: int | None = None,
    graphs: BatchGraphs | None = None,
    now: bool = False,
    before_piece: Callable[[], None] | None = None,
) -> tuple[Tensor, MambaCache]:
    """``prefill`` for who holds the graphs of this batch size: logits and cache may be theirs, valid until
    the next replay. ``now``: capture at once.

    Where there could be graphs, prompts are padded for them with and without, so that both give the same.
    """
    batch, length = ids.shape
    pieces, padded = _pieces(network, batch, length, piece or PREFILL_PIECE, cache)
    several = len(pieces) > 1
    replays: dict[int, PrefillGraph | None] = {}
    if graphs is not None and padded:
        lengths = dict.fromkeys(part.length for part in pieces)
        replays = {n: graphs.prefill(network, n, working=several, now=now) for n in lengths}
    if graphs is not None and any(replays.values()):
        states = graphs.cache(network, several)
        states.reset()
    else:
        states = _first_states(network, batch, cache, several)
    if padded and mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    for part in pieces:
        if before_piece is not None:
            before_piece()
        ids_part, mask_part = _part(ids, part), None if mask is None else _part(mask, part)
        replay = replays.get(part.length)
        if replay is not None and mask_part is not None:
            logits = replay.read(ids_part, mask_part)
        else:
            logits = network(ids_part, states, mask_part, last_only=True)[:, 0]
    return logits, network.stored_cache(states) if several else states


def _pieces(
    network: MambaLM, batch: int, length: int, piece: int, cache: MambaCache | None
) -> tuple[list[Piece], bool]:
    """How a prompt is read, and whether as graphs read it: padded, and small enough for them to matter."""
    if cache is None and has_graphs(network):
        pieces = cut(length, piece, padded=True)
        if batch * pieces[-1].length <= GRAPH_TOKENS:  # no piece is longer
            return pieces, True
    return cut(length, piece), False


def _first_states(network: MambaLM, batch: int, cache: MambaCache | None, several: bool) -> MambaCache:
    if several:
        return network.new_cache(batch, working=True) if cache is None else network.working_cache(cache)
    return network.new_cache(batch) if cache is None else cache.clone()


def _part(t: Tensor, part: Piece) -> Tensor:
    """The tokens of a piece (B, length); padding is 0 or False."""
    return F.pad(t[:, part.start : part.stop], (part.padding, 0))
