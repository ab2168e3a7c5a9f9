"""The integer program against trying every choice."""

from __future__ import annotations

import random

import pytest

from quamba.errors import QuambaError
from quamba.search.integer_program import check_feasible, solve, start
from quamba.search.problem import Limit, Problem


def random_problem(rng: random.Random, counts: dict[int, int], limits: int) -> Problem:
    rows = [tuple(tuple(rng.uniform(1, 5) for _ in range(3)) for _ in range(5)) for _ in range(limits)]
    found = tuple(Limit(f"l{k}", "ms", rng.uniform(14, 18), 1.0, cost) for k, cost in enumerate(rows))
    return Problem(("A", "B", "C"), 5, counts, found)


@pytest.mark.parametrize("limits", [0, 1, 2])
@pytest.mark.parametrize("counts", [{1: 2, 2: 1}, {1: 2}, {}], ids=["counts", "count", "no count"])
def test_the_optimum(counts: dict[int, int], limits: int) -> None:
    if not limits and len(counts) < 2:
        counts = {1: 2, 2: 2}
    rng = random.Random(7)
    for _ in range(10):
        problem = random_problem(rng, counts, limits)
        gain = [[rng.uniform(-1e-4, 1e-4) for _ in range(3)] for _ in range(5)]
        choices = list(problem.all())
        found = solve(problem, gain)
        if not choices:
            assert found is None
            continue
        assert found == min(choices, key=lambda a: sum(gain[i][p] for i, p in enumerate(a)))


COST = ((1.0, 4.0),) * 3


def test_what_cannot_be_kept() -> None:
    check_feasible(Problem(("A", "B"), 3, {}, (Limit("weights", "bytes", 5.0, 2.0, COST),)))
    with pytest.raises(QuambaError, match=r"No choice of A, B keeps .* weights is at least 5 bytes"):
        check_feasible(Problem(("A", "B"), 3, {}, (Limit("weights", "bytes", 4.9, 2.0, COST),)))
    with pytest.raises(QuambaError, match="weights is at least 8 bytes"):
        check_feasible(Problem(("A", "B"), 3, {1: 1}, (Limit("weights", "bytes", 7.0, 2.0, COST),)))


def test_where_methods_start() -> None:
    assert start(Problem(("A", "B"), 3, {1: 1})) == (0, 0, 0)
    cheap = Problem(("B", "A"), 3, {}, (Limit("tpot", "ms", 6.0, 0.0, ((4.0, 1.0),) * 3),))
    assert start(cheap) == (1, 1, 1)
