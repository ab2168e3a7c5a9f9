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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(machine, "_STANDS_STILL", 0.05)


def energy_of_a_run(device: torch.device) -> tuple[float | None, int]:
    """With reads after every fourth run; and how many runs there were."""
    done: list[None] = []
    energy = machine.energy_of_run_mj(device, lambda: done.append(None), machine._READ_SECONDS / 4, 0.0)
    return energy, len(done)


def test_energy_is_taken_between_two_moves_of_the_counter(
    monkeypatch: pytest.MonkeyPatch, one_gpu: None
) -> None:
    # It stands at 1000 when asked first, moves to 1100 in the second batch, and to 1500 in the fourth.
    nvml = fake_nvml([1000, 1000, 1100, 1100, 1500])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert energy_of_a_run(GPU) == ((1500 - 1100) / 8, 16)
    assert set(nvml.asked) == {"GPU-12-ab"}
    assert nvml.open == 0


class Same(list[int]):
    """Readings without an end."""

    def pop(self, index: Any = 0) -> int:
        return super().pop(0) if len(self) > 1 else self[0]


@pytest.mark.parametrize(
    "readings",
    [Same([1000]), Same([1000, 1100]), [NvmlError("not supported")], [1000, NvmlError("lost")],
     [1000, 1100, NvmlError("lost")]],
    ids=["stands still", "stops", "no counter", "lost at once", "lost"],
)  # fmt: skip
def test_energy_that_cannot_be_read_is_absent(
    monkeypatch: pytest.MonkeyPatch, one_gpu: None, readings: list[int | Exception]
) -> None:
    nvml = fake_nvml(readings)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert energy_of_a_run(GPU)[0] is None
    assert nvml.open == 0


def test_without_the_package_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_of_a_run(GPU) == (None, 0)


def test_a_cpu_has_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([]))  # would raise if it were asked
    assert energy_of_a_run(CPU) == (None, 0)


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
