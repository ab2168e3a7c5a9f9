"""Whole models: the reference passes, and an op that only models call wrongly is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from emulated_graphs import EmulatedGraph, emulate_graphs
from torch import Tensor

from quamba.kernels.registry import REFERENCE, Kernels
from quamba.runtime import check_model
from quamba.runtime.check_model import check_models

CPU = torch.device("cpu")


def broken(op: str, factor: float) -> Kernels:
    """The reference with one op's result times a factor."""

    def wrong(*args: Any, **named: Any) -> Tensor:
        y: Tensor = getattr(REFERENCE, op)(*args, **named)
        return (y * factor).to(y.dtype)

    return dataclasses.replace(REFERENCE, **{op: wrong})


def test_the_reference_is_right() -> None:
    checks = check_models(REFERENCE, CPU)
    assert [c.case for c in checks] == [
        f"{family} {recipe}, prompt and 8 steps"
        for family in ("mamba", "mamba2")
        for recipe in ("w8a8", "w4a8", "w4a16", "w4ax")
    ]
    assert [c for c in checks if not c.passed] == []


@pytest.mark.parametrize(
    ("op", "families", "where"),
    [
        ("ssd_step", ["mamba2"], {"steps"}),
        ("selective_scan", ["mamba"], {"prompt", "steps"}),
        ("linear", ["mamba", "mamba2"], {"prompt", "steps"}),
    ],
    ids=["ssd_step", "selective_scan", "linear"],
)
def test_a_wrong_op_fails_in_its_family(op: str, families: list[str], where: set[str]) -> None:
    checks = check_models(broken(op, 0.0), CPU)
    failed = [c for c in checks if not c.passed]
    assert failed == [c for c in checks if c.case.split()[0] in families]
    assert all({part.split(":")[0] for part in c.detail.split("; ")} == where for c in failed)


def test_nothing_runs_on_a_gpu_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_model, "is_usable", lambda device: False)
    first, *rest = check_models(broken("linear", float("nan")), CPU)
    assert first.passed is False and "logits are not finite" in first.detail
    assert [c.passed for c in rest] == [None] * 7


def test_graphs_are_compared_with_eager_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompt and of the steps, each by itself."""
    graphs = emulate_graphs(monkeypatch)
    for config in check_model._configs():
        assert check_model._compare_graph(config, "w8a8", REFERENCE, CPU) == ""
    assert len(graphs.captured) == 4
    replay, spoilt = EmulatedGraph.replay, 0

    def wrong(graph: EmulatedGraph) -> None:
        replay(graph)
        if graphs.captured.index(graph) == spoilt:
            for t in graph.made:
                t.zero_()

    monkeypatch.setattr(EmulatedGraph, "replay", wrong)
    for part in ("prompt", "steps"):
        spoilt = len(graphs.captured) + (part == "steps")
        found = check_model._compare_graph(check_model._configs()[1], "w8a8", REFERENCE, CPU)
        assert [fault.split(":")[0] for fault in found.split("; ")] == [part]
