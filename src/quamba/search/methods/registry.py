"""The methods by name."""

from __future__ import annotations

import random

from quamba.errors import one_of
from quamba.search.methods.evolutionary import Evolutionary
from quamba.search.methods.exhaustive import exhaustive
from quamba.search.methods.greedy import greedy
from quamba.search.methods.integer import integer
from quamba.search.methods.method import Method, Score
from quamba.search.methods.ranking import ranking
from quamba.search.problem import Assignment, Problem

#: Up to so many choices, trying each costs no more than the evolutionary search (40 + 5 * 20 candidates).
SMALL = 140


def automatic(problem: Problem, score: Score, rng: random.Random) -> Assignment:
    """Every choice where they are few; else the evolutionary search, begun with what ranking and integer
    programming choose, so that it is never worse than they are."""
    if problem.size_at_most <= SMALL:
        return exhaustive(problem, score, rng)
    return Evolutionary(seeds=(ranking, integer))(problem, score, rng)


METHODS: dict[str, Method] = {
    "auto": automatic,
    "ranking": ranking,
    "greedy": greedy,
    "evolutionary": Evolutionary(),
    "integer": integer,
    "exhaustive": exhaustive,
}


def method_of(name: str) -> Method:
    if name not in METHODS:
        raise one_of("The method", name, METHODS)
    return METHODS[name]
