"""What may be chosen: precisions of blocks under a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quamba.errors import QuambaError

#: The precision of every block, as indices into ``Problem.labels``.
Assignment = tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """A cost that adds up over blocks: fixed + sum over i of cost[i][precision of block i] <= most.

    name   "weights", "tpot" or "ttft"
    unit   of ``most``, ``fixed`` and ``cost``: "bytes" or "ms"
    fixed  what is outside the blocks
    """

    name: str
    unit: str
    most: float
    fixed: float
    cost: tuple[tuple[float, ...], ...]

    def of(self, assignment: Assignment) -> float:
        return self.fixed + sum(row[label] for row, label in zip(self.cost, assignment, strict=True))

    def allows(self, assignment: Assignment) -> bool:
        return self.of(assignment) <= self.most * (1 + 1e-9)  # a sum of floats may miss its own limit


@dataclass(frozen=True)
class Problem:
    """
    labels   "W4A8" and the like; the first is that of blocks which nothing is said about
    n_blocks of the model
    counts   index of a label -> how many blocks have it, exactly; labels not named here are limited by
             ``limits`` alone
    """

    labels: tuple[str, ...]
    n_blocks: int
    counts: Mapping[int, int] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        total = sum(self.counts.values())
        if total > self.n_blocks:
            raise QuambaError(
                f"The budget asks for {total} blocks, but the model has {self.n_blocks}; expected at most"
                f" {self.n_blocks}."
            )
        for i, label in enumerate(self.labels[1:], 1):
            if i not in self.counts and not self.limits:
                raise QuambaError(
                    f"The budget says nothing of {label}, expected a count such as 2x{label}, or weights=,"
                    " tpot= or ttft=."
                )

    @property
    def free_labels(self) -> list[int]:
        """Those that may be given to any number of blocks."""
        return [i for i in range(len(self.labels)) if i not in self.counts]

    def names(self, assignment: Assignment) -> list[str]:
        return [self.labels[i] for i in assignment]

    def within(self, assignment: Assignment) -> bool:
        """No limit and no count is exceeded; counts may not be reached yet."""
        over = any(assignment.count(label) > count for label, count in self.counts.items())
        return not over and all(limit.allows(assignment) for limit in self.limits)

    def fits(self, assignment: Assignment) -> bool:
        exact = all(assignment.count(label) == count for label, count in self.counts.items())
        return exact and all(limit.allows(assignment) for limit in self.limits)

    @property
    def size_at_most(self) -> int:
        """How many assignments have the counts; exact where there are no limits."""
        left, ways = self.n_blocks, 1
        for count in self.counts.values():
            ways *= math.comb(left, count)
            left -= count
        return ways * len(self.free_labels) ** left if self.free_labels else ways * (left == 0)

    def all(self) -> Iterator[Assignment]:
        """Every assignment that fits, in one order."""
        return (a for a in self._with_counts(list(self.counts.items()), range(self.n_blocks)) if self.fits(a))

    def _with_counts(self, counts: list[tuple[int, int]], left: Sequence[int]) -> Iterator[Assignment]:
        if not counts:
            for labels in itertools.product(self.free_labels, repeat=len(left)):
                chosen = dict(zip(left, labels, strict=True))
                yield tuple(chosen.get(i, -1) for i in range(self.n_blocks))
            return
        (label, count), *others = counts
        for blocks in itertools.combinations(left, count):
            rest = [i for i in left if i not in blocks]
            for partial in self._with_counts(others, rest):
                yield tuple(label if i in blocks else partial[i] for i in range(self.n_blocks))


def change(assignment: Assignment, block: int, label: int) -> Assignment:
    return (*assignment[:block], label, *assignment[block + 1 :])
