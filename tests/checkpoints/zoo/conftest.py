"""Fixtures of the tests of the published format."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo_fixtures import zoo_path


@pytest.fixture
def zoo_folder(request: pytest.FixtureRequest, repo_root: Path) -> Path:
    """The folder of a real file by its name (indirect parameter)."""
    name: str = request.param
    return zoo_path(repo_root, name)
