"""Tests of Triton kernels, on a GPU if there is one (tests/conftest.py has what else they run on)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is missing: pip install triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
