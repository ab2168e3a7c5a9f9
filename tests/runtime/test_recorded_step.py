"""The step of a token as one program of the compiled CPU kernels."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import RMS_VARIANTS, calibration_set, rounded, shipped, with_state

from quamba.kernels.cpu import library
from quamba.kernels.cpu.recording import NotRecordableError, record
from quamba.kernels.registry import REFERENCE, choose_kernels
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime.decode import decode_step
from quamba.runtime.recorded_step import RecordedStep, recorded_step
from quamba.runtime.step import describe_step, step_of

pytestmark = pytest.mark.skipif(
    not library.available(), reason=f"the CPU kernels cannot be used: {library.load()}"
)


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def placed(network: MambaLM) -> MambaLM:
    compiled = choose_kernels(torch.device("cpu"), "cpu")
    return network.set_compute_dtype(torch.float32).use_kernels(compiled)


def quantized(config: ModelConfig, recipe: str, state: str = "fp16") -> MambaLM:
    asked = rounded(with_state(shipped(recipe, config), state))
    return placed(quantize_model(tiny_model(config), asked, calibration_set(config))[0])


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_it_is_the_step_leaf_by_leaf(family: str, recipe: str, batch: int) -> None:
    network = quantized(tiny_config(family), recipe)
    prompt = torch.arange(batch * 5).view(batch, 5) % 50
    cache = network.new_cache(batch)
    network(prompt, cache)
    twin = cache.clone()
    step = recorded_step(network, cache)
    assert isinstance(step, RecordedStep), step
    for i in range(4):
        ids = torch.full((batch,), 7 * i + 1)
        assert torch.equal(step(ids), decode_step(network, ids, twin))
    for mine, theirs in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(mine.conv_state, theirs.conv_state)
        assert torch.equal(mine.ssm_state, theirs.ssm_state)


@pytest.mark.parametrize("variant", list(RMS_VARIANTS))
@torch.inference_mode()
def test_every_variant_has_one(variant: str) -> None:
    config = RMS_VARIANTS[variant]
    network = quantized(config, "w8a8")
    cache, twin = network.new_cache(1), network.new_cache(1)
    step = recorded_step(network, cache)
    assert isinstance(step, RecordedStep), step
    for i in range(3):
        ids = torch.tensor([i])
        assert torch.equal(step(ids), decode_step(network, ids, twin))


@torch.inference_mode()
def test_states_of_codes(family: str) -> None:
    network = quantized(tiny_config(family), "w8a8", "int8")
    cache, twin = network.new_cache(2), network.new_cache(2)
    step = recorded_step(network, cache)
    assert isinstance(step, RecordedStep), step
    for i in range(3):
        ids = torch.tensor([i, 9 - i])
        assert torch.equal(step(ids), decode_step(network, ids, twin))


def test_recording_runs_nothing(family: str) -> None:
    network = quantized(tiny_config(family), "w8a8")
    cache = network.new_cache(1)
    before = cache.clone()
    assert isinstance(recorded_step(network, cache), RecordedStep)
    for mine, theirs in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(mine.ssm_state, theirs.ssm_state)
        assert torch.equal(mine.conv_state, theirs.conv_state)


@torch.inference_mode()
def test_a_step_keeps_what_it_points_to(family: str) -> None:
    network = quantized(tiny_config(family), "w8a8")
    cache = network.new_cache(1)
    states = [weakref.ref(t) for layer in cache.layers for t in (layer.conv_state, layer.ssm_state)]
    step = recorded_step(network, cache)
    held = weakref.ref(network)
    del network, cache
    gc.collect()
    assert held() is not None
    assert all(state() is not None for state in states)
    del step
    gc.collect()
    assert held() is None


def test_what_torch_computes_has_no_program() -> None:
    given = torch.zeros(4)

    def views() -> Tensor:
        return given.view(2, 2)[1]

    def sums() -> Tensor:
        return given + 1

    def reads() -> float:
        return float(given[0])

    def writes() -> Tensor:
        return given.fill_(1.0)

    program, result = record(views, [given])
    assert len(program) == 0
    assert result.data_ptr() == given[2:].data_ptr()
    for piece in (sums, reads, writes):
        with pytest.raises(NotRecordableError, match="by torch"):
            record(piece, [given])
    assert not library.is_recording()
    constants, total = record(lambda: torch.ones(2) + 1, [given])
    assert len(constants) == 0
    assert total.tolist() == [2.0, 2.0], "what depends on nothing that is written is computed once"


def test_how_a_model_is_decoded(family: str) -> None:
    network = quantized(tiny_config(family), "w4a8")
    assert describe_step(network).startswith("one call of ")
    assert "op by op" in describe_step(network.use_kernels(REFERENCE))
    cache = network.new_cache(1)
    with torch.inference_mode():
        assert step_of(network, cache)(torch.tensor([3])).shape == (1, network.config.padded_vocab_size)
