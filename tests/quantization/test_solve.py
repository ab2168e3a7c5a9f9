"""What the solver is fed: the inputs that each projection sees in the quantized model, padding left out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, shipped

from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.formats.weight import WeightFormat
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.quantization.solve import BlockSolver
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


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_hessians_are_those_of_the_whole_model(family: str, quantized: bool) -> None:
    """The stream is kept at the current block, so each projection's inputs come out as in a full pass."""
    config = tiny_config(family)
    model = tiny_model(config)
    if quantized:
        model, _, _ = quantize_model(model, shipped("w8a8", config), calibration_set(config))
    solver = BlockSolver(model, None, GPTQ, calibration_set(config))
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"] if family == "mamba" else ["in_proj", "out_proj"]
    for layer, block in enumerate(model.blocks):
        for name in names:
            found, cross = solver._moments(getattr(block.mixer, name), None, layer)
            expected = moments_alone(model, f"backbone.layers.{layer}.mixer.{name}")
            assert cross is None
            # In float32, codes near the middle may move between a batch and a sequence alone.
            bound = 1e-3 if quantized else 1e-5
            assert (found - expected).abs().max() <= bound * expected.abs().max(), name
        solver.advance(layer)
    found, _ = solver._moments(model.lm_head, None, None)
    expected = moments_alone(model, "lm_head")
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_samples_limit_the_sequences(samples: int) -> None:
    model = tiny_model(tiny_config("mamba2"))
    solver = BlockSolver(model, None, Solver(kind="gptq", samples=samples), calibration_set(model.config))
    assert sum(len(stream) for stream in solver.streams) == samples
    found, _ = solver._moments(model.blocks[0].mixer.in_proj, None, 0)
    expected = moments_alone(model, "backbone.layers.0.mixer.in_proj", samples)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rounding_reads_no_calibration() -> None:
    model = tiny_model(tiny_config("mamba"))
    solver = BlockSolver(model, None, Solver(kind="rtn"), None)
    line = solver.solve_projection(0, "in_proj", WeightFormat(8, "channel"))
    assert line == {"name": "layers.0.mixer.in_proj", "bits": 8, "granularity": "channel"}


def test_gptq_without_calibration_is_refused() -> None:
    with pytest.raises(QuambaError, match="GPTQ needs calibration text"):
        BlockSolver(tiny_model(tiny_config("mamba")), None, GPTQ, None)
