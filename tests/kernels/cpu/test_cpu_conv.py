"""The compiled convolution against the reference in float64; the state bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.cpu.conv import causal_conv1d
from quamba.kernels.reference import conv as reference

pytestmark = pytest.mark.usefixtures("poison_empty", "instruction_set")

BATCH = 2
CHANNELS = 150  # whole vectors, and a rest that is none
LENGTHS = [1, 2, 3, 130]  # less than the state, and three parts


def inputs(kind: str, length: int, channels: int = CHANNELS) -> Activation:
    """A slice of a wider tensor, as the model gives it. kind: "int8", "int8 channels", or a dtype."""
    if kind.startswith("int8"):
        codes = random_codes(BATCH, length, channels + 40)[..., 20 : 20 + channels]
        return Quantized(codes, torch.rand(channels if kind == "int8 channels" else ()) * 0.02 + 0.01)
    return torch.randn(BATCH, length, channels + 40)[..., 20 : 20 + channels].to(getattr(torch, kind))


def weights(kind: str, width: int, channels: int = CHANNELS) -> Tensor | QuantizedWeight:
    if kind == "float":
        return torch.randn(channels, width)
    format = WeightFormat(8, kind)
    scale = torch.rand(format.scale_shape((channels, width))) * 0.01 + 0.001
    return QuantizedWeight.from_codes(random_codes(channels, width, low=-127), scale, format)


def some_mask(length: int) -> Tensor:
    """Left padding in the second sequence, a hole in the first."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[1, : length // 2] = False
    mask[0, length // 3 : length // 3 + length // 2] = False
    return mask


def window_like(x: Activation, width: int) -> Tensor:
    values = x.codes if isinstance(x, Quantized) else x
    if values.dtype == torch.int8:
        return random_codes(BATCH, width - 1, values.shape[2])
    return torch.randn(BATCH, width - 1, values.shape[2]).to(values.dtype)


def exact(
    x: Activation, weight: Any, bias: Tensor | None, state: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The reference in float64 on the real values."""
    scale = x.scale.double() if isinstance(x, Quantized) else 1.0
    real = (x.codes if isinstance(x, Quantized) else x).double() * scale
    taps = weight.dequantize(torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()
    return reference.causal_conv1d(
        real,
        taps,
        None if bias is None else bias.double(),
        state=None if state is None else state.double() * scale,
        mask=mask,
        out_dtype=torch.float64,
    )


def check(x: Activation, weight: Any, bias: Tensor | None, state: Tensor | None, mask: Tensor | None) -> None:
    """Floats to float32, and the state, which is what the reference leaves."""
    expected = exact(x, weight, bias, state, mask)
    found_state, plain_state = (None if state is None else state.clone() for _ in range(2))
    y = causal_conv1d(x, weight, bias, state=found_state, mask=mask)
    plain = reference.causal_conv1d(x, weight, bias, state=plain_state, mask=mask)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    allowed = 2 * (plain - expected).abs().max() + 1e-6 * expected.abs().max()
    assert (y - expected).abs().max() <= allowed
    if mask is not None:
        assert not y[~mask].any()
    if state is not None:
        assert found_state is not None and plain_state is not None
        assert torch.equal(found_state, plain_state)


@pytest.mark.parametrize("kind", ["int8", "int8 channels", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weight", ["float", "channel", "tensor"])
def test_formats(kind: str, weight: str) -> None:
    for length in LENGTHS:
        x, taps, bias = inputs(kind, length), weights(weight, 4), torch.randn(CHANNELS)
        check(x, taps, bias, window_like(x, 4), None)
        check(x, taps, None, None, some_mask(length))
        check(x, taps, bias, window_like(x, 4), some_mask(length))


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_widths_and_channels(kind: str, threads: int) -> None:
    for channels in (1, 5, 16, 33, 260):
        for width in (1, 2, 3, 4, 5):
            x = inputs(kind, 67, channels)
            taps = weights("channel" if kind == "int8" else "float", width, channels)
            check(x, taps, torch.randn(channels), window_like(x, width), some_mask(67))


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_codes(kind: str, rounding: Rounding, per_channel: bool) -> None:
    for length in LENGTHS:
        x, taps, bias = inputs(kind, length), weights("channel", 4), torch.randn(CHANNELS)
        scale = torch.rand(CHANNELS if per_channel else ()) * 0.02 + 0.01
        state, mask = window_like(x, 4), some_mask(length)
        expected = exact(x, taps, bias, state, mask)
        y = causal_conv1d(x, taps, bias, state=state, mask=mask, out_scale=scale, rounding=rounding)
        assert_codes(y, expected / scale.double(), slack=1e-4)


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_ties(rounding: Rounding) -> None:
    """SiLU of 40 and more is its argument, so sums of integers meet ties exactly."""
    codes = torch.arange(80, 128, dtype=torch.int8).view(1, 1, -1)
    taps = torch.ones(48, 1)
    scale = torch.tensor(2.0)
    y = causal_conv1d(Quantized(codes, torch.tensor(1.0)), taps, None, out_scale=scale, rounding=rounding)
    half = codes.double() / 2
    assert torch.equal(y.double(), half.round() if rounding == "half_even" else (half + 0.5).floor())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_outputs_are_rounded_once(dtype: torch.dtype) -> None:
    x, taps = inputs("int8", 70), weights("channel", 4)
    y = causal_conv1d(x, taps, None, out_dtype=dtype)
    assert y.dtype == dtype
    expected = exact(x, taps, None, None, None)
    assert ((y - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_integer_sums_are_exact() -> None:
    """Terms of 2^14 cancel and leave 1: float32 sums of their real values would not."""
    codes = torch.tensor([127, -127, 127, -126], dtype=torch.int8).view(1, 4, 1).expand(1, 4, 20).contiguous()
    format = WeightFormat(8, "tensor")
    weight = QuantizedWeight.from_codes(
        torch.full((20, 4), 127, dtype=torch.int8), torch.tensor([[1 / 3]]), format
    )
    y = causal_conv1d(Quantized(codes, torch.tensor(1 / 7)), weight, None)
    step = torch.tensor(1 / 3) * torch.tensor(1 / 7)
    assert torch.allclose(y[0, 3], torch.nn.functional.silu(127 * step).expand(20), rtol=3e-7, atol=0)


def test_other_layouts_and_nothing() -> None:
    """Channels that are not next to each other, in x and in the state; no tokens, no sequences."""
    x = torch.randn(CHANNELS, 9, BATCH).permute(2, 1, 0)
    taps, state = weights("float", 4), torch.randn(CHANNELS, 3, BATCH).permute(2, 1, 0)
    expected = exact(x, taps, None, state, None)
    torch.testing.assert_close(
        causal_conv1d(x, taps, None, state=state).double(), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(state, x[:, -3:])
    assert causal_conv1d(x[:, :0], taps, None, state=state).shape == (BATCH, 0, CHANNELS)
    assert causal_conv1d(x[:0], taps, None).shape == (0, 9, CHANNELS)
    assert torch.equal(state, x[:, -3:])


def test_float64_is_the_references() -> None:
    x, taps = torch.randn(BATCH, 9, CHANNELS, dtype=torch.float64), torch.randn(CHANNELS, 4).double()
    y = causal_conv1d(x, taps, None, out_dtype=torch.float64)
    assert torch.equal(y, reference.causal_conv1d(x, taps, None, out_dtype=torch.float64))
