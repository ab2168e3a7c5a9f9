"""Integer programming: the best choice there is, if the gains of single blocks added up."""

from __future__ import annotations

import random

from quamba.search.integer_program import solve
from quamba.search.methods.method import Score, sensitivities
from quamba.search.problem import Assignment, Problem


def integer(problem: Problem, score: Score, rng: random.Random) -> Assignment:
    chosen = solve(problem, sensitivities(problem, score))
    assert chosen is not None, "the budget was found to be feasible"
    score([chosen])
    return chosen
