"""The Triton convolution against the reference in float64; the state bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference import conv as reference
from quamba.kernels.triton import conv, conv_words
from quamba.kernels.triton.conv import ConvTile, causal_conv1d
from quamba.kernels.triton.conv_words import WordTile

pytestmark = pytest.mark.usefixtures("poison_empty")

LENGTHS = [1, 2, 3, 65 if torch.cuda.is_available() else 9]
CHANNELS = 150
WORD_CHANNELS = 140  # words of four; the last program of 32 has three
BATCH = 2


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the slow interpreter a few tokens are enough for several programs a sequence."""
    if not torch.cuda.is_available():
        tiles = {1: ConvTile(1, 128, 1, 1), 3: ConvTile(4, 128, 4, 1)}
        other = ConvTile(4, 256, 2, 1)
        monkeypatch.setattr(conv, "conv_tile", lambda length, channels: tiles.get(length, other))


def some_mask(length: int) -> Tensor:
    """Row b has 2 b padded tokens on the left, but never all of them; row 0 is without the last but one."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    for b in range(BATCH):
        mask[b, : min(2 * b, length - 1)] = False
    if length > 1:
        mask[0, -2] = False
    return mask


def quantized_weight(
    width: int, granularity: Any, bits: Any = 8, channels: int = CHANNELS
) -> QuantizedWeight:
    format = WeightFormat(bits, granularity)
    codes = torch.randint(format.qmin, format.qmax + 1, (channels, width), dtype=torch.int8)
    scale = torch.rand(format.scale_shape((channels, width))) * 0.01 + 0.001
    return QuantizedWeight.from_codes(codes, scale, format)


def moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Quantized):
        return Quantized(x.codes.to(device), x.scale.to(device))
    if isinstance(x, QuantizedWeight):  # a module's own ``to`` would move the one that was given
        x = copy.deepcopy(x)
    return x if x is None else x.to(device)


def exact(
    x: Activation, weight: Any, bias: Tensor | None, state: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The reference in float64 on the real values."""
    real = x.codes.double() * x.scale.double() if isinstance(x, Quantized) else x.double()
    before = None if state is None else state.double() * (x.scale.double() if isinstance(x, Quantized) else 1)
    taps = weight.dequantize(torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()
    wide_bias = None if bias is None else bias.double()
    return reference.causal_conv1d(real, taps, wide_bias, state=before, mask=mask, out_dtype=torch.float64)


def check(
    x: Activation,
    weight: Any,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> None:
    """Floats, the state, and codes: of one scale where there is a mask, else of a scale a channel."""
    wanted = exact(x, weight, bias, state, mask)
    inputs = [moved(t, device) for t in (x, weight, bias)]
    given_state = None if state is None else state.to(device, copy=True)
    flags = moved(mask, device)
    y = causal_conv1d(*inputs, state=given_state, mask=flags)
    expected_state = None if state is None else state.clone()
    y32 = reference.causal_conv1d(x, weight, bias, state=expected_state, mask=mask)
    assert y.dtype == torch.float32
    error, allowed = (y.cpu().double() - wanted).abs().max(), (y32.double() - wanted).abs().max()
    assert error <= 2 * allowed + 2e-6 * wanted.abs().max()
    if state is not None:
        assert given_state is not None and torch.equal(given_state.cpu(), expected_state)
    out_scale = torch.rand(y.shape[2]) * 0.05 + 0.01 if mask is None else torch.tensor(0.031)
    again = None if state is None else state.to(device, copy=True)
    codes = causal_conv1d(*inputs, state=again, mask=flags, out_scale=out_scale.to(device))
    assert_codes(codes.cpu(), wanted / out_scale.double(), slack=2e-4)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    ("granularity", "per_channel", "masked"),
    [("channel", False, False), ("channel", True, True), ("tensor", False, True), ("tensor", True, False)],
)
def test_integers(
    length: int, width: int, granularity: str, per_channel: bool, masked: bool, device: torch.device
) -> None:
    scale = torch.rand(CHANNELS if per_channel else ()) * 0.05 + 0.01
    x = Quantized(random_codes(BATCH, length, CHANNELS), scale)
    state = random_codes(BATCH, width - 1, CHANNELS) if per_channel else None
    mask = some_mask(length) if masked else None
    bias = torch.randn(CHANNELS) if masked else torch.randn(CHANNELS).half()
    check(x, quantized_weight(width, granularity), bias, state, mask, device)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("width", "masked"), [(1, False), (3, True), (4, False), (4, True)])
def test_floats(length: int, width: int, masked: bool, device: torch.device) -> None:
    x, state = torch.randn(BATCH, length, CHANNELS), torch.randn(BATCH, width - 1, CHANNELS)
    mask = some_mask(length) if masked else None
    check(x, torch.randn(CHANNELS, width), torch.randn(CHANNELS) if masked else None, state, mask, device)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("mixture", ["float x", "float weight", "4 bits", "float16 scales"])
@pytest.mark.parametrize("length", [1, LENGTHS[-1]])
def test_mixtures(mixture: str, length: int, device: torch.device) -> None:
    codes = Quantized(random_codes(BATCH, length, CHANNELS), torch.rand(CHANNELS) * 0.05)
    weight: Any = quantized_weight(4, "channel", 4 if mixture == "4 bits" else 8)
    if mixture == "float16 scales":
        format = WeightFormat(8, "tensor", scale_bits=16)
        weight = QuantizedWeight(weight.data, torch.full((1, 1), 0.004).half(), format)
    elif mixture == "float weight":
        weight = torch.randn(CHANNELS, 4).half()
    x = torch.randn(BATCH, length, CHANNELS) if mixture == "float x" else codes
    state = torch.randn(BATCH, 3, CHANNELS) if mixture == "float x" else random_codes(BATCH, 3, CHANNELS)
    check(x, weight, torch.randn(CHANNELS), state, None, device)


@pytest.fixture
def word_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that the kernel for words is given."""
    lengths, convolve = [], conv_words.convolve

    def counted(x: Tensor, *rest: Any, **named: Any) -> None:
        lengths.append(x.shape[1])
        convolve(x, *rest, **named)

    monkeypatch.setattr(conv_words, "convolve", counted)
    return lengths


@pytest.mark.parametrize(
    ("length", "tile", "granularity", "per_channel", "masked"),
    [
        (4, WordTile(32, 4, 1), "channel", True, False),
        (9, WordTile(32, 4, 2), "channel", True, True),
        (8, WordTile(64, 4, 2), "tensor", False, True),
        (11, WordTile(64, 8, 1), "tensor", True, True),
        (7, WordTile(64, 8, 1), "channel", False, False),
        (16, WordTile(64, 8, 1), "channel", True, True),
    ],
    ids=["4 by 4", "9 by 4x2", "8 by 4x2", "11 by 8", "7 by 8", "16 by 8"],
)
def test_words(
    length: int,
    tile: WordTile,
    granularity: str,
    per_channel: bool,
    masked: bool,
    word_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setattr(conv_words, "word_tile", lambda batch, length, channels: tile)
    scale = torch.rand(WORD_CHANNELS if per_channel else ()) * 0.05 + 0.01
    x = Quantized(random_codes(BATCH, length, WORD_CHANNELS), scale)
    state = random_codes(BATCH, 3, WORD_CHANNELS) if per_channel else None
    mask = some_mask(length) if masked else None
    bias = torch.randn(WORD_CHANNELS).half() if masked else None
    check(x, quantized_weight(4, granularity, channels=WORD_CHANNELS), bias, state, mask, device)
    assert word_calls == [length] * 2


def test_words_need_aligned_slices(word_calls: list[int], device: torch.device) -> None:
    both, weight = random_codes(2, 6, 400), quantized_weight(4, "channel", channels=WORD_CHANNELS)
    one, state = torch.tensor(0.02), random_codes(2, 3, WORD_CHANNELS)
    for start in (40, 42):
        x = both[..., start : start + WORD_CHANNELS]
        after, expected = state.to(device, copy=True), state.clone()
        given = Quantized(both.to(device)[..., start : start + WORD_CHANNELS], one.to(device))
        y = causal_conv1d(given, moved(weight, device), None, state=after)
        wanted = reference.causal_conv1d(Quantized(x, one), weight, None, state=expected)
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(after.cpu(), expected)
    assert word_calls == [6]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats(dtype: torch.dtype, device: torch.device) -> None:
    x, state = torch.randn(2, 9, CHANNELS).to(dtype), torch.randn(2, 3, CHANNELS).to(dtype)
    weight = torch.randn(CHANNELS, 4).to(dtype)
    after = state.to(device, copy=True)
    given = causal_conv1d(x.to(device), weight.to(device), None, state=after, out_dtype=torch.float16)
    wanted = exact(x, weight, None, state, None)
    assert torch.equal(after.cpu(), x[:, -3:])
    torch.testing.assert_close(given.cpu().double(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [1, 6], [6, 1], [2, 0, 5], [33, 2]], ids=str)
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_pieces_are_one_pass(pieces: list[int], kind: str, device: torch.device) -> None:
    scale, weight = torch.rand(CHANNELS, device=device), torch.randn(CHANNELS, 4, device=device)
    history = random_codes(2, 3 + sum(pieces), CHANNELS).to(device)
    history = history if kind == "int8" else history.float() * 0.1

    def give(part: Tensor) -> Any:
        return Quantized(part, scale) if kind == "int8" else part

    state, x = history[:, :3].clone(), history[:, 3:]
    whole = causal_conv1d(give(x), weight, None, state=state.clone())
    outputs = [causal_conv1d(give(part), weight, None, state=state) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-6, atol=1e-5)
    assert torch.equal(state, history[:, sum(pieces) :])


def test_integer_sums_are_exact(device: torch.device) -> None:
    """Far up silu is the identity in float32: with scales of one the code is the sum."""
    codes = torch.tensor([[1, 0, -1, 1]], dtype=torch.int8)
    weight = QuantizedWeight.from_codes(codes, torch.ones(1, 1), WeightFormat(8, "channel")).to(device)
    x = torch.arange(30, 60, dtype=torch.int8, device=device).view(1, 30, 1)
    one = torch.tensor(1.0, device=device)
    y = causal_conv1d(Quantized(x, one), weight, None, out_scale=one)
    history = [0, 0, 0, *range(30, 60)]
    wanted = [history[t] - history[t + 2] + history[t + 3] for t in range(30)]
    assert y.flatten().tolist() == wanted
    words = QuantizedWeight.from_codes(codes.repeat(4, 1), torch.ones(4, 1), WeightFormat(8, "channel"))
    y = causal_conv1d(Quantized(x.expand(1, 30, 4).contiguous(), one), words.to(device), None, out_scale=one)
    assert y[0].T.tolist() == [wanted] * 4


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_rounding(rounding: Rounding, device: torch.device) -> None:
    """silu(32 k) = 32 k exactly, and 32 k / 64 is a tie for odd k."""
    x = (torch.arange(1, 20, dtype=torch.float32, device=device) * 32).view(1, -1, 1)
    one = torch.ones(1, 1, device=device)
    y = causal_conv1d(x, one, None, out_scale=torch.tensor(64.0, device=device), rounding=rounding)
    half = torch.arange(1, 20) / 2
    expected = half.round() if rounding == "half_even" else (half + 0.5).floor()
    assert y.flatten().tolist() == expected.int().tolist()
    taps = torch.tensor([[0, 0, 0, 1]], dtype=torch.int8).repeat(4, 1)
    words = QuantizedWeight.from_codes(taps, torch.ones(1, 1), WeightFormat(8, "tensor")).to(device)
    codes = torch.arange(1, 20, dtype=torch.int8, device=device).view(1, -1, 1).expand(1, -1, 4).contiguous()
    given = Quantized(codes, torch.tensor(32.0, device=device))
    y = causal_conv1d(given, words, None, out_scale=torch.tensor(64.0, device=device), rounding=rounding)
    assert y[0].T.tolist() == [expected.int().tolist()] * 4


def test_slices_and_a_strided_state(device: torch.device) -> None:
    both = random_codes(2, 5, 400).to(device)
    scale, weight = torch.tensor(0.02, device=device), torch.randn(CHANNELS, 8, device=device)[:, 2:6]
    store = random_codes(2, 2, 3, 400).to(device)
    state, kept = store[:, 1, :, 100 : 100 + CHANNELS], store.clone()
    given = causal_conv1d(Quantized(both[..., 40 : 40 + CHANNELS], scale), weight, None, state=state)
    before = kept[:, 1, :, 100 : 100 + CHANNELS].cpu().clone()
    x = Quantized(both[..., 40 : 40 + CHANNELS].cpu(), scale.cpu())
    expected = reference.causal_conv1d(x, weight.cpu(), None, state=before)
    torch.testing.assert_close(given.cpu(), expected, rtol=1e-5, atol=1e-5)
    kept[:, 1, :, 100 : 100 + CHANNELS] = before.to(device)
    assert torch.equal(store, kept)


def test_refusals(device: torch.device) -> None:
    x, weight = torch.randn(1, 4, 6, device=device), torch.randn(6, 4, device=device)
    with pytest.raises(ValueError, match="x has stride 4 in its last dimension"):
        causal_conv1d(torch.randn(1, 6, 4, device=device).transpose(1, 2), weight, None)
    with pytest.raises(ValueError, match=r"state is torch.float16, expected the dtype of x, torch.float32"):
        causal_conv1d(x, weight, None, state=torch.zeros(1, 3, 6, device=device).half())
    with pytest.raises(ValueError, match=r"state has shape \[1, 4, 6\], expected \[1, 3, 6\]"):
        causal_conv1d(x, weight, None, state=torch.zeros(1, 4, 6, device=device))
    with pytest.raises(ValueError, match="weight has 5 taps, expected at most 4"):
        causal_conv1d(x, torch.randn(6, 5, device=device), None)
    with pytest.raises(ValueError, match=r"mask is torch.int64"):
        causal_conv1d(x, weight, None, mask=torch.ones(1, 4, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="two_level"):
        grouped = QuantizedWeight.empty((6, 4), WeightFormat(4, "two_level", 4), device=device)
        causal_conv1d(x, grouped, None)
