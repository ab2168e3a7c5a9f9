"""Real files of the published format: two lie in tests/data, three beside the project where there are any."""

from __future__ import annotations

from pathlib import Path

import pytest

BUNDLED = ("quamba2-demo2-w4a8", "quamba2-demo2-w4a16")
FIXTURES = (*BUNDLED, "quamba2-demo2-w8a8", "quamba-demo2-w8a8", "quamba-demo2-w4a8")


def zoo_path(repo_root: Path, name: str) -> Path:
    if name in BUNDLED:
        return repo_root / "tests" / "data" / "zoo" / name
    folder = repo_root.parent / "shared" / "zoo" / name
    if not folder.is_dir():
        pytest.skip(f"the file {name} is not in the repository; it lies in ../shared/zoo where there is one")
    return folder
