"""Traces can be opened, and their tables add up."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from quamba.profiling.spec import Mode, ProfileSpec
from quamba.profiling.trace import TRACED_RUNS, trace

SPEC = ProfileSpec(prompt_len=6, gen_len=3)
NAMES = {"ttft": "ttft_prompt_len_6", "tpot": "tpot", "ttlt": "ttlt_prompt_len_6_gen_len_3"}
FORWARDS = {"ttft": 5, "tpot": 5, "ttlt": 3}
ALL_FORWARDS = {"ttft": 6, "tpot": 7, "ttlt": 6}


@pytest.mark.parametrize("mode", NAMES)
def test_trace_and_table(tmp_path: Path, mode: Mode) -> None:
    network = tiny_model(tiny_config("mamba2"))
    shapes: list[torch.Size] = []
    network.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    found = trace(network, mode, SPEC, tmp_path / "new" / "folder")
    assert len(shapes) == ALL_FORWARDS[mode]  # one run more, that warms up; for tpot the prompt too
    assert found.runs == TRACED_RUNS[mode]
    assert {path.name for path in found.trace.parent.iterdir()} == {
        f"{NAMES[mode]}.pt.trace.json",
        f"{NAMES[mode]}.csv",
    }
    events = json.loads(found.trace.read_text())["traceEvents"]
    # One lookup in the table a forward pass, and only those of the traced runs.
    assert sum(event["name"] == "aten::embedding" for event in events) == FORWARDS[mode]
    with found.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [op.name for op in found.ops]
    calls = {row["name"]: int(row["calls"]) for row in rows}
    assert calls["aten::embedding"] == FORWARDS[mode]
    own = [float(row["self_cpu_ms"]) for row in rows]
    assert own == sorted(own, reverse=True)
    assert all(op.self_cpu_ms <= op.cpu_ms + 1e-9 for op in found.ops)


def test_a_second_trace_replaces_the_first(tmp_path: Path) -> None:
    network = tiny_model(tiny_config("mamba"))
    for _ in range(2):
        found = trace(network, "tpot", SPEC, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert found.to_dict()["trace"] == str(tmp_path / "tpot.pt.trace.json")
