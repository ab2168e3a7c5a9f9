"""Processes that score candidates."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from quamba.errors import QuambaError
from quamba.search.score import Labels, ScoreSome
from quamba.search.workers import Pool


@dataclass(frozen=True)
class Counting:
    """Scores are counts of W4A16; a candidate of FP16 ends its process."""

    places: str = ""

    def scoring(self, device: str) -> ScoreSome:
        def score(some: Sequence[Labels]) -> list[float]:
            if any("FP16" in labels for labels in some):
                os.kill(os.getpid(), signal.SIGKILL)
            return [labels.count("W4A16") + 100.0 * int(device.removeprefix("p")) for labels in some]

        return score


A, B, C = ("W4A8", "W4A8"), ("W4A16", "W4A8"), ("W4A16", "W4A16")


@pytest.mark.slow
def test_each_process_has_its_device_and_a_dead_one_is_one_sentence() -> None:
    with Pool(Counting(), ("p0", "p0"), 1) as pool:
        found = {c.labels: c.score for c in pool([A, B, C])}
        assert found == {A: 0.0, B: 1.0, C: 2.0}
        with pytest.raises(QuambaError, match=r"came to an end.* expected fewer --processes"):
            list(pool([("FP16", "W4A8"), A]))
