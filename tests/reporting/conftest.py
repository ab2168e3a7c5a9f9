"""Runs as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, record) -> the path of NAME.json."""

    def put(name: str, record: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(record))
        return path

    return put
