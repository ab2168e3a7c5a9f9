"""Is the calibration text part of the evaluation text? Then the perplexity would say too little.

Both tests look for runs of ``SPAN`` words or tokens that occur in both. The evaluation side is looked at
every ``STRIDE``, the calibration side everywhere, so any common run of SPAN + STRIDE - 1 is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quamba.calibration.data import CalibrationSet
from quamba.calibration.reading import DEFAULT_DATASET, iter_documents

SPAN = 64
STRIDE = 16


def texts_overlap(calibration: str | Path | None, evaluation: str | Path) -> str:
    """Why the two texts are not independent, or "": the same file, the same content, a shared long span.

    A shared span is a run of 64 words (letters, digits and underscores, case ignored; so markup and spacing
    do not hide it) found in both. The evaluation text is looked at every 16 words, the calibration text at
    every word, so any common run of 79 words is found. Names that are no local path are compared as names.
    """
    calibration = calibration or DEFAULT_DATASET
    a, b = Path(calibration).expanduser(), Path(evaluation).expanduser()
    if not (a.exists() and b.exists()):
        names = {str(n).replace(DEFAULT_DATASET, "pile") for n in (calibration, evaluation)}
        return f"both are {evaluation}" if len(names) == 1 else ""
    if a.samefile(b):
        return "they are the same file"
    if a.is_file() and b.is_file() and _file_hash(a) == _file_hash(b):
        return "the files have the same content"
    known = torch.cat([_window_hashes(_word_values(text))[::STRIDE] for text in iter_documents(b)])
    shared = sum(_count_known(known, _word_values(text)) for text in iter_documents(a))
    return f"they share passages of {SPAN} words or more" if shared else ""


def tokens_overlap(calibration: CalibrationSet, evaluation_ids: Tensor | Sequence[int]) -> str:
    """The same question for what was really drawn, with tokens for words."""
    known = _window_hashes(torch.as_tensor(evaluation_ids, dtype=torch.int64).flatten())[::STRIDE]
    hits = sum(_count_known(known, sequence) > 0 for sequence in calibration.sequences)
    total = len(calibration.sequences)
    return f"{hits} of {total} calibration samples are in the evaluation text" if hits else ""


def _word_values(text: str) -> Tensor:
    """int64 [words]; Python's string hash is good here as nothing of it leaves the process."""
    return torch.tensor([hash(word) for word in re.findall(r"\w+", text.lower())], dtype=torch.int64)


def _window_hashes(values: Tensor) -> Tensor:
    """int64 [n] -> int64 [n - 63]: a polynomial hash modulo 2^64 of every run of SPAN values."""
    count = max(len(values) - SPAN + 1, 0)
    hashes = torch.zeros(count, dtype=torch.int64)
    mixed = values * -7046029254386353131  # token ids are small: spread them over the 64 bits
    mixed = mixed ^ (mixed >> 29)
    for offset in range(SPAN):
        hashes = hashes * 6364136223846793005 + mixed[offset : offset + count]
    return hashes


def _count_known(known: Tensor, values: Tensor) -> int:
    return int(torch.isin(_window_hashes(values), known).sum())


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
