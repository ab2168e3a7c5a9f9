"""The fused step of whole models against the forward pass with the reference kernels, states included."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import VARIANTS, calibration_set, random_ids, rounded, shipped, with_state

from quamba.formats.hadamard import supported
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.registry import _kernels_of
from quamba.kernels.triton.decode.norm import norm
from quamba.kernels.triton.decode.scan import TimeSteps
from quamba.models.cache import MambaCache
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime import fused_step as module
from quamba.runtime.fused_step import MOST_SEQUENCES, FusedStep, fused_step

HALF, FLOAT = torch.float16, torch.float32
#: Whole groups of 128 weights, two groups of the gated norm, a vocabulary that ends within a program.
CONFIGS: dict[str, ModelConfig] = {
    "mamba": MambaConfig(d_model=128, n_layer=1, vocab_size=61),
    "mamba2": Mamba2Config(d_model=128, n_layer=1, vocab_size=61, d_state=16, headdim=64, ngroups=2),
}
#: Of a block, the norm's included.
LAUNCHES = {"mamba": 6, "mamba2": 5}


def tolerance(precision: str, floats: torch.dtype) -> float:
    """Of the norms of logits and states. Behind int8 activations a rounded float moves some codes by one: in
    float16 many, which costs the op-by-op step as much (0.012), in float32 none or few."""
    if precision in ("fp16", "w4a16"):
        return 2e-3 if floats == HALF else 1e-5
    return 0.03 if floats == HALF else 5e-3


@functools.cache
def quantized(config: ModelConfig, precision: str, state: str | None = None) -> MambaLM:
    """On the CPU, its floats float32, with the reference kernels."""
    model = tiny_model(config)
    if precision == "fp16":
        return model
    recipe = rounded(shipped(precision, config))
    recipe = recipe if state is None else with_state(recipe, state)
    calibration = calibration_set(config, num=2, seqlen=24, batch_size=2, ragged=False)
    return quantize_model(model, recipe, calibration)[0]


def placed(model: MambaLM, floats: torch.dtype, device: torch.device) -> MambaLM:
    return copy.deepcopy(model).set_compute_dtype(floats).to(device).use_kernels(_kernels_of("triton"))


def take(states: MambaCache, other: MambaCache) -> None:
    """Also from formats that are wider."""
    for mine, theirs in zip(states.layers, other.layers, strict=True):
        mine.conv_state.copy_(theirs.conv_state)
        mine.ssm_state.copy_(theirs.ssm_state)


def real_states(model: MambaLM, cache: MambaCache) -> list[Tensor]:
    states = [layer.ssm_state for layer in model.working_cache(cache).layers]
    return states + [layer.conv_state.float() for layer in cache.layers if layer.conv_state.numel()]


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.isfinite().all()
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


def step_of(network: MambaLM, cache: MambaCache) -> FusedStep:
    step = fused_step(network, cache)
    assert isinstance(step, FusedStep), step
    return step


@torch.inference_mode()
def largest_error(
    model: MambaLM, floats: torch.dtype, batch: int, device: torch.device, steps: int = 1
) -> float:
    """Of logits and states after each of the steps that follow a prompt."""
    network, ids = placed(model, floats, device), random_ids(model.config, batch, 7 + steps)
    cache, states = model.new_cache(batch), network.new_cache(batch)
    model(ids[:, :7], cache)
    take(states, cache)
    step = step_of(network, states)
    inside = isinstance(model.blocks[0].mixer.in_proj.weight, QuantizedWeight)
    inside = inside and model.config.d_model <= module.MOST_NORMED_CHANNELS
    assert step.per_block == LAUNCHES[model.config.family] - inside
    errors = []
    for next_ids in ids[:, 7:].unbind(1):
        wanted = model(next_ids[:, None], cache)[:, 0]
        errors.append(error(step(next_ids.to(device)), wanted))
        both = zip(real_states(network, states), real_states(model, cache), strict=True)
        errors += [error(found, expected) for found, expected in both]
    return max(errors)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("precision", "batch", "floats"),
    [
        ("fp16", 1, HALF),
        ("fp16", 3, FLOAT),
        ("w8a8", 1, HALF),
        ("w8a8", 3, FLOAT),
        ("w4a8", 1, FLOAT),
        ("w4a8", 3, HALF),
        ("w4a16", 1, HALF),
        ("w4a16", 3, HALF),
        ("zoo-w4a8", 1, HALF),
        ("zoo-w4a8", 3, FLOAT),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", CONFIGS)
def test_recipes(
    family: str,
    precision: str,
    batch: int,
    floats: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the norm inside the projection that reads it, as short ones are, and in a launch of its own."""
    if batch > 1:
        monkeypatch.setattr(module, "MOST_NORMED_CHANNELS", 127)
    model = quantized(CONFIGS[family], precision)
    assert largest_error(model, floats, batch, device, steps=2) <= tolerance(precision, floats)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("precision", ["fp16", "w8a8"])
@pytest.mark.parametrize(
    "name",
    [
        "mamba-bias-untied",
        "mamba-narrow",
        "mamba-no-fp32-residual",
        "mamba2-bias-untied",
        "mamba2-D-has-hdim",
        "mamba2-norm-first",
        "mamba2-dt-limit",
    ],
)
def test_switches(name: str, precision: str, device: torch.device) -> None:
    config = dataclasses.replace(VARIANTS[name], n_layer=1)
    if name == "mamba-narrow":  # a rank of 1 is no whole word of codes
        config = dataclasses.replace(config, dt_rank=4 if precision == "w8a8" else 1)
    if isinstance(config, Mamba2Config):
        config = dataclasses.replace(config, headdim=32)  # few programs
    model = quantized(config, precision)
    floats = FLOAT if config.residual_in_fp32 else HALF
    assert largest_error(model, floats, 2, device) <= tolerance(precision, floats)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("state", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("family", CONFIGS)
def test_states(family: str, state: str, device: torch.device) -> None:
    config = tiny_config(family, n_layer=1, **({"headdim": 32} if family == "mamba2" else {}))
    model = quantized(config, "w8a8", state)
    dtypes = {"int8": torch.int8, "fp16": HALF, "fp32": FLOAT}
    assert model.new_cache(1).layers[0].ssm_state.dtype == dtypes[state]
    assert largest_error(model, FLOAT, 1, device) <= tolerance("w8a8", FLOAT)


@pytest.mark.usefixtures("few_programs")
@torch.inference_mode()
def test_layers_and_steps(device: torch.device) -> None:
    """Each layer has its own states; the buffers of a step hold nothing that the next one needs."""
    config = tiny_config("mamba2", n_layer=2, headdim=32)
    model, ids = quantized(config, "fp16"), random_ids(config, 1, 3)
    network = placed(model, FLOAT, device)
    cache, states = model.new_cache(1), network.new_cache(1)
    step = step_of(network, states)
    assert len(step.launches) == 2 * step.per_block + 2
    for next_ids in ids.unbind(1):
        logits = step(next_ids.to(device))
        assert logits is step.logits and logits.dtype == FLOAT
        assert error(logits, model(next_ids[:, None], cache)[:, 0]) <= 1e-5
    first = step.logits.clone()
    states.reset()
    for next_ids in ids.unbind(1):
        step(next_ids.to(device))
    assert torch.equal(step.logits, first)


@pytest.mark.parametrize("half_away", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_modes_that_few_values_show(family: str, half_away: bool, device: torch.device) -> None:
    """Ties, and what wraps: the kernels' own tests show that they heed them."""
    network = placed(quantized(CONFIGS[family], "zoo-w4a8"), FLOAT, device)
    mixer: Any = network.blocks[0].mixer
    assert mixer.conv1d.rounding == mixer.rotate.rounding == "half_away"
    if not half_away:
        mixer.conv1d.rounding = mixer.rotate.rounding = "half_even"
        mixer.rotate.overflow = "wrap"
    launches: list[Any] = list(step_of(network, network.new_cache(1)).launches)
    convs = [x.keywords["conv"] for x in launches if x.keywords.get("conv") is not None]
    assert [conv.half_away for conv in convs] == [half_away]
    mixes = [x.keywords for x in launches if "wrap" in x.keywords]
    assert [(x["half_away"], x["wrap"]) for x in mixes] == [(half_away, not half_away)]


@pytest.mark.parametrize("floats", [HALF, FLOAT], ids=str)
def test_floats_are_those_of_the_model(floats: torch.dtype, device: torch.device) -> None:
    """Time steps are rounded as their projection would, and the residual stream as its norm says."""
    config = VARIANTS["mamba-no-fp32-residual"]
    network = placed(tiny_model(config), floats, device)
    launches: list[Any] = list(step_of(network, network.new_cache(1)).launches)
    steps = [a for x in launches for a in x.args if isinstance(a, TimeSteps)]
    assert [s.half for s in steps] == [floats == HALF] * config.n_layer
    residuals = {x.keywords["residual"].dtype for x in launches if x.keywords.get("residual") is not None}
    assert residuals == {floats}
    network = placed(tiny_model(VARIANTS["mamba"]), floats, device)
    launches = list(step_of(network, network.new_cache(1)).launches)
    assert {x.args[0].dtype for x in launches if x.func is norm} == {FLOAT}


def reason_of(network: MambaLM, batch: int = 1) -> str:
    reason = fused_step(network, network.new_cache(batch))
    assert isinstance(reason, str)
    return reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (VARIANTS["mamba-layer-norm"], "LayerNorm has no kernel in it"),
        (VARIANTS["mamba2-layer-norm"], "LayerNorm has no kernel in it"),
        (VARIANTS["falcon"], "norms of B, C and dt have no kernel in it"),
        (VARIANTS["mamba2-groups8"], "no kernel of it takes 64 channels in 8 groups"),
    ],
    ids=["mamba-layer-norm", "mamba2-layer-norm", "falcon", "groups8"],
)
def test_models_without_one(config: ModelConfig, reason: str, device: torch.device) -> None:
    network = placed(tiny_model(config), FLOAT, device)
    assert reason_of(network) == f"no fused step: {reason}."


def test_what_else_has_none(device: torch.device) -> None:
    network = placed(tiny_model(CONFIGS["mamba2"]), FLOAT, device)
    assert reason_of(network, MOST_SEQUENCES + 1) == "no fused step: it is for at most 4 sequences."
    assert isinstance(fused_step(network, network.new_cache(MOST_SEQUENCES)), FusedStep)
    wide = placed(tiny_model(CONFIGS["mamba2"]), torch.float64, device)
    assert reason_of(wide) == "no fused step: it computes in float32 at most."


def test_channels_without_a_rotation(device: torch.device) -> None:
    """Where nothing is rotated, sizes without a Hadamard matrix have a step, too."""
    config = tiny_config("mamba", d_model=688, n_layer=1)
    assert not supported(config.d_inner)
    network = placed(tiny_model(config), FLOAT, device)
    step_of(network, network.new_cache(1))


def test_weights_it_does_not_multiply(device: torch.device) -> None:
    """x_proj reads floats of the convolution: float16 and int4, but not float32."""
    model = quantized(CONFIGS["mamba"], "w4a16")
    reason = "no fused step: its kernels do not multiply 40x256, int4 per group of 128."
    assert reason_of(placed(model, FLOAT, device)) == reason
    assert isinstance(
        step_of(placed(model, HALF, device), placed(model, HALF, device).new_cache(1)), FusedStep
    )


def test_formats_it_does_not_have(device: torch.device) -> None:
    """Of int8 leaves, each in turn: without codes, or with scales of channels."""

    def changed(path: str, scale: Tensor | None) -> str:
        network = placed(quantized(CONFIGS["mamba"], "w8a8"), FLOAT, device)
        leaf: Any = network.get_submodule(path)
        leaf.out_scale = None if scale is None else scale.to(device)
        return reason_of(network)

    block = "backbone.layers.0"
    of_channels = torch.full((128,), 0.02)
    assert "norms give codes of one scale" in changed(f"{block}.norm", of_channels)
    assert "projection and convolution give the same format" in changed(f"{block}.mixer.conv1d", None)
    assert "rotations give codes of one scale" in changed(f"{block}.mixer.rotate", of_channels.repeat(2))
    narrow = quantized(tiny_config("mamba", dt_rank=1), "w8a8")
    assert "do not project these time steps" in reason_of(placed(narrow, FLOAT, device))
