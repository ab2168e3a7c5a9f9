"""Batches on a GPU: as large as its memory allows, the same sequences in the same order."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from variants import calibration_set

from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.quantization.memory import (
    Budget,
    in_large_batches,
    parse_size,
    peak_memory_bytes,
    sequences_at_once,
)

GIB = 1 << 30
CONFIG = tiny_config("mamba2")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "length", "memory", "expected"),
    [
        (Mamba2Config(d_model=2560, n_layer=64, vocab_size=50288), 512, 80 * GIB, 32),
        (Mamba2Config(d_model=2560, n_layer=64, vocab_size=50288), 512, 24 * GIB, 8),
        (Mamba2Config(d_model=2560, n_layer=64, vocab_size=50288), 2048, 80 * GIB, 8),
        (Mamba2Config(d_model=768, n_layer=24, vocab_size=50288), 512, 80 * GIB, 64),
        (MambaConfig(d_model=2560, n_layer=64, vocab_size=50280), 512, 80 * GIB, 16),
        (MambaConfig(d_model=2560, n_layer=64, vocab_size=50280), 65536, 8 * GIB, 1),
    ],
    ids=["80 GiB", "24 GiB", "long", "small model", "mamba1", "too long"],
)
def test_how_many_sequences_fit(config: ModelConfig, length: int, memory: int, expected: int) -> None:
    assert sequences_at_once(config, length, memory) == expected


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, as far as the rule asks."""
    found = types.SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def listed(calibration: Any) -> list[list[int]]:
    return [
        (row if mask is None else row[mask[i]]).tolist()
        for ids, mask in calibration.batches()
        for i, row in enumerate(ids)
    ]


@pytest.mark.usefixtures("gpu")
def test_larger_batches_hold_the_same_sequences() -> None:
    calibration = calibration_set(CONFIG)
    larger = in_large_batches(calibration, CONFIG, Budget(GPU))
    assert len(list(larger.batches())) == 1
    assert listed(larger) == listed(calibration)
    assert [len(ids) for ids, _ in larger.batches(3)] == [3, 3, 3, 1]


@pytest.mark.usefixtures("gpu")
def test_what_is_large_enough_stays() -> None:
    calibration = calibration_set(CONFIG, batch_size=4)
    torch.cuda.get_device_properties(GPU).total_memory = memory = 1 << 23
    assert sequences_at_once(CONFIG, 40, memory) == 4
    assert in_large_batches(calibration, CONFIG, Budget(GPU)) is calibration


def test_a_cpu_keeps_its_batches_and_has_no_peak() -> None:
    calibration = calibration_set(CONFIG)
    assert in_large_batches(calibration, CONFIG, Budget(CPU)) is calibration
    assert peak_memory_bytes(torch.device("cpu")) is None


@pytest.mark.usefixtures("gpu")
def test_a_limit_makes_batches_smaller_too() -> None:
    calibration = calibration_set(CONFIG, batch_size=10)
    limited = in_large_batches(calibration, CONFIG, Budget(GPU, gpu_bytes=1 << 23))
    assert [len(ids) for ids, _ in limited.batches()] == [4, 4, 2]
    assert listed(limited) == listed(calibration)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("device", "gpu_bytes", "memory_bytes", "states", "place"),
    [
        (GPU, None, None, 10 * GIB, "device"),
        (GPU, 8 * GIB, 128 * GIB, GIB, "device"),
        (GPU, 8 * GIB, 128 * GIB, GIB + 1, "memory"),
        (GPU, 8 * GIB, 12 * GIB, 3 * GIB + 1, "file"),
        (CPU, None, 12 * GIB, 3 * GIB, "memory"),
        (CPU, None, 12 * GIB, 3 * GIB + 1, "file"),
        (CPU, 80 * GIB, 12 * GIB, 4 * GIB, "file"),
        (CPU, None, None, 1 << 60, "file"),
    ],
)
def test_where_hidden_states_go(
    device: torch.device, gpu_bytes: int | None, memory_bytes: int | None, states: int, place: str
) -> None:
    assert Budget(device, gpu_bytes, memory_bytes).place(states) == place


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 * GIB), ("8 gib", 8 * GIB), ("1.5K", 1536), ("500MB", 500 << 20), ("7", 7), ("2T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "0", "0.2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(QuambaError, match="expected a number of bytes such as 8G or 500M"):
        parse_size(text)
