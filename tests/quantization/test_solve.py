"""What the solver is fed: the inputs that each projection sees in the quantized model, padding left out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, shipped, with_state

from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.formats.weight import WeightFormat
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.quantization.solve import ProjectionSolver, moments
from quamba.quantization.streams import Stream
from quamba.recipes.recipe import Solver

GPTQ = Solver(kind="gptq")


def moments_alone(model: MambaLM, path: str, count: int | None = None) -> Tensor:
    """2/n sum x x^T over each calibration sequence run alone through the whole model."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[object, ...]) -> None:
        x = args[0]
        if isinstance(x, Quantized):
            x = x.codes.float() if module.input_scale_folded else x.dequantize()
        seen.append(x[0].double())

    handle = model.get_submodule(path).register_forward_pre_hook(keep)
    for sequence in sorted(calibration_set(model.config).sequences, key=len, reverse=True)[:count]:
        model(sequence[None])
    handle.remove()
    x = torch.cat(seen)
    return 2 / len(x) * x.T @ x


@pytest.mark.parametrize("quantized", [None, "w8a8", "zoo-w8a8"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_hessians_are_those_of_the_whole_model(family: str, quantized: str | None) -> None:
    """The stream is kept at the current block, so each projection's inputs come out as in a full pass.

    Of codes for x_proj in w8a8, whose columns hold their scales; of real values in zoo-w8a8.
    """
    config = tiny_config(family)
    model = tiny_model(config)
    if quantized is not None:
        recipe = with_state(shipped(quantized, config), "int8")
        model, _, _ = quantize_model(model, recipe, calibration_set(config))
    stream = Stream(model, calibration_set(config), None)
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"] if family == "mamba" else ["in_proj", "out_proj"]
    for layer, block in enumerate(model.blocks):
        for name in names:
            linear = getattr(block.mixer, name)
            found, cross = moments(linear, stream.inputs(layer, name), None, stream.masks)
            expected = moments_alone(model, f"backbone.layers.{layer}.mixer.{name}")
            assert cross is None
            # In float32, codes near the middle may move between a batch and a sequence alone.
            bound = 1e-3 if quantized else 1e-5
            folded = quantized == "w8a8" and name == "x_proj"
            assert linear.input_scale_folded == folded
            assert (found - expected).abs().max() <= bound * expected.abs().max(), name
        stream.advance(layer)
    found, _ = moments(model.lm_head, stream.head_inputs(), None, stream.masks)
    expected = moments_alone(model, "lm_head")
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_advancing_from_kept_inputs_equals_walking_through_the_block() -> None:
    config = tiny_config("mamba2")
    model = tiny_model(config)
    walking, keeping = (Stream(model, calibration_set(config), None) for _ in range(2))
    list(keeping.inputs(0, "out_proj"))
    for stream in (walking, keeping):
        stream.advance(0)
    for one, other in zip(walking.inputs(1, "in_proj"), keeping.inputs(1, "in_proj"), strict=True):
        assert torch.equal(one, other)


def test_cross_moments_pair_the_streams() -> None:
    config = tiny_config("mamba2")
    streams = [Stream(tiny_model(config, seed), calibration_set(config), None) for seed in (0, 1)]
    masks = streams[0].masks
    rows = []
    for stream in streams:
        seen = zip(stream.inputs(0, "in_proj"), masks, strict=True)
        rows.append(torch.cat([x.flatten(0, 1) if m is None else x[m] for x, m in seen]).double())
    ours, theirs = rows
    linear = streams[0].model.blocks[0].mixer.in_proj
    hessian, cross = moments(linear, streams[0].inputs(0, "in_proj"), streams[1].inputs(0, "in_proj"), masks)
    assert cross is not None
    torch.testing.assert_close(hessian.double(), 2 * ours.T @ ours / len(ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.double(), 2 * theirs.T @ ours / len(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_samples_limit_the_sequences(samples: int) -> None:
    model = tiny_model(tiny_config("mamba2"))
    stream = Stream(model, calibration_set(model.config), samples)
    assert sum(len(x) for x in stream.inputs(0, "in_proj")) == samples
    found, _ = moments(model.blocks[0].mixer.in_proj, stream.inputs(0, "in_proj"), None, stream.masks)
    expected = moments_alone(model, "backbone.layers.0.mixer.in_proj", samples)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rounding_reads_no_calibration() -> None:
    model = tiny_model(tiny_config("mamba"))
    solver = ProjectionSolver(model, None, Solver(kind="rtn"), None)
    line = solver.solve_projection(0, "in_proj", WeightFormat(8, "channel"))
    assert line == {"name": "layers.0.mixer.in_proj", "bits": 8, "granularity": "channel"}


def test_gptq_without_calibration_is_refused() -> None:
    with pytest.raises(QuambaError, match="GPTQ needs calibration text"):
        ProjectionSolver(tiny_model(tiny_config("mamba")), None, GPTQ, None)
