"""The whole job on tiny models: what is in a report and what is not, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from quamba.errors import QuambaError
from quamba.models.lm import MambaLM
from quamba.profiling import machine
from quamba.profiling.operations import Operations
from quamba.profiling.profile import Arithmetic, ProfileReport, Traffic, profile, speedups
from quamba.profiling.size import step_bytes
from quamba.profiling.spec import MODES, Mode, ProfileSpec

SPEC = ProfileSpec(prompt_len=6, gen_len=3, repeats=2)


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "copy_bytes", lambda device: 1 << 16)


@pytest.fixture
def network() -> MambaLM:
    return tiny_model(tiny_config("mamba2"))


def only(*modes: Mode) -> ProfileSpec:
    return dataclasses.replace(SPEC, modes=modes)


def test_all_modes(network: MambaLM) -> None:
    report = profile(network, SPEC)
    assert list(report.latencies) == ["ttft", "tpot", "ttlt"]
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert report.size is not None and report.arithmetic is not None and report.traffic is not None
    ttft, tpot = report.latencies["ttft"], report.latencies["tpot"]
    seconds = report.arithmetic.operations.count / (1e9 * report.arithmetic.gop_per_s)
    assert seconds == pytest.approx(ttft.median_ms / 1e3)
    assert report.traffic.step_bytes == step_bytes(network)
    assert report.traffic.gb_per_s * 1e9 * tpot.median_ms / 1e3 == pytest.approx(step_bytes(network))
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize("mode", MODES)
def test_one_mode_measures_nothing_else(network: MambaLM, mode: Mode) -> None:
    report = profile(network, only(mode))
    assert list(report.latencies) == [m for m in [mode] if m != "size"]
    assert (report.size is not None) == (mode == "size")
    assert (report.arithmetic is not None) == (mode == "ttft")
    assert (report.traffic is not None) == (mode == "tpot")
    assert (report.peak is not None) == (mode != "size")


def test_the_size_runs_no_model(network: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.backbone, "forward", None)
    assert profile(network, only("size")).size is not None


def test_no_time_limit_is_valid_json(network: MambaLM) -> None:
    report = profile(network, dataclasses.replace(only("size"), max_seconds=float("inf")))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["spec"]["max_seconds"] is None


def test_progress_is_told(network: MambaLM) -> None:
    told: list[Any] = []

    class Progress:
        def stage(self, name: str, total: int) -> None:
            told.append((name, total))

        def step(self, count: int = 1) -> None:
            told.append(count)

    profile(network, only("ttlt", "ttft"), progress=Progress())
    assert told == [("ttft", 2), 1, 1, ("ttlt", 2), 1, 1]


def test_the_share_of_the_copy() -> None:
    traffic = Traffic(step_bytes=10, gb_per_s=5.0, copy_gb_per_s=20.0)
    assert traffic.to_dict()["share_of_copy"] == 0.25


def test_the_share_of_a_matrix_product() -> None:
    arithmetic = Arithmetic(Operations({"projections": 8}, {"projections": 6}), 5.0, 20.0, "float32")
    found = arithmetic.to_dict()
    assert (found["share_of_matmul"], found["integer_share"], found["matmul_dtype"]) == (
        0.25,
        0.75,
        "float32",
    )


def test_speedups_are_of_medians(network: MambaLM) -> None:
    def slower(report: ProfileReport, factor: float) -> ProfileReport:
        latencies = {
            mode: dataclasses.replace(latency, median_ms=factor * latency.median_ms)
            for mode, latency in report.latencies.items()
        }
        return dataclasses.replace(report, latencies=latencies)

    report = profile(network, only("ttft", "tpot"))
    assert speedups(report, slower(report, 3.0)) == pytest.approx({"ttft": 3.0, "tpot": 3.0})


def test_parameters_need_no_gradients(network: MambaLM) -> None:
    profile(network, only("ttlt"))
    assert not torch.is_inference(next(network.parameters()))
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt_len": 0}, "prompt_len is 0, expected an integer of at least 1."),
        ({"gen_len": 1.5}, "gen_len is 1.5, expected an integer of at least 1."),
        ({"batch_size": True}, "batch_size is True, expected an integer of at least 1."),
        ({"repeats": -1}, "repeats is -1, expected an integer of at least 1."),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0."),
        ({"max_seconds": 0.0}, "max_seconds is 0.0, expected a number above 0."),
        ({"max_seconds": float("nan")}, "max_seconds is nan, expected a number above 0."),
        ({"modes": ()}, "There is nothing to profile, expected one or more of size, ttft, tpot, ttlt."),
        ({"modes": ("tpott",)}, "Did you mean 'tpot'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_specs(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QuambaError) as error:
        ProfileSpec(**change)
    assert sentence in str(error.value)
