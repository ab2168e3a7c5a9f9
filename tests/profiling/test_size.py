"""Sizes by kind: by hand for two small models, and as a sum for every variant and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import VARIANTS, calibration_set, rounded, shipped
from zoo_fixtures import BUNDLED, zoo_path

from quamba.checkpoints.quantized import write_quantized
from quamba.checkpoints.stored import read_stored
from quamba.checkpoints.upstream import write_state_spaces
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.profiling.size import KINDS, file_size, measure_size, step_bytes
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.recipe import shipped_names


def all_bytes(network: MambaLM) -> int:
    """By storage, so that neither names nor kinds matter and a tied tensor counts once."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_a_float_mamba2_by_hand() -> None:
    # d_model 32, two layers, d_inner 64, d_state 16, one group: conv_dim 96; 8 heads of 8.
    size = measure_size(tiny_model(tiny_config("mamba2")), batch_size=3)
    projections = (32 * (64 + 96 + 8) + 64 * 32) * 4
    assert size.weights == {
        "embedding": 64 * 32 * 4,
        "projections": 2 * projections,
        "conv": 2 * (96 * 4 + 96) * 4,
        "scan": 2 * 3 * 8 * 4,
        "norms": (2 * (32 + 64) + 32) * 4,
        "rotation": 0,
        "head": 0,
    }
    assert size.tied_head
    assert (size.conv_state, size.ssm_state) == (2 * 3 * 96 * 4, 2 * 64 * 16 * 4)
    assert size.cache_bytes == 3 * (size.conv_state + size.ssm_state)


def test_an_untied_mamba_by_hand() -> None:
    # d_model 32, two layers, d_inner 64, d_state 8, dt_rank 4.
    size = measure_size(tiny_model(tiny_config("mamba", tie_embeddings=False)))
    assert not size.tied_head
    assert size.weights["head"] == size.weights["embedding"] == 64 * 32 * 4
    assert size.weights["projections"] == 2 * (32 * 128 + 64 * 20 + 4 * 64 + 64 * 32) * 4
    assert size.weights["scan"] == 2 * (64 * 8 + 64 + 64) * 4
    assert (size.conv_state, size.ssm_state) == (2 * 3 * 64 * 4, 2 * 64 * 8 * 4)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_float_kinds_add_up(config: ModelConfig) -> None:
    network = tiny_model(config)
    assert measure_size(network).weight_bytes == all_bytes(network)


@pytest.mark.parametrize("recipe", shipped_names())
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_quantized_kinds_add_up(family: str, recipe: str) -> None:
    config = tiny_config(family)
    network, _, _ = quantize_model(
        tiny_model(config), rounded(shipped(recipe, config)), calibration_set(config)
    )
    size = measure_size(network, batch_size=2)
    assert size.weight_bytes == all_bytes(network)
    assert size.to_dict()["weights_bytes"] == {**size.weights, "total": all_bytes(network)}
    assert size.cache_bytes == network.new_cache(2).nbytes
    if recipe == "w8a8":
        assert size.weights["rotation"] == 2 * 4  # one scale a layer
        assert size.weights["head"] > 0


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_quantized_file_is_its_weights_and_a_header(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    network, plan, report = quantize_model(
        tiny_model(config), rounded(shipped("w4a8", config)), calibration_set(config)
    )
    write_quantized(tmp_path / "small", network, plan, source="tiny", report=report, tokenizer=None)
    file = file_size(network, tmp_path / "small")
    assert {kind: count for kind, count in file.weights.items() if kind != "other"} == measure_size(
        network
    ).weights
    assert (file.weights["other"], 0 < file.header < 8192) == (0, True)
    path = tmp_path / "small" / "model.safetensors"
    assert file.total_bytes == path.stat().st_size == file.to_dict()["total_bytes"]
    assert file.header == 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_float_file_by_kind(family: str, tmp_path: Path) -> None:
    """Stored in half precision under the names of upstream."""
    config = tiny_config(family)
    network = tiny_model(config)
    halved = {name: tensor.half() for name, tensor in network.named_tensors().items()}
    write_state_spaces(tmp_path / "float", config, halved)
    file = file_size(network, tmp_path / "float")
    weights = measure_size(network).weights
    assert file.weights == {**{kind: count // 2 for kind, count in weights.items()}, "other": 0}


def test_a_published_file_adds_up(repo_root: Path) -> None:
    folder = zoo_path(repo_root, BUNDLED[0])
    file = file_size(read_stored(folder).network, folder)
    assert file.total_bytes == (folder / "pytorch_model.bin").stat().st_size
    assert file.weights["other"] > 0  # of a layout of its own
    assert file.weights["embedding"] > 0 and file.header > 0


def test_a_decode_step_reads_all_but_the_other_rows_of_the_table() -> None:
    tied, untied = (tiny_model(tiny_config("mamba", tie_embeddings=tie)) for tie in (True, False))
    for network, unread in ((tied, 0), (untied, (64 - 2) * 32 * 4)):
        size = measure_size(network, batch_size=2)
        assert step_bytes(network, 2) == size.weight_bytes - unread + 2 * size.cache_bytes


def test_half_precision_is_half_the_size_of_projections() -> None:
    config = tiny_config("mamba2")
    single, half = (measure_size(tiny_model(config, dtype=d)) for d in (torch.float32, torch.float16))
    assert list(single.weights) == list(KINDS)
    assert single.weights["projections"] == 2 * half.weights["projections"]
    assert single.weights["norms"] == half.weights["norms"]
