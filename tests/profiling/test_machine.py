"""Bandwidth, memory and energy, the last with a stand-in for the NVIDIA library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quamba.profiling import machine

CPU = torch.device("cpu")
GPU = torch.device("cuda:0")


class NvmlError(Exception):
    pass


def fake_nvml(readings: list[int | Exception]) -> Any:
    """A ``pynvml`` whose counter gives these readings; ``asked`` are the UUIDs, ``open`` is 0 when closed."""
    fake = SimpleNamespace(NVMLError=NvmlError, asked=[], open=0)

    def read(handle: str) -> int:
        value = readings.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    def count(change: int) -> None:
        fake.open += change

    fake.nvmlInit = lambda: count(1)
    fake.nvmlShutdown = lambda: count(-1)
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: fake.asked.append(uuid)
    fake.nvmlDeviceGetTotalEnergyConsumption = read
    return fake


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="12-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def meter_spends(device: torch.device) -> float | None:
    with machine.EnergyMeter(device) as meter:
        pass
    return meter.spent_mj


def test_energy_is_the_difference_of_the_counter(monkeypatch: pytest.MonkeyPatch, one_gpu: None) -> None:
    nvml = fake_nvml([1000, 1750])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert meter_spends(GPU) == 750.0
    assert nvml.asked == ["GPU-12-ab"] * 2
    assert nvml.open == 0


@pytest.mark.parametrize(
    "readings",
    [[1000, 1000], [NvmlError("not supported")], [1000, NvmlError("lost")]],
    ids=["counter stands still", "no counter", "counter lost"],
)
def test_energy_that_cannot_be_read_is_absent(
    monkeypatch: pytest.MonkeyPatch, one_gpu: None, readings: list[int | Exception]
) -> None:
    nvml = fake_nvml(readings)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert meter_spends(GPU) is None
    assert nvml.open == 0


def test_without_the_package_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter_spends(GPU) is None


def test_a_cpu_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([]))  # would raise if it were asked
    assert meter_spends(CPU) is None


def test_bandwidth_counts_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_timed", lambda device, work: 0.5)
    assert machine.copy_bandwidth_gb_per_s(CPU, 4_000_000) == pytest.approx(2 * 4e6 / 0.5 / 1e9)


def test_bandwidth_is_measured() -> None:
    assert machine.copy_bandwidth_gb_per_s(CPU, 1 << 20) > 0


def test_products_count_additions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 0.25, 0.5, 0.125, 0.25])  # of which the median counts
    monkeypatch.setattr(machine, "_timed", lambda device, work: next(seconds))
    expected = 2 * 512**3 / 0.25 / 1e9
    assert machine.matmul_gflop_per_s(CPU, torch.float32) == pytest.approx(expected)


def test_products_are_measured() -> None:
    assert machine.matmul_gflop_per_s(CPU, torch.float32) > 0


def test_the_buffer_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, text in enumerate(["32K", "", "96M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.copy_bytes(CPU) == 4 * 96 * 2**20
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "none")
    assert machine.copy_bytes(CPU) == machine.COPY_BYTES


def test_peak_memory_is_that_of_the_process_in_bytes() -> None:
    pytest.importorskip("resource", reason="needs the resource module, which Windows lacks")
    held = torch.ones(1 << 24)
    peak = machine.peak_memory(CPU)
    assert peak is not None
    assert held.nbytes < peak.size_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
