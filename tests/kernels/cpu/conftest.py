"""Tests of the compiled kernels: every instruction set of this machine, one thread and two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quamba.kernels.cpu import library

_MISSING = not library.available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _MISSING:
        skip = pytest.mark.skip(reason=f"the CPU kernels cannot be used: {library.load()}")
        for item in items:
            if item.path.parent.name == "cpu":
                item.add_marker(skip)


@pytest.fixture(params=["none"] if _MISSING else library.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set; then the best again."""
    library.use_instruction_set(request.param)
    yield request.param
    library.use_instruction_set(library.instruction_sets()[0])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of the kernels; then as many as torch has."""
    library.set_threads(request.param)
    yield request.param
    library.set_threads(None)
