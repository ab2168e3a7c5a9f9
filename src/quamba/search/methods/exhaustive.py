"""Every assignment there is, for small problems."""

from __future__ import annotations

import random

from quamba.errors import QuambaError
from quamba.search.methods.method import Score, best
from quamba.search.problem import Assignment, Problem

MOST = 20_000


def exhaustive(problem: Problem, score: Score, rng: random.Random) -> Assignment:
    if problem.size_at_most > MOST:
        raise QuambaError(
            f"There are up to {problem.size_at_most:,} choices, too many to try each; expected at most"
            f" {MOST:,}, or another --method."
        )
    return best(score, list(problem.all()))
