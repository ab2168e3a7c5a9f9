"""Scores of candidates: computed once, kept on disk, by one process or several."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quamba.quantization.pipeline import Progress

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """score  what the objective says, smaller is better; seconds  that it took"""

    labels: Labels
    score: float
    seconds: float


class CandidateStore:
    """Candidates in a file of JSON lines, one written as soon as it is known.

    A line that a killed run left unfinished is cut off; nothing else is ever changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[Labels, Candidate] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                fields = json.loads(line)
                labels = tuple(fields["labels"])
                self._found[labels] = Candidate(labels, float(fields["score"]), float(fields["seconds"]))
                whole += len(line)
        if whole != self._path.stat().st_size:
            os.truncate(self._path, whole)

    def get(self, labels: Labels) -> Candidate | None:
        return self._found.get(labels)

    def all(self) -> list[Candidate]:
        return list(self._found.values())

    def add(self, candidate: Candidate) -> None:
        self._found[candidate.labels] = candidate
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"labels": list(candidate.labels), "score": candidate.score, "seconds": candidate.seconds}
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class Runner(Protocol):
    """Scores candidates in any order."""

    def __call__(self, candidates: Sequence[Labels]) -> Iterable[Candidate]: ...


#: Scores of candidates that are neighbours in order, and so begin with the same blocks.
ScoreSome = Callable[[Sequence[Labels]], list[float]]
#: Candidates that are scored together: what a kill can cost.
TOGETHER = 8


def here(score: ScoreSome) -> Runner:
    """Some after others, in this process."""

    def run(candidates: Sequence[Labels]) -> Iterator[Candidate]:
        for some in portions(candidates, 1):
            yield from timed(score, some)

    return run


def portions(candidates: Sequence[Labels], processes: int) -> list[list[Labels]]:
    """In order of their labels; small enough that each process has one."""
    ordered = sorted(candidates)
    size = max(1, min(TOGETHER, -(-len(ordered) // processes)))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def timed(score: ScoreSome, some: Sequence[Labels]) -> list[Candidate]:
    """With the seconds shared out evenly."""
    started = time.perf_counter()
    scores = score(some)
    seconds = (time.perf_counter() - started) / len(some)
    return [Candidate(labels, value, seconds) for labels, value in zip(some, scores, strict=True)]


class Scorer:
    """``scorer(candidates)`` gives their scores in order, and computes none twice.

    asked  every candidate this scorer was asked for, in order: what a method needed, kept from before or not
    """

    def __init__(self, store: CandidateStore, runner: Runner, progress: Progress) -> None:
        self._store, self._runner, self._progress = store, runner, progress
        self.asked: dict[Labels, Candidate] = {}

    def __call__(self, candidates: Sequence[Labels]) -> list[float]:
        missing = [c for c in dict.fromkeys(candidates) if self._store.get(c) is None]
        if missing:
            self._progress.stage("Candidates", len(missing))
        for found in self._runner(missing) if missing else ():
            self._store.add(found)
            self._progress.step()
        scores = []
        for labels in candidates:
            known = self._store.get(labels)
            assert known is not None, f"the runner left out {labels}"
            self.asked[labels] = known
            scores.append(known.score)
        return scores
