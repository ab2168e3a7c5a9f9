"""Products with quantized weights: integers exactly, floats within rounding, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference import linear as reference
from quamba.kernels.triton import linear as module
from quamba.kernels.triton.linear import FEW_ROWS, _rows, linear
from quamba.kernels.triton.unpack import unpack, unpack_whole

FORMATS = {
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-channel": WeightFormat(8, "channel"),
    "int4-group": WeightFormat(4, "group", 128),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-multiples": WeightFormat(4, "group", 128, multiples=16),
    "int4-group-of-64": WeightFormat(4, "group", 64),
    "int4-two-level": WeightFormat(4, "two_level", 128),
}
#: (tokens, features, inputs): single tokens, ragged edges of tiles, inputs that are no multiple of a tile.
SHAPES = [
    (1, 9, 256),
    (FEW_ROWS, 5, 384),
    (FEW_ROWS + 1, 65, 256),
    (17, 7, 128),
    (70, 130, 384),
    (1, 3, 1280),
]


def random_weight(format: WeightFormat, features: int, inputs: int, device: str) -> QuantizedWeight:
    low, high = (-8, 8) if format.bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (features, inputs), dtype=torch.int8)
    one = format.one_level
    if format.multiples is not None:
        times = torch.randint(1, 17, format.scale_shape((features, inputs)))
        scale = (torch.randint(64, 128, (features, 1)) * 2.0**-13 * times).half()
        return QuantizedWeight.from_codes(codes, scale, format).to(device)
    step = 0.01 if format.bits == 8 else 0.16
    scale = (torch.rand(one.scale_shape((features, inputs))) * step + step / 10).to(one.scale_dtype)
    return QuantizedWeight.from_codes(codes, scale, format).to(device)


def random_codes(shape: tuple[int, ...], device: str) -> Quantized:
    return Quantized(
        torch.randint(-128, 128, shape, dtype=torch.int8, device=device), torch.tensor(0.02, device=device)
    )


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_products(format: WeightFormat, shape: tuple[int, int, int], device: str) -> None:
    tokens, features, inputs = shape
    weight, x = random_weight(format, features, inputs, device), random_codes((tokens, inputs), device)
    y = linear(x, weight, out_dtype=torch.float32)
    expected = reference.linear(x, weight, out_dtype=torch.float32)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    if format.granularity in ("tensor", "channel"):  # one scale a row: the same two roundings
        assert torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("channel", [False, True], ids=["one-scale", "channel-scales"])
def test_codes_out(format: WeightFormat, tokens: int, channel: bool, device: str) -> None:
    features, inputs = 13, 256
    weight, x = random_weight(format, features, inputs, device), random_codes((1, tokens, inputs), device)
    bias = torch.randn(features, device=device)
    one = torch.tensor(0.04, device=device)
    scale = torch.rand(features, device=device) * 0.04 + 0.01 if channel else one
    y = linear(x, weight, bias, out_scale=scale)
    expected = reference.linear(x, weight, bias, out_scale=scale)
    assert y.dtype == torch.int8 and y.shape == (1, tokens, features)
    assert_same_codes(y, expected, reference.linear(x, weight, bias) / scale)
    assert bool((expected.abs() == 127).any() | (expected == -128).any()), "some values saturate"


def assert_same_codes(found: Tensor, expected: Tensor, real: Tensor) -> None:
    """Equal, but for values within float32 rounding of a tie."""
    tie = ((real - real.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(found[~tie], expected[~tie])
    assert int((found.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_folded_scale_is_not_applied(tokens: int, device: str) -> None:
    weight = random_weight(FORMATS["int8-channel"], 12, 128, device)
    x = random_codes((tokens, 128), device)
    folded = Quantized(x.codes, torch.rand(128, device=device))
    y = linear(folded, weight, input_scale_folded=True)
    assert torch.equal(y, reference.linear(folded, weight, input_scale_folded=True))
    with pytest.raises(ValueError, match="must be folded"):
        linear(folded, weight)


@pytest.mark.parametrize("format", ["int4-group", "int4-channel", "int4-two-level", "int8-channel"])
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_half_activations(format: str, tokens: int, device: str) -> None:
    """Against float64, at most twice the error of the reference in float16, which rounds each weight."""
    features, inputs = 9, 384
    weight = random_weight(FORMATS[format], features, inputs, device)
    x = torch.randn(tokens, inputs, device=device).half()
    exact = reference.linear(x.double(), weight, out_dtype=torch.float64)
    y = linear(x, weight, out_dtype=torch.float16)
    plain = reference.linear(x, weight, out_dtype=torch.float16)
    assert y.dtype == torch.float16
    assert float((y - exact).norm()) <= 2 * float((plain - exact).norm())
    scale = torch.tensor(float(exact.abs().max()) / 100, device=device)
    codes = linear(x, weight, out_scale=scale)
    assert int((codes - (exact / scale).round()).abs().max()) <= 1


@pytest.mark.parametrize(
    "format",
    [FORMATS["int4-two-level"], FORMATS["int4-channel"], WeightFormat(4, "group", 75)],
    ids=["two-level", "channel", "group-of-75"],
)
def test_unpacked_codes(format: WeightFormat, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows, or groups of no whole bytes: weights become int8 in parts, with the same results."""
    inputs = 300 if format.group_size == 75 else 256
    weight, x = random_weight(format, 37, inputs, device), random_codes((9, inputs), device)
    monkeypatch.setattr(module, "_MOST_UNPACKED", 20 * inputs)
    bias, scale = torch.randn(37, device=device), torch.rand(37, device=device) * 0.1 + 0.02
    parts = unpacked_parts(monkeypatch)
    for outputs in ({}, {"out_scale": scale}, {"out_dtype": torch.float16}):
        monkeypatch.setattr(module, "PACKED_ROWS", 8)
        many = linear(x, weight, bias, **outputs)
        assert parts == [20, 17]
        parts.clear()
        monkeypatch.setattr(module, "PACKED_ROWS", 9)
        assert torch.equal(many, linear(x, weight, bias, **outputs))
        assert bool(parts) == (format.group_size == 75)
        parts.clear()
    expected = reference.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-6, atol=1e-5)


def test_scales_of_groups_are_never_unpacked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKED_ROWS", 8)
    parts = unpacked_parts(monkeypatch)
    linear(random_codes((9, 256), device), random_weight(FORMATS["int4-group"], 8, 256, device))
    assert parts == []


@pytest.mark.parametrize("name", ["int4-multiples", "int4-group"])
def test_products_of_integers_of_whole_rows(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some rows on, for scales that are multiples; in parts of the features, and never without."""
    features, inputs = 37, 256
    monkeypatch.setattr(module, "_MOST_UNPACKED", 20 * inputs)
    monkeypatch.setattr(module, "WIDE_TILES", 1)
    monkeypatch.setattr(module, "WIDE_ROWS", 8)
    weight, x = random_weight(FORMATS[name], features, inputs, device), random_codes((9, inputs), device)
    bias, scale = torch.randn(features, device=device), torch.rand(features, device=device) * 2 + 0.5
    parts: list[int] = []

    def recorded(weight: QuantizedWeight, unit: Tensor, start: int, stop: int) -> Tensor:
        parts.append(stop - start)
        return unpack_whole(weight, unit, start, stop)

    monkeypatch.setattr(module, "unpack_whole", recorded)
    for outputs in ({}, {"out_scale": scale}, {"out_dtype": torch.float16}):
        expected = reference.linear(x, weight, bias, **outputs)
        for whole_rows, whole_tiles, whole in ((9, 0, True), (10, 1, True), (10, 0, False)):
            monkeypatch.setattr(module, "WHOLE_ROWS", whole_rows)
            monkeypatch.setattr(module, "WHOLE_TILES", whole_tiles)
            y = linear(x, weight, bias, **outputs)
            assert parts == ([20, 17] if whole and name == "int4-multiples" else [])
            parts.clear()
            if "out_scale" in outputs:
                assert_same_codes(y, expected, reference.linear(x, weight, bias) / scale)
            else:
                within = 1e-6 if not outputs else 2e-3
                atol = within * float(expected.abs().max())
                torch.testing.assert_close(y, expected, rtol=within, atol=atol)


def test_damaged_multiples_are_not_multiplied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE_TILES", 1)
    monkeypatch.setattr(module, "WIDE_ROWS", 8)
    weight = random_weight(FORMATS["int4-multiples"], 8, 256, device)
    weight.scale[2, 1] *= 1.25
    weight.scale[2, 0] *= 1.375
    with pytest.raises(QuambaError, match="scales of row 2"):
        linear(random_codes((9, 256), device), weight)


def unpacked_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weight that are unpacked from now on, call by call."""
    parts: list[int] = []

    def recorded(weight: QuantizedWeight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        parts.append(stop - start)
        return unpack(weight, dtype, start, stop)

    monkeypatch.setattr(module, "unpack", recorded)
    return parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_many_rows_of_floats(
    format: WeightFormat, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library multiplies what the reference would, in parts of the features."""
    monkeypatch.setattr(module, "HALF_ROWS", 8)
    monkeypatch.setattr(module, "_MOST_UNPACKED", 20 * 256)
    weight = random_weight(format, 37, 256, device)
    x = torch.randn(3, 3, 256, device=device, dtype=dtype)
    for bias in (None, torch.randn(37, device=device)):
        y, expected = (
            linear(x, weight, bias, out_dtype=dtype),
            reference.linear(x, weight, bias, out_dtype=dtype),
        )
        assert y.dtype == dtype and y.shape == (3, 3, 37)
        within = {torch.float16: 2e-3, torch.float32: 1e-5}[dtype] * float(expected.abs().max())
        torch.testing.assert_close(y, expected, rtol=0, atol=within)
        wide = linear(x, weight, bias, out_dtype=torch.float32)
        assert wide.dtype == torch.float32 and torch.equal(wide, y.float())
        scale = torch.rand(37, device=device) * 0.1 + 0.02
        codes = linear(x, weight, bias, out_scale=scale)
        assert codes.dtype == torch.int8
        assert torch.equal(codes, (y.float() / scale).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("tokens", [1, 9])
def test_two_levels_of_scales_take_no_more_memory(tokens: int, device: str) -> None:
    weight = random_weight(FORMATS["int4-two-level"], 16, 256, device)
    before = set(vars(weight))
    linear(random_codes((tokens, 256), device), weight)
    linear(torch.randn(tokens, 256, device=device).half(), weight)
    assert set(vars(weight)) == before


def test_clamped_levels(device: str) -> None:
    """Published files may hold scales that take codes beyond int8."""
    weight = random_weight(FORMATS["int4-two-level"], 16, 256, device)
    weight.scale.mul_(1.5)
    assert bool((weight.integers()[0] == -128).any()) and bool((weight.integers()[0] == 127).any())
    for tokens in (1, FEW_ROWS + 1):
        x = random_codes((tokens, 256), device)
        assert torch.equal(linear(x, weight), reference.linear(x, weight))


def test_float_weights_and_empty_batches(device: str) -> None:
    weight = torch.randn(8, 16, device=device)
    x = torch.randn(3, 16, device=device)
    assert torch.equal(linear(x, weight), reference.linear(x, weight))
    quantized = random_weight(FORMATS["int4-group"], 8, 128, device)
    assert linear(random_codes((0, 128), device), quantized).shape == (0, 8)
    with pytest.raises(TypeError, match="needs a quantized weight"):
        linear(random_codes((1, 16), device), weight)


def test_strided_codes(device: str) -> None:
    weight = random_weight(FORMATS["int4-group"], 8, 256, device)
    codes = torch.randint(-128, 128, (3, 512), dtype=torch.int8, device=device)[:, ::2]
    x = Quantized(codes, torch.tensor(0.5, device=device))
    torch.testing.assert_close(linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("tokens", [1, FEW_ROWS + 2, 260])
@pytest.mark.parametrize("first", [0, 16, 8], ids=["first", "aligned", "unaligned"])
@pytest.mark.parametrize("format", ["int4-group", "int8-channel"])
def test_part_of_wider_rows(format: str, first: int, tokens: int, device: str) -> None:
    """As dt_proj reads what x_proj gives; rows that tiles can read are not copied."""
    weight = random_weight(FORMATS[format], 24, 256, device)
    wide = torch.randint(-128, 128, (tokens, 304), dtype=torch.int8, device=device)
    x = Quantized(wide[:, first : first + 256], torch.tensor(0.5, device=device))
    kept = first % 16 == 0 and (tokens > FEW_ROWS or tokens == 1)
    assert (_rows(x.codes).data_ptr() == x.codes.data_ptr()) == kept
    torch.testing.assert_close(linear(x, weight), reference.linear(x, weight))
    halves = x.codes.half() / 64
    wide_halves = torch.zeros(tokens, 304, dtype=torch.float16, device=device)
    wide_halves[:, first : first + 256] = halves
    strided = wide_halves[:, first : first + 256]
    assert torch.equal(linear(strided, weight), linear(halves, weight))
