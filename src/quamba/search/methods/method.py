"""What a method of search is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from quamba.search.integer_program import start
from quamba.search.problem import Assignment, Problem, change

#: Scores of assignments, in their order; smaller is better. The same one asked again costs nothing.
Score = Callable[[Sequence[Assignment]], list[float]]


class Method(Protocol):
    """Chooses an assignment that fits the problem, by asking for scores; all chance comes from ``rng``."""

    def __call__(self, problem: Problem, score: Score, rng: random.Random) -> Assignment: ...


def best(score: Score, candidates: Sequence[Assignment]) -> Assignment:
    """The first of those with the least score."""
    scores = score(candidates)
    return candidates[scores.index(min(scores))]


def sensitivities(problem: Problem, score: Score) -> list[list[float]]:
    """[block][label]: what the score changes by where that block alone is changed, from ``start``.

    All labels of all blocks, those that the budget would not allow too: one block says nothing of it.
    """
    begin = start(problem)
    labels = range(len(problem.labels))
    changed = [[change(begin, i, label) for label in labels] for i in range(problem.n_blocks)]
    flat = score([begin, *(a for row in changed for a in row)])
    least, scores = flat[0], iter(flat[1:])
    return [[next(scores) - least for _ in row] for row in changed]
