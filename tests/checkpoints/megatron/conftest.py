"""A tokenizer for the tiny models of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_fixtures import sentencepiece_model


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 61 ids."""
    file = tmp_path_factory.mktemp("vocabulary") / "mt_nlg.model"
    file.write_bytes(sentencepiece_model(61))
    return file
