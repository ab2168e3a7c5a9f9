"""The evolutionary search of Quamba2: a population, of which the better half is kept and varied.

Chiang et al. 2025 give its numbers: 40 candidates, 5 generations, 10 mutations and 10 crossovers in each, the
share of 16-bit blocks fixed. What follows is ours, since they published no more: a mutation exchanges the
precisions of two blocks, a crossover takes each block from one of two parents and then mends the counts, and
no candidate is tried twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quamba.search.integer_program import solve, start
from quamba.search.methods.method import Score
from quamba.search.problem import Assignment, Problem, change

#: Attempts at a candidate that is new; then the space counts as exhausted.
_ATTEMPTS = 500


@dataclass(frozen=True)
class Evolutionary:
    """A ``Method``. seeds: methods whose choices are in the first population."""

    population: int = 40
    generations: int = 5
    mutations: int = 10
    crossovers: int = 10
    seeds: Sequence[Callable[[Problem, Score, random.Random], Assignment]] = ()

    def __call__(self, problem: Problem, score: Score, rng: random.Random) -> Assignment:
        known: dict[Assignment, None] = {}
        for seed in self.seeds:
            known[seed(problem, score, rng)] = None
        if problem.size_at_most <= self.population:
            alive = [*known, *(a for a in problem.all() if a not in known)]
        else:
            alive = [
                *known,
                *_new(lambda: _random(problem, rng), self.population - len(known), problem, known),
            ]
        alive = _sorted(score, alive)
        tried = dict.fromkeys(alive)
        for _ in range(self.generations):
            parents = alive[: max(1, (self.population + 1) // 2)]
            children = _new(
                lambda parents=parents: _mutant(problem, rng.choice(parents), rng),  # type: ignore[misc]
                self.mutations,
                problem,
                tried,
            )
            children += _new(
                lambda parents=parents: _child(problem, rng.choice(parents), rng.choice(parents), rng),  # type: ignore[misc]
                self.crossovers,
                problem,
                tried,
            )
            if not children:
                break
            alive = _sorted(score, [*parents, *children])
        return alive[0]


def _sorted(score: Score, candidates: list[Assignment]) -> list[Assignment]:
    """From the best on; earlier candidates before later ones of the same score."""
    scores = score(candidates)
    return [a for _, _, a in sorted(zip(scores, range(len(candidates)), candidates, strict=True))]


def _new(
    draw: Callable[[], Assignment], count: int, problem: Problem, tried: dict[Assignment, None]
) -> list[Assignment]:
    """Up to so many that fit and are not tried yet; they are noted in ``tried``."""
    found: list[Assignment] = []
    for _ in range(_ATTEMPTS * count):
        if len(found) == count or (problem.size_at_most <= len(tried)):
            break
        candidate = draw()
        if candidate not in tried and problem.fits(candidate):
            tried[candidate] = None
            found.append(candidate)
    return found


def _random(problem: Problem, rng: random.Random) -> Assignment:
    """Blocks for the counts first, then any label that the limits allow."""
    chosen = start(problem)
    order = rng.sample(range(problem.n_blocks), problem.n_blocks)
    for label, count in problem.counts.items():
        for _ in range(count):
            chosen = change(chosen, order.pop(), label)
    free = problem.free_labels if problem.limits else []
    for i in order:
        if free:
            changed = change(chosen, i, rng.choice(free))
            chosen = changed if problem.within(changed) else chosen
    return chosen if problem.fits(chosen) else _mended(problem, chosen, rng)


def _mutant(problem: Problem, parent: Assignment, rng: random.Random) -> Assignment:
    """Two blocks of different precision exchange it; under limits, or one block gets another."""
    free = problem.free_labels
    if problem.limits and free and rng.random() < 0.5:
        changeable = [i for i, label in enumerate(parent) if label in free]
        if changeable:
            return _mended(problem, change(parent, rng.choice(changeable), rng.choice(free)), rng)
    one = rng.randrange(problem.n_blocks)
    others = [i for i, label in enumerate(parent) if label != parent[one]]
    if not others:
        return parent
    other = rng.choice(others)
    return _mended(problem, change(change(parent, one, parent[other]), other, parent[one]), rng)


def _child(problem: Problem, one: Assignment, other: Assignment, rng: random.Random) -> Assignment:
    mixed = tuple(a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True))
    return _mended(problem, mixed, rng)


def _mended(problem: Problem, candidate: Assignment, rng: random.Random) -> Assignment:
    """Counts put right at random blocks, then random ones back to what costs least until the limits hold."""
    begin = start(problem)
    for label, count in problem.counts.items():
        while candidate.count(label) > count:
            i = rng.choice([i for i, own in enumerate(candidate) if own == label])
            candidate = change(candidate, i, begin[i] if begin[i] in problem.free_labels else 0)
    for label, count in problem.counts.items():
        while candidate.count(label) < count:
            spare = [i for i, own in enumerate(candidate) if own in problem.free_labels]
            candidate = change(candidate, rng.choice(spare), label)
    while not all(limit.allows(candidate) for limit in problem.limits):
        costly = [i for i, own in enumerate(candidate) if own in problem.free_labels and own != begin[i]]
        if not costly:
            return solve(problem, [[rng.random() for _ in problem.labels] for _ in candidate]) or candidate
        i = rng.choice(costly)
        candidate = change(candidate, i, begin[i])
    return candidate
