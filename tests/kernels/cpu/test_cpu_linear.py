"""Products with quantized weights, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.cases import Draw
from quamba.kernels.cpu import abi
from quamba.kernels.cpu.linear import describe, linear
from quamba.kernels.reference.linear import linear as reference

FORMATS = {
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-channel": WeightFormat(8, "channel"),
    "int8-group": WeightFormat(8, "group", 32),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 128),
    "int4-multiples": WeightFormat(4, "group", 128, multiples=16),
    "int4-small-group": WeightFormat(4, "group", 16),
    "int4-two-level": WeightFormat(4, "two_level", 128),
}
ROWS = (1, 2, 3, 4, 5, 11, 12, 33)
#: Half a step of an input, as a share of the largest in its segment.
HALF_STEP = 0.5 / 16256

pytestmark = pytest.mark.usefixtures("instruction_set", "threads")


@pytest.fixture(params=list(FORMATS))
def format(request: pytest.FixtureRequest) -> WeightFormat:
    return FORMATS[request.param]


def integers(d: Draw, rows: int, columns: int) -> Quantized:
    return Quantized(d.codes(rows, columns), torch.tensor(2.0**-5))


@pytest.mark.parametrize(("outputs", "columns"), [(1, 128), (49, 384), (130, 256)], ids=lambda n: f"{n}")
def test_sums_of_integers_are_exact(format: WeightFormat, outputs: int, columns: int) -> None:
    d = Draw(outputs)
    weight = d.weight(outputs, columns, format, exact=True)
    for rows in ROWS:
        x = integers(d, rows, columns)
        assert torch.equal(linear(x, weight), reference(x, weight)), f"{rows} rows"


@pytest.mark.parametrize("rows", [12, 33])
def test_rows_of_multiples_are_one_sum(rows: int) -> None:
    """Many rows of integers, and a number of the row that is no power of two."""
    d = Draw(rows)
    format, outputs, columns = FORMATS["int4-multiples"], 49, 384
    unit, times = d.integers(64, 127, outputs, 1) * 2.0**-18, d.integers(1, 16, outputs, 3)
    codes = d.integers(-8, 7, outputs, columns).to(torch.int8)
    weight = QuantizedWeight.from_codes(codes, (unit * times).half(), format)
    x = Quantized(d.codes(rows, columns), torch.tensor(0.013))
    integers = codes.int() * times.int().repeat_interleave(128, 1)
    sums = x.codes.long() @ integers.long().t()
    assert torch.equal(linear(x, weight), sums.float() * unit.t() * x.scale)
    for some, whole in ((x, True), (Quantized(x.codes[:11], x.scale), False), (x.codes.float(), False)):
        count = (some.codes if isinstance(some, Quantized) else some).shape[0]
        described = describe(some, weight, None, abi.tensor(torch.empty(count, outputs)), False)
        assert bool(described.row_unit) == whole


@pytest.mark.parametrize("columns", [2, 6, 48, 80, 160, 130])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_fill_no_vector(bits: int, columns: int) -> None:
    d = Draw(columns)
    weight = d.weight(19, columns, WeightFormat(bits, "channel"), exact=True)
    for rows in (1, 3, 17):
        x = integers(d, rows, columns)
        assert torch.equal(linear(x, weight), reference(x, weight)), f"{rows} rows"


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_codes_are_of_the_same_floats(format: WeightFormat, rows: int) -> None:
    d = Draw(rows)
    weight = d.weight(70, 256, format, exact=True)
    x, bias, scale = integers(d, rows, 256), d.integers(-99, 99, 70).float(), d.powers(-3, 1, 70)
    given = linear(x, weight, bias, out_scale=scale)
    assert given.dtype == torch.int8
    assert torch.equal(given, reference(x, weight, bias, out_scale=scale))
    one = torch.tensor(0.5)
    assert torch.equal(linear(x, weight, out_scale=one), reference(x, weight, out_scale=one))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [48, 256, 416])
def test_floats_are_read_in_15_bits(dtype: torch.dtype, columns: int) -> None:
    d = Draw(columns)
    for name in ("int8-channel", "int4-channel", "int4-group", "int4-two-level"):
        if columns == 416 and name in ("int4-group", "int4-two-level"):
            continue
        weight = d.weight(37, columns, FORMATS[name])
        for rows in (1, 2, 3, 7, 13):
            x = (d.floats(rows, columns) * d.powers(-3, 3, rows, 1)).to(dtype)
            exact = x.double() @ weight.dequantize(torch.float64).t()
            given = linear(x, weight, out_dtype=dtype)
            reach = x.double().abs().amax(-1, keepdim=True) * weight.dequantize(torch.float64).abs().sum(-1)
            allowed = 1.001 * HALF_STEP * reach + torch.finfo(dtype).eps * exact.abs()
            assert (given.double() - exact).abs().le(allowed).all(), f"{name}, {rows} rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 5, 48, 131, 256])
def test_float_weights(dtype: torch.dtype, columns: int) -> None:
    d = Draw(columns)
    weight, bias = d.floats(37, columns).to(dtype), d.floats(37)
    for rows in (1, 2, 3, 4, 7, 8, 9, 12, 29):
        x = d.floats(rows, columns).to(dtype)
        exact = x.double() @ weight.double().t() + bias.double()
        given = linear(x, weight, bias, out_dtype=dtype)
        size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
        error = (given.double() - exact).abs()
        own = (reference(x, weight, bias, out_dtype=dtype).double() - exact).abs()
        assert given.dtype == dtype
        if dtype == torch.float32 or rows < 9:  # else torch's, whose sums are rounded on the way
            assert error.le(torch.finfo(dtype).eps * exact.abs() + 1e-6 * size).all(), f"{rows} rows"
        assert error.max() <= 2 * own.max() + 1e-6, f"{rows} rows"


def test_a_float_row_of_zeros() -> None:
    weight = Draw(0).weight(9, 128, FORMATS["int4-group"])
    x = torch.zeros(2, 128)
    x[1] = 1.0
    y = linear(x, weight)
    assert torch.equal(y[0], torch.zeros(9))
    assert torch.allclose(y[1], weight.dequantize().sum(1), rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_wider_tensor() -> None:
    d = Draw(3)
    wide, weight = d.codes(2, 5, 400), d.weight(24, 128, FORMATS["int8-channel"], exact=True)
    x = Quantized(wide[..., 100:228], torch.tensor(0.5))
    y = linear(x, weight)
    assert y.shape == (2, 5, 24)
    assert torch.equal(y, reference(x, weight))


def test_nothing_beyond_the_weight_is_read_or_written() -> None:
    """At the end of the tables vectors reach over: what lies there must not count, nor change."""
    d = Draw(5)
    for format in FORMATS.values():
        weight = d.weight(3, 128, format, exact=True)
        held = torch.full((weight.data.numel() + 512,), 77, dtype=weight.data.dtype)
        held[: weight.data.numel()] = weight.data.flatten()
        shifted = QuantizedWeight(
            held[: weight.data.numel()].view(weight.data.shape), weight.scale, format, weight.channel_scale
        )
        x = integers(d, 2, 128)
        assert torch.equal(linear(x, shifted), reference(x, weight))
        assert torch.all(held[weight.data.numel() :] == 77)


def test_what_has_no_kernel_is_the_reference() -> None:
    d = Draw(1)
    weight = d.weight(8, 128, FORMATS["int4-group"])
    x = d.floats(3, 128).double()
    assert torch.equal(
        linear(x, weight, out_dtype=torch.float64), reference(x, weight, out_dtype=torch.float64)
    )
    odd = d.weight(8, 126, WeightFormat(4, "group", 7))
    codes = integers(d, 3, 126)
    assert torch.equal(linear(codes, odd), reference(codes, odd))


def test_a_scale_a_channel_must_be_folded() -> None:
    d = Draw(2)
    x, weight = d.quantized(3, 128, per_channel=True), d.weight(8, 128, FORMATS["int8-channel"], exact=True)
    with pytest.raises(ValueError, match="folded"):
        linear(x, weight)
    folded = linear(x, weight, input_scale_folded=True)
    assert torch.equal(folded, reference(x, weight, input_scale_folded=True))


def test_no_rows() -> None:
    weight: QuantizedWeight = Draw(0).weight(8, 128, FORMATS["int8-channel"])
    empty: Tensor = linear(Quantized(torch.empty(0, 128, dtype=torch.int8), torch.tensor(1.0)), weight)
    assert empty.shape == (0, 8)
