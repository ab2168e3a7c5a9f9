"""Pages of mapped files given back, and tensors sent to a device through small buffers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, shipped

from quamba.checkpoints.mapping import drop_pages
from quamba.checkpoints.tensors import open_tensors
from quamba.checkpoints.transfer import Staging, to_device
from quamba.quantization.pipeline import quantize_model

CPU = torch.device("cpu")


def resident_kb() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1])
    raise AssertionError("the system does not tell RssFile")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux only")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pages_of_a_file_are_given_back(tmp_path: Path, kind: str) -> None:
    expected = {"a": torch.randn(1 << 21), "b": torch.randn(3, 5)}  # 8 MiB
    if kind == "safetensors":
        save_file(expected, tmp_path / "model.safetensors")
    else:
        torch.save(expected, tmp_path / "pytorch_model.bin")
    source = open_tensors(tmp_path)
    tensors = {name: source.get(name) for name in source}
    tensors["a"].sum()
    before = resident_kb()
    drop_pages(tensors.values())
    assert resident_kb() < before - 7000
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_other_memory_is_left_alone() -> None:
    tensor = torch.randn(1 << 20)
    copy = tensor.clone()
    drop_pages([tensor, tensor[5:], torch.empty(0), torch.empty(3, device="meta")])
    assert torch.equal(tensor, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_tensors_go_through_buffers(dtype: torch.dtype, size: int) -> None:
    staging = Staging(CPU, buffer_bytes=64)
    tensor = torch.randn(size, 2).mul_(3).to(dtype)
    moved = staging.moved(tensor)
    other = staging.moved(tensor.T)  # not contiguous
    staging.finish()
    assert moved.dtype == dtype
    assert torch.equal(moved, tensor)
    assert torch.equal(other, tensor.T)


def test_a_quantized_model_goes_through_buffers() -> None:
    config = tiny_config("mamba2")
    network, _, _ = quantize_model(tiny_model(config), shipped("w4a8", config), calibration_set(config))
    before = {name: tensor.clone() for name, tensor in network.named_tensors().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in network.named_tensors().items()}
    network._apply(Staging(CPU, buffer_bytes=100).moved)
    found = network.named_tensors()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert all(found[name].data_ptr() != pointer for name, pointer in pointers.items())
    to_device(network, CPU)
    assert all(torch.equal(network.named_tensors()[name], tensor) for name, tensor in before.items())
