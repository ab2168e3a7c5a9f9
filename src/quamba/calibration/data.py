"""Calibration text: where it comes from, which pieces are taken, and in which batches.

One rule chooses everywhere. Every document (or window of a text file) draws a number from the seeded
generator, in file order, and the smallest numbers are taken, in their order. That is a shuffle of the whole
source cut after the first ``num``, at the memory of ``num`` documents.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from quamba.calibration.reading import TEXT_SUFFIX, iter_documents, read_text, resolve_source, source_name
from quamba.errors import QuambaError

MIN_DOCUMENT_TOKENS = 16

_Item = TypeVar("_Item")


class Tokenizer(Protocol):
    """What this file needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class CalibrationSpec:
    """Which calibration text to use and how much of it.

    data is a local path, a hub dataset ``OWNER/NAME[:CONFIG[:SPLIT]]``, or None for the Pile's validation
    file; num sequences of at most seqlen tokens are taken; batch_size changes the speed only, and a GPU with
    room for more takes more at once.
    """

    data: str | Path | None = None
    num: int = 512
    seqlen: int = 512
    batch_size: int = 8
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("num", "seqlen", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise QuambaError(f"The calibration {name} is {value!r}, expected an integer of at least 1.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise QuambaError(f"The calibration seed is {self.seed!r}, expected an integer of at least 0.")


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token sequences (int64, 1-D, CPU) in the order in which they were drawn, and what identifies them.

    fingerprint is a sha256 over the token ids, num, seqlen, seed and the tokenizer: not over the path or the
    batch size, so the same text under another name is the same calibration set.
    """

    sequences: list[Tensor]
    spec: CalibrationSpec
    source: str
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        return sum(len(s) for s in self.sequences)

    @property
    def description(self) -> str:
        return (
            f"{len(self.sequences)} samples of at most {self.spec.seqlen} tokens ({self.n_tokens:,} in all) "
            f"from {self.source}, seed {self.spec.seed}"
        )

    def batches(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields (ids [B, L] int64, mask [B, L] bool); mask is None where all lengths are L.

        Shorter sequences are padded on the left with id 0, where mask is False. Sequences go from the longest
        to the shortest, in drawn order within a length, so their order does not depend on the batch size.
        """
        size = batch_size or self.spec.batch_size
        ordered = sorted(self.sequences, key=len, reverse=True)
        for start in range(0, len(ordered), size):
            yield left_pad(ordered[start : start + size])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the quantization report."""
        return {
            "source": self.source,
            "num": len(self.sequences),
            "seqlen": self.spec.seqlen,
            "seed": self.spec.seed,
            "tokens": self.n_tokens,
            "fingerprint": self.fingerprint,
        }


def left_pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(ids [B, L] int64, mask [B, L] bool or None): L is the longest length, padding (id 0) on the left."""
    length = max(len(s) for s in sequences)
    if all(len(s) == length for s in sequences):
        return torch.stack(list(sequences)), None
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = True
    return ids, mask


def load_calibration(spec: CalibrationSpec, tokenizer: Tokenizer) -> CalibrationSet:
    """Reads, shuffles by the seed and tokenises the calibration text.

    A single .txt file is tokenised whole and cut into windows of exactly seqlen tokens without overlap
    (remainder dropped), of which num are drawn without replacement. Every other source is a stream of
    documents, each cut after seqlen tokens; documents of fewer than min(seqlen, 16) tokens are passed over.
    """
    path = resolve_source(spec.data)
    if isinstance(path, Path) and path.is_file() and path.suffix.lower() == TEXT_SUFFIX:
        drawn = _draw_windows(path, spec, tokenizer)
    else:
        drawn = _draw_documents(path, spec, tokenizer)
    sequences = [torch.tensor(ids, dtype=torch.int64) for ids in drawn]
    return CalibrationSet(sequences, spec, source_name(path), _fingerprint(sequences, spec, tokenizer))


def _draw_windows(path: Path, spec: CalibrationSpec, tokenizer: Tokenizer) -> list[list[int]]:
    ids = tokenizer.encode(read_text(path))
    available = len(ids) // spec.seqlen
    if available < spec.num:
        raise QuambaError(
            f"{path} has {len(ids)} tokens, which make {available} windows of {spec.seqlen}, "
            f"but {spec.num} calibration samples were asked for."
        )
    chosen, _ = _first_of_shuffle(range(available), spec.num, spec.seed)
    return [ids[i * spec.seqlen : (i + 1) * spec.seqlen] for i in chosen]


def _draw_documents(source: Path | str, spec: CalibrationSpec, tokenizer: Tokenizer) -> list[list[int]]:
    enough = min(spec.seqlen, MIN_DOCUMENT_TOKENS)
    candidates = 2 * spec.num + 64  # some are too short; if too many are, read again and keep more
    while True:
        texts, total = _first_of_shuffle(iter_documents(source), candidates, spec.seed)
        drawn: list[list[int]] = []
        for start in range(0, len(texts), 64):
            encoded = tokenizer.encode_batch(texts[start : start + 64])
            drawn += [ids[: spec.seqlen] for ids in encoded if len(ids) >= enough]
            if len(drawn) >= spec.num:
                return drawn[: spec.num]
        if total <= candidates:
            raise QuambaError(
                f"{source_name(source)} has {len(drawn)} documents of at least {enough} tokens, "
                f"but {spec.num} calibration samples were asked for."
            )
        candidates *= 4


def _first_of_shuffle(items: Iterable[_Item], count: int, seed: int) -> tuple[list[_Item], int]:
    """(the first count items of the shuffled items, how many items there were), in one pass.

    ``random.Random.random`` is the one stream that Python promises to keep the same between versions.
    """
    keys = random.Random(seed)
    total = 0

    def keyed() -> Iterator[tuple[float, int, _Item]]:
        nonlocal total
        for item in items:
            yield keys.random(), total, item
            total += 1

    smallest = heapq.nsmallest(count, keyed())
    return [item for _, _, item in smallest], total


def _fingerprint(sequences: Sequence[Tensor], spec: CalibrationSpec, tokenizer: Tokenizer) -> str:
    settings = {
        "num": spec.num,
        "seqlen": spec.seqlen,
        "seed": spec.seed,
        "tokenizer": tokenizer.fingerprint(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
