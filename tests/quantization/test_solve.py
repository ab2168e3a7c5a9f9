"""What the solver is fed: the inputs that each projection sees in the quantized model, padding left out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, rounded, shipped, with_state

from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.formats.weight import WeightFormat
from quamba.models.lm import MambaLM
from quamba.quantization.convert import nearest
from quamba.quantization.pipeline import quantize_model
from quamba.quantization.solve import ProjectionSolver, moments, report_line
from quamba.quantization.states import Shelf
from quamba.quantization.streams import Stream, first_sequences
from quamba.recipes.recipe import Solver, load_recipe

GPTQ = Solver(kind="gptq")
MEMORY = Shelf("memory", torch.device("cpu"))


def stream_of(model: MambaLM, samples: int | None = None, *, keeps: bool = True) -> Stream:
    """The calibration set at the entrance of the first block."""
    batches = first_sequences(calibration_set(model.config).batches(), samples)
    stream = Stream(batches, model.backbone.embedding, model.config.d_model, MEMORY, "test", keeps=keeps)
    stream.begin()
    return stream


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
    stream = stream_of(model)
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"] if family == "mamba" else ["in_proj", "out_proj"]
    for layer, block in enumerate(model.blocks):
        for name in names:
            linear = getattr(block.mixer, name)
            found, cross = moments(linear, stream.inputs(block, name), None, stream.masks)
            expected = moments_alone(model, f"backbone.layers.{layer}.mixer.{name}")
            assert cross is None
            # In float32, codes near the middle may move between a batch and a sequence alone.
            bound = 1e-3 if quantized else 1e-5
            folded = quantized == "w8a8" and name == "x_proj"
            assert linear.input_scale_folded == folded
            assert (found - expected).abs().max() <= bound * expected.abs().max(), name
        stream.advance(block)
    found, _ = moments(model.lm_head, stream.normed(model.backbone.norm_f), None, stream.masks)
    expected = moments_alone(model, "lm_head")
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_advancing_from_kept_inputs_equals_walking_through_the_block() -> None:
    config = tiny_config("mamba2")
    model = tiny_model(config)
    first, second = model.blocks
    walking, keeping, full = stream_of(model), stream_of(model), stream_of(model, keeps=False)
    list(keeping.inputs(first, "out_proj"))
    list(full.inputs(first, "out_proj"))
    for stream in (walking, keeping, full):
        stream.advance(first)
    for seen in zip(*(s.inputs(second, "in_proj") for s in (walking, keeping, full)), strict=True):
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])


def test_cross_moments_pair_the_streams() -> None:
    config = tiny_config("mamba2")
    models = [tiny_model(config, seed) for seed in (0, 1)]
    streams = [stream_of(model) for model in models]
    masks = streams[0].masks
    rows = []
    for stream, model in zip(streams, models, strict=True):
        seen = zip(stream.inputs(model.blocks[0], "in_proj"), masks, strict=True)
        rows.append(torch.cat([x.flatten(0, 1) if m is None else x[m] for x, m in seen]).double())
    ours, theirs = rows
    linear = models[0].blocks[0].mixer.in_proj
    inputs = [s.inputs(m.blocks[0], "in_proj") for s, m in zip(streams, models, strict=True)]
    hessian, cross = moments(linear, *inputs, masks)
    assert cross is not None
    torch.testing.assert_close(hessian.double(), 2 * ours.T @ ours / len(ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.double(), 2 * theirs.T @ ours / len(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_samples_limit_the_sequences(samples: int) -> None:
    model = tiny_model(tiny_config("mamba2"))
    stream, block = stream_of(model, samples), model.blocks[0]
    assert sum(len(x) for x in stream.inputs(block, "in_proj")) == samples
    found, _ = moments(block.mixer.in_proj, stream.inputs(block, "in_proj"), None, stream.masks)
    expected = moments_alone(model, "backbone.layers.0.mixer.in_proj", samples)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rounding_reads_no_calibration() -> None:
    model = tiny_model(tiny_config("mamba"))
    solver, format = ProjectionSolver(Solver(kind="rtn"), None, None), WeightFormat(8, "channel")
    linear = model.blocks[0].mixer.in_proj
    expected = nearest(linear.float_weight, format)
    assert solver.solve_projection(model.blocks[0], None, "in_proj", format) is None
    assert torch.equal(linear.weight.data, expected.data)
    assert report_line("a", format, None) == {"name": "a", "bits": 8, "granularity": "channel"}


def test_gptq_without_calibration_is_refused() -> None:
    config = tiny_config("mamba")
    with pytest.raises(QuambaError, match="GPTQ needs calibration text"):
        quantize_model(tiny_model(config), rounded(load_recipe("w4a16")).replace(solver=GPTQ), None)
