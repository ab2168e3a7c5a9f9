"""Runs of ``quamba generate``: all rows in batches, what they took, and how much that varies."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quamba.cli.console import table

if TYPE_CHECKING:
    from quamba.runtime.generate import Generation

Prompt = str | list[int]


@dataclass(frozen=True)
class Timings:
    """Of all batches of a run together.

    prompt_tokens  read, padding not counted
    new_tokens     chosen, end-of-text tokens included
    first_tokens   of those, the ones that the prefill gave
    """

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    first_tokens: int

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one of each row; None where there are none."""
        count = self.new_tokens - self.first_tokens
        return count / self.decode_seconds if count and self.decode_seconds else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_s": self.prefill_rate,
            "decode_tokens_per_s": self.decode_rate,
        }


@dataclass(frozen=True)
class Results:
    """A generation for each row, and the time of all."""

    generations: list[Generation]
    timings: Timings


@dataclass(frozen=True)
class Rows:
    """prompts    one a row; the same prompt may be there several times
    at_once    rows of a batch
    seed       of the first batch; others have seeds made from it
    generate   (prompts, seed) -> their continuations
    """

    prompts: Sequence[Prompt]
    at_once: int
    seed: int
    generate: Callable[..., list[Generation]]

    def run(self) -> Results:
        generations: list[Generation] = []
        prefill = decode = 0.0
        new_tokens = 0
        for start in range(0, len(self.prompts), self.at_once):
            batch = self.generate(self.prompts[start : start + self.at_once], seed=_seed(self.seed, start))
            generations += batch
            prefill += batch[0].prefill_seconds
            decode += batch[0].decode_seconds
            new_tokens += batch[0].tokens
        read = sum(len(generation.prompt_ids) for generation in generations)
        return Results(generations, Timings(prefill, decode, read, new_tokens, len(generations)))


def benchmark(rows: Rows, repeats: int, warmups: int) -> dict[str, Any]:
    """Time the same run again and again; JSON-ready.

    warmups  untimed runs before, besides the one whose results were shown
    """
    for _ in range(warmups):
        rows.run()
    timings = [rows.run().timings for _ in range(repeats)]
    first = timings[0]
    decoded = [rate for t in timings if (rate := t.decode_rate) is not None]
    return {
        "repeats": repeats,
        "warmups": 1 + warmups,
        "prompt_tokens": first.prompt_tokens,
        "new_tokens": first.new_tokens,
        "total_ms": _spread([1e3 * t.seconds for t in timings]),
        "prefill_ms": _spread([1e3 * t.prefill_seconds for t in timings]),
        "decode_ms": _spread([1e3 * t.decode_seconds for t in timings]),
        "prefill_tokens_per_s": _spread([t.prefill_rate for t in timings]),
        "decode_tokens_per_s": _spread(decoded) if decoded else None,
    }


def benchmark_table(found: dict[str, Any]) -> str:
    """Median and spread of what ``benchmark`` gives."""
    rows = []
    for label, key, digits in (
        ("prefill, tokens/s", "prefill_tokens_per_s", 1),
        ("decode, tokens/s", "decode_tokens_per_s", 1),
        ("prefill, ms", "prefill_ms", 2),
        ("decode, ms", "decode_ms", 2),
        ("whole run, ms", "total_ms", 2),
    ):
        if found[key] is not None:
            values = (found[key][name] for name in ("median", "mean", "p5", "p95"))
            rows.append([label, *(f"{value:.{digits}f}" for value in values)])
    return table(("", "median", "mean", "p5", "p95"), rows)


def _spread(values: Sequence[float]) -> dict[str, float]:
    from quamba.profiling.latency import percentile

    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "p5": percentile(values, 5),
        "p95": percentile(values, 95),
    }


def _seed(seed: int, start: int) -> int:
    """Of the batch that begins at row ``start``: the user's for the first, unrelated ones after it."""
    if start == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:7], "big")
