"""Sensitivity ranking: blocks are changed one at a time, and those that help most are taken."""

from __future__ import annotations

import random

from quamba.search.integer_program import solve, start
from quamba.search.methods.method import Score, sensitivities
from quamba.search.problem import Assignment, Problem, change


def ranking(problem: Problem, score: Score, rng: random.Random) -> Assignment:
    """By counts: the blocks of largest gain. By limits: of largest gain for the share of the limits that they
    take, as long as one fits and gains anything."""
    gains = sensitivities(problem, score)
    chosen = begin = start(problem)
    steps = [
        (gains[i][label] / _share(problem, begin, i, label), i, label)
        for i in range(problem.n_blocks)
        for label in range(len(problem.labels))
        if label != begin[i]
    ]
    for gain, i, label in sorted(steps):
        wanted = label in problem.counts or gain < 0
        if wanted and chosen[i] == begin[i] and problem.within(change(chosen, i, label)):
            chosen = change(chosen, i, label)
    if not problem.fits(chosen):  # counts and limits that rule each other out on the way
        found = solve(problem, gains)
        assert found is not None, "the budget was found to be feasible"
        chosen = found
    score([chosen])
    return chosen


def _share(problem: Problem, begin: Assignment, block: int, label: int) -> float:
    """How much of the limits a change takes; 1 where there are none."""
    if not problem.limits:
        return 1.0
    shares = [(row.cost[block][label] - row.cost[block][begin[block]]) / row.most for row in problem.limits]
    return max(*shares, 1e-12)
