"""Candidates are scored once and survive a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quamba.quantization.pipeline import Silent
from quamba.search.score import Candidate, CandidateStore, Labels, Scorer, here

A, B, C = ("W4A8", "W4A8"), ("W4A16", "W4A8"), ("W4A8", "W4A16")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.jsonl"
    store = CandidateStore(path)
    store.add(Candidate(A, 0.1 + 0.2, 1.5))
    store.add(Candidate(B, 2.0, 0.5))
    assert CandidateStore(path).all() == [Candidate(A, 0.1 + 0.2, 1.5), Candidate(B, 2.0, 0.5)]


def test_a_line_cut_off_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    store = CandidateStore(path)
    store.add(Candidate(A, 1.0, 1.0))
    whole = path.read_bytes()
    store.add(Candidate(B, 2.0, 1.0))
    path.write_bytes(path.read_bytes()[:-7])
    again = CandidateStore(path)
    assert again.all() == [Candidate(A, 1.0, 1.0)]
    assert path.read_bytes() == whole
    again.add(Candidate(C, 3.0, 1.0))
    assert [c.labels for c in CandidateStore(path).all()] == [A, C]


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    scored: list[Labels] = []

    def score(some: Sequence[Labels]) -> list[float]:
        scored.extend(some)
        return [10.0 * c.count("W4A16") + c.index("W4A8") for c in some]

    def scorer() -> Scorer:
        return Scorer(CandidateStore(tmp_path / "c.jsonl"), here(score), Silent())

    first = scorer()
    assert first([A, B, A]) == [0.0, 11.0, 0.0]
    assert first([B]) == [11.0]
    second = scorer()
    assert second([B, C]) == [11.0, 10.0]
    assert sorted(scored) == sorted([A, B, C])
    assert (list(first.asked), list(second.asked)) == ([A, B], [B, C])


def test_the_order_of_a_runner_does_not_matter(tmp_path: Path) -> None:
    def backwards(candidates: Sequence[Labels]) -> list[Candidate]:
        return [Candidate(c, float(c.count("W4A16")), 0.0) for c in reversed(candidates)]

    scorer = Scorer(CandidateStore(tmp_path / "c.jsonl"), backwards, Silent())
    assert scorer([B, A]) == [1.0, 0.0]
