"""The methods on scores that are known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from quamba.errors import QuambaError
from quamba.search.methods.evolutionary import Evolutionary
from quamba.search.methods.method import sensitivities
from quamba.search.methods.registry import METHODS, method_of
from quamba.search.problem import Assignment, Limit, Problem


class Known:
    """Scores by a formula; remembers what was asked, each once."""

    def __init__(self, n: int, pair: float = 0.0, seed: int = 3) -> None:
        rng = random.Random(seed)
        self.gain = [[0.0, -rng.uniform(0.1, 1), -rng.uniform(0.5, 2)] for _ in range(n)]
        self.pair = pair
        self.asked: dict[Assignment, float] = {}

    def __call__(self, candidates: Sequence[Assignment]) -> list[float]:
        return [self.asked.setdefault(a, self.score(a)) for a in candidates]

    def score(self, a: Assignment) -> float:
        """Gains of single blocks, and of neighbours that are both changed."""
        single = sum(self.gain[i][p] for i, p in enumerate(a))
        return single - self.pair * sum(1 for p, q in itertools.pairwise(a) if p and q)


COST = tuple((1.0 + 0.1 * i, 2.0 + 0.2 * i, 4.0) for i in range(8))
COUNT = Problem(("A", "B"), 8, {1: 3})
COUNTS = Problem(("A", "B", "C"), 8, {1: 2, 2: 2})
LIMIT = Problem(("A", "B", "C"), 8, {}, (Limit("weights", "bytes", 19.0, 2.0, COST),))
BOTH = Problem(("A", "B", "C"), 8, {2: 2}, (Limit("tpot", "ms", 21.0, 2.0, COST),))
PROBLEMS = {"count": COUNT, "counts": COUNTS, "limit": LIMIT, "both": BOTH}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_choice_fits_and_was_scored(method: str, problem: Problem) -> None:
    score = Known(8, pair=0.3)
    chosen = method_of(method)(problem, score, random.Random(1))
    assert problem.fits(chosen)
    assert chosen in score.asked


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", ["integer", "exhaustive", "auto"])
def test_the_optimum_where_gains_add_up(method: str, problem: Problem) -> None:
    score = Known(8)
    chosen = method_of(method)(problem, score, random.Random(1))
    assert chosen == min(problem.all(), key=score.score)


@pytest.mark.parametrize("method", ["ranking", "greedy", "integer"])
def test_one_count_is_a_sort_where_gains_add_up(method: str) -> None:
    score = Known(8)
    order = sorted(range(8), key=lambda i: score.gain[i][1])
    chosen = method_of(method)(COUNT, score, random.Random(1))
    assert {i for i, p in enumerate(chosen) if p} == set(order[:3])


def test_greedy_sees_what_blocks_do_together() -> None:
    """Blocks 0 and 1 gain most alone and nothing together."""
    scores = {(1, 0, 0): -3.0, (0, 1, 0): -2.9, (0, 0, 1): -1.0, (0, 0, 0): 0.0, (1, 1, 0): -3.0}
    scores |= {(1, 0, 1): -4.0, (0, 1, 1): -3.9}
    problem = Problem(("A", "B"), 3, {1: 2})

    def score(candidates: Sequence[Assignment]) -> list[float]:
        return [scores[a] for a in candidates]

    assert METHODS["greedy"](problem, score, random.Random(1)) == (1, 0, 1)
    assert METHODS["ranking"](problem, score, random.Random(1)) == (1, 1, 0)


def test_sensitivities_change_one_block() -> None:
    score = Known(8, pair=5.0)
    table = sensitivities(COUNTS, score)
    assert len(score.asked) == 1 + 8 * 2
    for i, row in enumerate(table):
        assert row == pytest.approx(score.gain[i])


LARGE = Problem(("A", "B"), 56, {1: 14})


def test_the_papers_numbers() -> None:
    """40 candidates, then 20 in each of 5 generations, all of 14 blocks, none twice."""
    score = Known(56)
    sizes: list[int] = []

    def counted(candidates: Sequence[Assignment]) -> list[float]:
        sizes.append(sum(a not in score.asked for a in candidates))
        return score(candidates)

    chosen = Evolutionary()(LARGE, counted, random.Random(5))
    assert sizes == [40, 20, 20, 20, 20, 20]
    assert len(score.asked) == 140
    assert all(a.count(1) == 14 for a in score.asked)
    assert score.score(chosen) == min(score.asked.values())


def test_generations_help() -> None:
    first, last = Known(56), Known(56)
    Evolutionary(generations=0)(LARGE, first, random.Random(5))
    Evolutionary()(LARGE, last, random.Random(5))
    assert min(last.asked.values()) < min(first.asked.values())


@pytest.mark.parametrize("problem", [LARGE, LIMIT, BOTH], ids=["count", "limit", "both"])
def test_the_seed_reproduces_a_run(problem: Problem) -> None:
    runs = []
    for seed in (5, 5, 6):
        score = Known(problem.n_blocks)
        Evolutionary(population=20)(problem, score, random.Random(seed))
        runs.append(list(score.asked))
    assert runs[0] == runs[1] != runs[2]


def test_a_small_space_is_exhausted() -> None:
    """5 x 4 / 2 choices are fewer than the population."""
    problem, score = Problem(("A", "B"), 5, {1: 2}), Known(5, pair=1.0)
    chosen = Evolutionary()(problem, score, random.Random(1))
    assert set(score.asked) == set(problem.all())
    assert chosen == min(problem.all(), key=score.score)


def test_auto_is_never_worse_than_its_seeds() -> None:
    for pair in (0.0, 0.5):
        found = {}
        for name in ("auto", "ranking", "integer"):
            score = Known(56, pair=pair)
            found[name] = score.score(METHODS[name](LARGE, score, random.Random(2)))
        assert found["auto"] <= min(found.values())


def test_too_many_to_try_each() -> None:
    with pytest.raises(QuambaError, match="too many to try each; expected at most 20,000"):
        METHODS["exhaustive"](LARGE, Known(56), random.Random(1))


def test_an_unknown_method() -> None:
    with pytest.raises(QuambaError, match=r"The method is 'gredy', .* Did you mean 'greedy'"):
        method_of("gredy")
