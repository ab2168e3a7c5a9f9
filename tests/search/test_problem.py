"""What fits a budget: counts, limits, how many choices there are."""

from __future__ import annotations

import itertools

import pytest

from quamba.errors import QuambaError
from quamba.search.problem import Limit, Problem, change

LIMIT = Limit("weights", "bytes", 20.0, 3.0, ((1.0, 4.0, 6.0),) * 4)
PROBLEMS = {
    "one count": Problem(("A", "B"), 5, {1: 2}),
    "two counts": Problem(("A", "B", "C"), 5, {1: 2, 2: 1}),
    "limit": Problem(("A", "B", "C"), 4, {}, (LIMIT,)),
    "count and limit": Problem(("A", "B", "C"), 4, {1: 2}, (LIMIT,)),
}


def every(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(range(len(problem.labels)), repeat=problem.n_blocks))


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_are_those_that_fit(name: str) -> None:
    problem = PROBLEMS[name]
    found = list(problem.all())
    assert sorted(found) == [a for a in every(problem) if problem.fits(a)]
    assert len(found) == len(set(found)) > 0


@pytest.mark.parametrize(("name", "size"), [("one count", 10), ("two counts", 30), ("limit", 81)])
def test_size(name: str, size: int) -> None:
    problem = PROBLEMS[name]
    assert problem.size_at_most == size
    assert problem.limits or len(list(problem.all())) == size


def test_within_is_not_yet_fits() -> None:
    problem = PROBLEMS["one count"]
    assert problem.within((0, 1, 0, 0, 0)) and not problem.fits((0, 1, 0, 0, 0))
    assert problem.fits((1, 1, 0, 0, 0)) and not problem.within((1, 1, 1, 0, 0))


def test_a_limit_counts_what_is_outside_the_blocks() -> None:
    assert LIMIT.of((0, 1, 2, 0)) == 15.0
    problem = PROBLEMS["limit"]
    assert problem.fits((1, 1, 1, 1)) and not problem.fits((2, 2, 1, 1))


def test_names_and_change() -> None:
    assert PROBLEMS["two counts"].names((0, 2, 1, 0, 0)) == ["A", "C", "B", "A", "A"]
    assert change((0, 0, 0), 1, 2) == (0, 2, 0)


def test_more_blocks_than_the_model_has() -> None:
    with pytest.raises(QuambaError, match="asks for 6 blocks, but the model has 5"):
        Problem(("A", "B"), 5, {1: 6})


def test_a_label_without_a_budget() -> None:
    with pytest.raises(QuambaError, match="says nothing of C, expected a count such as 2xC"):
        Problem(("A", "B", "C"), 5, {1: 2})
