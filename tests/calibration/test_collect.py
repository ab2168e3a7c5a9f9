"""Observers see each leaf's output, its mask and the final states, and nothing of them stays behind."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, random_ids, rounded, shipped

from quamba.calibration.collect import StateWatch, Watch, collect
from quamba.calibration.observers import AbsMax, StateAbsMax
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model


class Recorder:
    """Keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.seen.append((x.clone(), mask))

    def value(self) -> Tensor:
        raise NotImplementedError


def hooks(model: MambaLM) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_observers_see_channels_of_a_leaf(family: str) -> None:
    model = tiny_model(tiny_config(family))
    ids = random_ids(model.config, 3, 7)
    outputs = []
    handle = model.blocks[1].mixer.in_proj.register_forward_hook(lambda module, args, y: outputs.append(y))
    model(ids)
    handle.remove()
    part, norm = Recorder(), Recorder()
    watches = [
        Watch("backbone.layers.1.mixer.in_proj", slice(5, 12), part),
        Watch("backbone.norm_f", slice(None), norm),
    ]
    told: list[int] = []
    collect(model, [(ids[:2], None), (ids[2:], None)], watches, on_batch=told.append)
    assert told == [2, 1]
    torch.testing.assert_close(torch.cat([x for x, _ in part.seen]), outputs[0][..., 5:12])
    assert norm.seen[0][0].shape == (2, 7, 32)  # the normalised output, not the residual beside it
    residual_free = norm.seen[0][0].square().mean(-1)
    assert residual_free.max() < 4
    assert hooks(model) == 0


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_padding_changes_nothing(family: str) -> None:
    """Maxima over padded batches are those over each sequence alone, states included."""
    model = tiny_model(tiny_config(family), dtype=torch.float64)
    data = calibration_set(model.config)
    assert any(mask is not None for _, mask in data.batches())

    def maxima(batches: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        groups = torch.arange(64)
        x, state = AbsMax(groups, 64), StateAbsMax(groups, 64)
        watch = Watch("backbone.layers.1.mixer.conv1d", slice(0, 64), x)
        collect(model, batches, [watch], [StateWatch(1, state)])
        return [x.value(), state.value()]

    alone = maxima([(s[None], None) for s in data.sequences])
    for batch_size in (3, 10):
        for found, expected in zip(maxima(list(data.batches(batch_size))), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_states_are_those_of_the_cache(family: str) -> None:
    model = tiny_model(tiny_config(family))
    ids = random_ids(model.config, 2, 9)
    cache = model.new_cache(2)
    model(ids, cache)
    recorder = Recorder()
    collect(model, [(ids, None)], [], [StateWatch(0, recorder)])
    assert torch.equal(recorder.seen[0][0], cache.layers[0].ssm_state)


def test_hooks_go_when_an_observer_fails() -> None:
    class Failing(Recorder):
        def update(self, x: Tensor, mask: Tensor | None = None) -> None:
            raise KeyError("stop")

    model = tiny_model(tiny_config("mamba"))
    with pytest.raises(KeyError):
        collect(
            model,
            [(random_ids(model.config, 1, 4), None)],
            [Watch("backbone.norm_f", slice(None), Failing())],
        )
    assert hooks(model) == 0


def test_quantized_leaves_are_not_watched() -> None:
    config = tiny_config("mamba")
    model, _, _ = quantize_model(
        tiny_model(config), rounded(shipped("w8a8", config)), calibration_set(config)
    )
    watch = Watch("backbone.layers.0.norm", slice(None), Recorder())
    with pytest.raises(AssertionError, match="watch float models"):
        collect(model, [(random_ids(config, 1, 4), None)], [watch])


def test_statistics_are_no_inference_tensors() -> None:
    """They become buffers, which a later in-place load must be able to write."""
    model = tiny_model(tiny_config("mamba"))
    observer = AbsMax(torch.arange(32), 32)
    collect(
        model, [(random_ids(model.config, 1, 4), None)], [Watch("backbone.norm_f", slice(None), observer)]
    )
    assert not observer.value().is_inference()
