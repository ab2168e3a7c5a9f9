"""The cache as a container: copies are copies, rows are rows, and its size is what the formats say."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, random_ids, rounded, shipped, with_state

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model


def filled(model: MambaLM, batch: int) -> MambaCache:
    cache = model.new_cache(batch)
    model(random_ids(model.config, batch, 6), cache)
    return cache


def tensors(cache: MambaCache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.conv_state, layer.ssm_state)]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_shapes_and_bytes_of_a_float_cache(family: str) -> None:
    config = tiny_config(family)
    cache = tiny_model(config).new_cache(3)
    per_state = (64, 8) if family == "mamba" else (8, 8, 16)
    assert [tuple(t.shape) for t in tensors(cache)] == [(3, 3, config.conv_dim), (3, *per_state)] * 2
    assert all(t.dtype == torch.float32 and not t.any() for t in tensors(cache))
    states = 64 * 8 if family == "mamba" else 8 * 8 * 16
    assert cache.nbytes == 2 * 3 * 4 * (3 * config.conv_dim + states)
    assert cache.batch_size == 3


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    ("recipe", "state", "itemsizes"),
    [
        ("w8a8", None, (1, 2)),
        ("w4a8", None, (1, 2)),
        ("w4a16", None, (4, 2)),
        ("quamba1-w8a8", None, (1, 1)),
        ("w8a8", "int8", (1, 1)),
        ("w4a8", "int8", (1, 1)),
        ("w4a16", "int8", (4, 1)),
        ("w8a8", "fp32", (1, 4)),
    ],
)
def test_bytes_of_a_quantized_cache(
    family: str, recipe: str, state: str | None, itemsizes: tuple[int, int]
) -> None:
    """The window is int8 behind int8 projections, else as the floats are; the state as asked, or fp16."""
    config = tiny_config(family)
    wanted = rounded(shipped(recipe, config))
    if state is not None:
        wanted = with_state(wanted, state)
    model, _, _ = quantize_model(tiny_model(config), wanted, calibration_set(config))
    states = 64 * 8 if family == "mamba" else 8 * 8 * 16
    assert model.new_cache(2).nbytes == 2 * 2 * (itemsizes[0] * 3 * config.conv_dim + itemsizes[1] * states)


def test_clone_is_independent() -> None:
    model = tiny_model(tiny_config("mamba2"))
    cache = filled(model, 2)
    copy, before = cache.clone(), [t.clone() for t in tensors(cache)]
    expected = model(random_ids(model.config, 2, 3), cache)
    assert all(torch.equal(a, b) for a, b in zip(tensors(copy), before, strict=True))
    assert not torch.equal(tensors(cache)[0], before[0])
    assert torch.equal(model(random_ids(model.config, 2, 3), copy), expected)


def test_select_repeats_and_copies_rows() -> None:
    model = tiny_model(tiny_config("mamba"))
    cache = filled(model, 3)
    chosen = cache.select(torch.tensor([2, 0, 0, 2]))
    assert chosen.batch_size == 4
    for old, new in zip(tensors(cache), tensors(chosen), strict=True):
        assert torch.equal(new, torch.stack([old[2], old[0], old[0], old[2]]))
    before = [t.clone() for t in tensors(cache)]
    chosen.reset()
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))


def test_reset_is_a_new_cache() -> None:
    model = tiny_model(tiny_config("mamba2"))
    cache = filled(model, 2)
    addresses = [t.data_ptr() for t in tensors(cache)]
    cache.reset()
    assert [t.data_ptr() for t in tensors(cache)] == addresses
    ids = random_ids(model.config, 2, 5)
    assert torch.equal(model(ids, cache), model(ids, model.new_cache(2)))


def test_copy_takes_the_states_and_keeps_the_tensors() -> None:
    model = tiny_model(tiny_config("mamba"))
    source, cache = filled(model, 2), model.new_cache(2)
    addresses = [t.data_ptr() for t in tensors(cache)]
    assert cache.copy_(source) is cache
    assert [t.data_ptr() for t in tensors(cache)] == addresses
    assert all(torch.equal(a, b) and a.any() for a, b in zip(tensors(cache), tensors(source), strict=True))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("state", ["int8", "fp16", "fp32"])
def test_a_working_cache_is_rounded_once(family: str, state: str) -> None:
    """Floats between the pieces of a prompt; the windows hold the same codes in both."""
    config = tiny_config(family)
    recipe = with_state(rounded(shipped("w8a8", config)), state)
    model = quantize_model(tiny_model(config), recipe, calibration_set(config))[0]
    ids = random_ids(config, 2, 40)
    cache, working = model.new_cache(2), model.new_cache(2, working=True)
    assert {x.ssm_state.dtype for x in working.layers} == {torch.float32}
    whole = model(ids, cache)
    parts = torch.cat([model(part, working) for part in ids.split([9, 16, 15], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    stored = model.stored_cache(working)
    for found, expected in zip(tensors(stored), tensors(cache), strict=True):
        assert found.dtype == expected.dtype
        steps = (found.double() - expected.double()).abs()
        assert steps.max() <= (1 if state == "int8" or found.dtype == torch.int8 else 1e-2)
        assert (steps > 1e-5).float().mean() < 0.01
    again = model.working_cache(stored)
    assert {x.ssm_state.dtype for x in again.layers} == {torch.float32}
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(model.stored_cache(again)), tensors(stored), strict=True)
    )


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_states_stay_where_they_were_allocated(family: str) -> None:
    """Graph capture needs this."""
    model = tiny_model(tiny_config(family))
    cache = model.new_cache(2)
    addresses = [t.data_ptr() for t in tensors(cache)]
    for length in (4, 1, 1):
        model(random_ids(model.config, 2, length), cache)
    assert [t.data_ptr() for t in tensors(cache)] == addresses
