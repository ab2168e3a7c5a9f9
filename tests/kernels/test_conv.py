"""The causal convolution against a loop over tokens, channels and taps."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Quantized, Rounding
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.conv import causal_conv1d

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [1, 2, 3, 63, 65]
CHANNELS = 5


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, C), weight (C, W), before (B, W - 1, C), all float64."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(batch):
        for c in range(channels):
            history = before[b, :, c].tolist()
            taps = weight[c].tolist()
            for t in range(length):
                seen = mask is None or bool(mask[b, t])
                history.append(float(x[b, t, c]) if seen else 0.0)
                total = sum(w * v for w, v in zip(taps, history[-width:], strict=True))
                total += 0.0 if bias is None else float(bias[c])
                out[b, t, c] = total / (1.0 + math.exp(-total)) if seen else 0.0
    return out


def left_mask(batch: int, length: int) -> Tensor:
    """Row b has b padded tokens on the left, but never all of them."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        mask[b, : min(2 * b, length - 1)] = False
    return mask


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_float(length: int, width: int, with_bias: bool, masked: bool) -> None:
    x = torch.randn(3, length, CHANNELS, dtype=torch.float64)
    weight = torch.randn(CHANNELS, width, dtype=torch.float64)
    bias = torch.randn(CHANNELS, dtype=torch.float64) if with_bias else None
    mask = left_mask(3, length) if masked else None
    expected = loop(x, weight, bias, torch.zeros(3, width - 1, CHANNELS), mask)
    y = causal_conv1d(x, weight, bias, mask=mask, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1, 1, 1], [3, 4], [1, 6], [6, 1], [2, 0, 5], [7]])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("quantized", [False, True])
def test_state_carries_over_pieces(pieces: list[int], width: int, quantized: bool) -> None:
    """Pieces give the numbers of one pass, and leave the last inputs in the state.

    Up to an ulp of SiLU, whose vector code and scalar code for the remainder differ.
    """
    weight, bias = torch.randn(CHANNELS, width, dtype=torch.float64), torch.randn(CHANNELS)
    history = random_codes(2, width - 1 + sum(pieces), CHANNELS)
    scale = torch.rand(CHANNELS)
    dtype = torch.int8 if quantized else torch.float64

    def give(part: Tensor) -> Quantized | Tensor:
        return Quantized(part, scale) if quantized else part.double() * scale.double()

    stored = history if quantized else give(history)
    state = stored[:, : width - 1].clone()
    x = history[:, width - 1 :]
    whole = causal_conv1d(give(x), weight, bias, state=state.clone(), out_dtype=torch.float64)
    outputs = []
    for part in x.split(pieces, dim=1):
        outputs.append(causal_conv1d(give(part), weight, bias, state=state, out_dtype=torch.float64))
    ulps = {"rtol": 1e-6, "atol": 1e-30} if quantized else {"rtol": 1e-14, "atol": 1e-30}
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, **ulps)
    assert state.dtype == dtype
    assert torch.equal(state, stored[:, sum(pieces) :])
    real = history.double() * scale.double()
    expected = loop(real[:, width - 1 :], weight, bias, real[:, : width - 1], None)
    bound = {"rtol": 1e-5, "atol": 1e-4} if quantized else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(whole, expected, **bound)


def test_masked_inputs_do_not_enter_the_state() -> None:
    x = torch.randn(1, 3, CHANNELS)
    state = torch.zeros(1, 3, CHANNELS)
    mask = torch.tensor([[False, False, True]])
    causal_conv1d(x, torch.randn(CHANNELS, 4), None, state=state, mask=mask)
    assert torch.equal(state[:, :2], torch.zeros(1, 2, CHANNELS))
    assert torch.equal(state[:, 2], x[:, 2])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_integers(length: int, width: int, granularity: str, per_channel: bool, masked: bool) -> None:
    format = WeightFormat(8, granularity)
    codes = random_codes(CHANNELS, width, low=-127)
    scale = torch.rand(format.scale_shape((CHANNELS, width))) * 0.01 + 0.001
    weight = QuantizedWeight.from_codes(codes, scale, format)
    x = random_codes(3, length, CHANNELS)
    x_scale = torch.rand(CHANNELS if per_channel else ()) * 0.05 + 0.01
    bias = torch.randn(CHANNELS)
    mask = left_mask(3, length) if masked else None
    expected = loop(
        x.double() * x_scale.double(),
        codes.double() * scale.double(),
        bias,
        torch.zeros(3, width - 1, CHANNELS),
        mask,
    )
    before = x.clone()
    y = causal_conv1d(Quantized(x, x_scale), weight, bias, mask=mask)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    for out_scale in (torch.tensor(0.031), torch.rand(CHANNELS) * 0.05 + 0.01):
        given = causal_conv1d(Quantized(x, x_scale), weight, bias, mask=mask, out_scale=out_scale)
        assert_codes(given, expected / out_scale.double(), slack=1e-4)
    assert torch.equal(x, before)


def test_integer_sums_are_exact() -> None:
    """Scales of one and inputs far up silu, which is then the identity in float32: the code is the sum."""
    codes = torch.tensor([[1, 0, -1, 1]], dtype=torch.int8)
    weight = QuantizedWeight.from_codes(codes, torch.ones(1, 1), WeightFormat(8, "channel"))
    x = torch.arange(30, 60, dtype=torch.int8).view(1, 30, 1)
    y = causal_conv1d(Quantized(x, torch.tensor(1.0)), weight, None, out_scale=torch.tensor(1.0))
    history = [0, 0, 0, *range(30, 60)]
    wanted = [history[t] - history[t + 2] + history[t + 3] for t in range(30)]
    silu = [v / (1 + math.exp(-v)) for v in wanted]
    assert y.flatten().tolist() == [min(round(v), 127) for v in silu]


def test_codes_saturate() -> None:
    weight = QuantizedWeight.from_codes(
        torch.tensor([[127]], dtype=torch.int8), torch.ones(1, 1), WeightFormat(8, "tensor")
    )
    x = Quantized(torch.tensor([[[127], [-128], [0]]], dtype=torch.int8), torch.tensor(1.0))
    assert causal_conv1d(x, weight, None, out_scale=torch.tensor(0.1)).flatten().tolist() == [127, 0, 0]


@pytest.mark.parametrize(("rounding", "codes"), [("half_even", [0, 0]), ("half_away", [1, -1])])
@pytest.mark.parametrize("quantized", [False, True])
def test_ties_of_the_output(rounding: Rounding, codes: list[int], quantized: bool) -> None:
    """Scales of twice the output's size: its quotient is exactly a half."""
    one = torch.tensor(1.0)
    x, weight = torch.tensor([[[3.0, -1.0]]]), torch.ones(2, 1)
    y = causal_conv1d(x, weight, None)
    out_scale = 2 * y.abs().flatten()
    if quantized:
        given = Quantized(x.to(torch.int8), one)
        taps = QuantizedWeight.from_codes(weight.to(torch.int8), torch.ones(2, 1), WeightFormat(8, "channel"))
        found = causal_conv1d(given, taps, None, out_scale=out_scale, rounding=rounding)
    else:
        found = causal_conv1d(x, weight, None, out_scale=out_scale, rounding=rounding)
    assert found.flatten().tolist() == codes


def test_float_input_with_a_quantized_weight() -> None:
    weight = QuantizedWeight.from_codes(
        random_codes(CHANNELS, 4, low=-127), torch.rand(CHANNELS, 1), WeightFormat(8, "channel")
    )
    x = torch.randn(2, 7, CHANNELS, dtype=torch.float64)
    real = weight.codes().double() * weight.scale.double()
    y = causal_conv1d(x, weight, None, out_dtype=torch.float64)
    torch.testing.assert_close(
        y, loop(x, real, None, torch.zeros(2, 3, CHANNELS), None), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_non_contiguous_input_is_left_alone(quantized: bool) -> None:
    wide = random_codes(2, 9, 3 * CHANNELS).transpose(0, 1)
    wide = wide if quantized else wide.double()
    before = wide.clone()
    part = wide[..., CHANNELS : 2 * CHANNELS]
    weight, one = torch.randn(CHANNELS, 4, dtype=torch.float64), torch.tensor(1.0)
    y = causal_conv1d(Quantized(part, one) if quantized else part, weight, None, out_dtype=torch.float64)
    expected = loop(part.double(), weight, None, torch.zeros(9, 3, CHANNELS), None)
    torch.testing.assert_close(
        y, expected, rtol=1e-5 if quantized else 1e-13, atol=1e-4 if quantized else 1e-13
    )
    assert torch.equal(wide, before)


@pytest.mark.parametrize("shape", [(0, 4, CHANNELS), (2, 0, CHANNELS), (0, 0, CHANNELS)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    state = torch.randn(shape[0], 3, CHANNELS)
    before = state.clone()
    y = causal_conv1d(torch.zeros(shape), torch.randn(CHANNELS, 4), None, state=state)
    assert y.shape == shape
    if shape[1] == 0:
        assert torch.equal(state, before)
    codes = torch.zeros(shape, dtype=torch.int8)
    out = causal_conv1d(
        Quantized(codes, torch.tensor(1.0)), torch.randn(CHANNELS, 4), None, out_scale=torch.tensor(1.0)
    )
    assert out.shape == shape
