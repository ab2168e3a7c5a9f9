"""A tiny model whose parts all have sizes of their own, and tokenizers for it."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

WORDS = ["sea", "ship", "storm", "harbour", "captain", "rope", "water", "wind"]


def sentencepiece_model(size: int) -> bytes:
    """A SentencePiece model of exactly so many pieces."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    lines = [" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(50)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=size,
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 61 ids."""
    file = tmp_path_factory.mktemp("vocabulary") / "mt_nlg.model"
    file.write_bytes(sentencepiece_model(61))
    return file
