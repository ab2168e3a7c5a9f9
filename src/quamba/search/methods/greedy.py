"""Greedy: the one change of one block that helps most, again and again, on what is there by then."""

from __future__ import annotations

import random

from quamba.search.integer_program import solve, start
from quamba.search.methods.method import Score, best, sensitivities
from quamba.search.problem import Assignment, Problem, change


def greedy(problem: Problem, score: Score, rng: random.Random) -> Assignment:
    """Until the counts are reached, and under limits until nothing that fits helps."""
    chosen = begin = start(problem)
    while moves := _moves(problem, chosen, begin):
        step = best(score, moves)
        if problem.fits(chosen) and score([step])[0] >= score([chosen])[0]:
            break
        chosen = step
    if not problem.fits(chosen):
        found = solve(problem, sensitivities(problem, score))
        assert found is not None, "the budget was found to be feasible"
        chosen = found
    score([chosen])
    return chosen


def _moves(problem: Problem, chosen: Assignment, begin: Assignment) -> list[Assignment]:
    """One block that nothing was done to gets a label with a count, as long as there are any; then any."""
    open_counts = [label for label, count in problem.counts.items() if chosen.count(label) < count]
    labels = open_counts or (problem.free_labels if problem.limits else [])
    moves = [
        change(chosen, i, label)
        for i in range(problem.n_blocks)
        for label in labels
        if chosen[i] == begin[i] and label != chosen[i]
    ]
    return [move for move in moves if problem.within(move)]
