"""Several processes that score candidates: one a GPU, or some on a CPU.

Each process reads the blocks from disk (on a CPU they are mapped, so memory holds them once) and builds the
objective for itself; only labels and scores pass between processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from quamba.errors import QuambaError
from quamba.search.score import Candidate, Labels, ScoreSome, portions, timed


class Setup(Protocol):
    """All that a process needs to score candidates on a device; goes to it whole."""

    def scoring(self, device: str) -> ScoreSome: ...


class Pool:
    """A ``score.Runner`` of one process for each of ``devices`` (which may name one several times).

    threads  of the CPU in each process
    """

    def __init__(self, setup: Setup, devices: Sequence[str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        places: Any = context.SimpleQueue()
        for device in devices:
            places.put(device)
        self._processes = len(devices)
        self._pool = ProcessPoolExecutor(len(devices), context, _begin, (setup, places, threads))

    def __call__(self, candidates: Sequence[Labels]) -> Iterator[Candidate]:
        try:
            for found in self._pool.map(_score, portions(candidates, self._processes)):
                yield from found
        except BrokenProcessPool:
            raise QuambaError(
                "A process that scores candidates came to an end, most likely for want of memory; expected"
                " fewer --processes. What was scored is kept."
            ) from None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


_scoring: ScoreSome | None = None


def _begin(setup: Setup, places: Any, threads: int) -> None:
    import torch

    global _scoring
    torch.set_num_threads(threads)
    _scoring = setup.scoring(places.get())


def _score(some: list[Labels]) -> list[Candidate]:
    assert _scoring is not None
    return timed(_scoring, some)
