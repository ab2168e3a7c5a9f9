"""The matrix products against loops over Python integers and float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from rounding import assert_codes, random_codes

from quamba.formats.activation import Quantized
from quamba.formats.packing import pack_int4
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.linear import int_matmul, linear
from quamba.kernels.reference.slabs import CPU_ROWS

pytestmark = pytest.mark.usefixtures("poison_empty")

FORMATS = {
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-channel": WeightFormat(8, "channel"),
    "int8-split": WeightFormat(8, "split", parts=(4, 7)),
    "int8-tensor-16": WeightFormat(8, "tensor", scale_bits=16),
    "int8-channel-16": WeightFormat(8, "channel", scale_bits=16),
    "int8-group": WeightFormat(8, "group", 8),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 8),
    "int4-one-group": WeightFormat(4, "group", 128),
}


def dyadic(*shape: int) -> torch.Tensor:
    """Powers of two from 2^-9 to 2^-6: products with integers and their sums are exact in float32."""
    return 2.0 ** torch.randint(-9, -5, shape).float()


def random_weight(rows: int, columns: int, format: WeightFormat, scale: torch.Tensor) -> QuantizedWeight:
    codes = torch.randint(format.qmin, format.qmax + 1, (rows, columns), dtype=torch.int8)
    return QuantizedWeight.from_codes(codes, scale.to(format.scale_dtype), format)


def loop(x: torch.Tensor, weight: QuantizedWeight, x_scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) int8 codes -> (M, N) float64: Python integers inside a group, Python floats outside."""
    width = weight.format.group_width(weight.shape[1])
    codes, scales = weight.codes().tolist(), weight.scale.double().expand(weight.shape[0], -1).tolist()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64)
    for m, row in enumerate(x.tolist()):
        for n, column in enumerate(codes):
            total = 0.0
            for g, scale in enumerate(scales[n]):
                group = slice(g * width, (g + 1) * width)
                total += scale * sum(a * b for a, b in zip(row[group], column[group], strict=True))
            out[m, n] = x_scale * total + (0.0 if bias is None else float(bias[n]))
    return out


@pytest.mark.parametrize("m", [0, 1, 2, 17, 513])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 33, 64])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_int_matmul_is_exact(m: int, k: int, n: int) -> None:
    a, b = random_codes(m, k), random_codes(n, k)
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    product = int_matmul(a, b)
    assert product.dtype == torch.int32
    assert np.array_equal(product.numpy(), expected)


def test_int_matmul_holds_the_largest_sums() -> None:
    """8192 products of -128 * -128 make 2^27, which neither int16 sums nor float32 products keep."""
    a = torch.full((2, 8192), -128, dtype=torch.int8)
    b = a.clone()
    b[1, 0] = -127
    assert int_matmul(a, b).tolist() == [[2**27, 2**27 - 128]] * 2


def test_int_matmul_takes_views() -> None:
    a, b = random_codes(7, 40), random_codes(9, 40)
    expected = a[:, 8:24].long() @ b[:, 8:24].long().T
    assert torch.equal(int_matmul(a[:, 8:24], b[:, 8:24]).long(), expected)
    assert torch.equal(int_matmul(random_codes(16, 7).T[:0], b[:, :16]), torch.zeros(0, 9, dtype=torch.int32))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("with_bias", [False, True])
def test_integer_product(name: str, rows: int, with_bias: bool) -> None:
    """With power-of-two scales nothing is rounded before the end, so floats and codes are exact."""
    format = FORMATS[name]
    weight = random_weight(11, 24, format, dyadic(*format.scale_shape((11, 24))))
    x, bias = random_codes(rows, 24), torch.randint(-64, 64, (11,)) / 16 if with_bias else None
    given = Quantized(x, torch.tensor(2.0**-7))
    exact = loop(x, weight, 2.0**-7, bias)
    assert torch.equal(linear(given, weight, bias).double(), exact)
    assert torch.equal(linear(given, weight, bias, out_dtype=torch.float64), exact)
    assert torch.equal(linear(given, weight, bias, out_dtype=torch.float16), exact.to(torch.float16))
    for out_scale in (torch.tensor(2.0**-5), dyadic(11)):
        codes = linear(given, weight, bias, out_scale=out_scale)
        assert codes.dtype == torch.int8
        expected = (exact / out_scale.double()).round().clamp(-128, 127)
        assert torch.equal(codes.double(), expected)


def random_two_levels(rows: int, columns: int, size: int, channel_scale: torch.Tensor) -> QuantizedWeight:
    """Group scales in eighths up to 15.875: many products with codes lie in the middle of two integers."""
    format = WeightFormat(4, "two_level", size)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = torch.randint(1, 128, (rows, columns // size)).to(torch.float16) / 8
    return QuantizedWeight(pack_int4(codes), scale, format, channel_scale)


def two_level_integers(weight: QuantizedWeight) -> np.ndarray:
    """round(scale * code) in exact arithmetic, ties to even, int64 [N, K]."""
    width = weight.format.group_width(weight.shape[1])
    rows = [
        [round(Fraction(scales[k // width]) * code) for k, code in enumerate(codes)]
        for codes, scales in zip(weight.codes().tolist(), weight.scale.tolist(), strict=True)
    ]
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize("size", [4, 8, 24])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_levels_of_scales(size: int, with_bias: bool) -> None:
    weight = random_two_levels(11, 24, size, dyadic(11, 1))
    integers = two_level_integers(weight)
    assert 100 < np.abs(integers).max() <= 127
    assert np.array_equal(weight.integers()[0].numpy(), integers)
    x, bias = random_codes(9, 24), torch.randint(-64, 64, (11,)) / 16 if with_bias else None
    sums = torch.from_numpy(x.numpy().astype(np.int64) @ integers.T).double()
    exact = sums * weight.channel_scale[:, 0].double() * 2.0**-7 + (0 if bias is None else bias.double())
    given = Quantized(x, torch.tensor(2.0**-7))
    assert torch.equal(linear(given, weight, bias).double(), exact)
    codes = linear(given, weight, bias, out_scale=torch.tensor(2.0**-4))
    assert torch.equal(codes.double(), (exact * 16).round().clamp(-128, 127))
    real = torch.from_numpy(integers).double() * weight.channel_scale.double()
    wide = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(
        linear(wide, weight, out_dtype=torch.float64), wide @ real.T, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("name", ["int8-channel", "int4-group"])
def test_any_scales(name: str) -> None:
    format = FORMATS[name]
    weight = random_weight(11, 24, format, torch.rand(format.scale_shape((11, 24))) * 0.02 + 0.001)
    x, x_scale, bias = random_codes(9, 24), torch.tensor(0.0371), torch.randn(11)
    exact = loop(x, weight, float(x_scale), bias)
    y = linear(Quantized(x, x_scale), weight, bias)
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=1e-6)
    out_scale = torch.rand(11) * 0.1 + 0.03
    codes = linear(Quantized(x, x_scale), weight, bias, out_scale=out_scale)
    assert_codes(codes, exact / out_scale.double())


@pytest.mark.parametrize("name", ["int8-channel", "int4-group"])
@pytest.mark.parametrize("rows", [CPU_ROWS - 1, CPU_ROWS, CPU_ROWS + 1, 2 * CPU_ROWS + 1])
def test_slab_borders(name: str, rows: int) -> None:
    format = FORMATS[name]
    weight = random_weight(5, 16, format, dyadic(*format.scale_shape((5, 16))))
    x, bias = random_codes(rows, 16), torch.arange(5.0)
    width = format.group_width(16)
    sums = np.einsum(
        "mgk,ngk->mng",
        x.numpy().astype(np.int64).reshape(rows, -1, width),
        weight.codes().numpy().astype(np.int64).reshape(5, -1, width),
    )
    exact = torch.from_numpy((sums * weight.scale.double().numpy()).sum(-1)) + bias.double()
    one = torch.tensor(1.0)
    assert torch.equal(linear(Quantized(x, one), weight, bias).double(), exact)
    codes = linear(Quantized(x, one), weight, bias, out_scale=one)
    assert torch.equal(codes.double(), exact.round().clamp(-128, 127))


def test_codes_saturate_on_both_sides() -> None:
    weight = QuantizedWeight.from_codes(
        torch.tensor([[127], [-127]], dtype=torch.int8), torch.ones(2, 1), WeightFormat(8, "channel")
    )
    x = Quantized(torch.tensor([[127], [-128], [1]], dtype=torch.int8), torch.tensor(1.0))
    codes = linear(x, weight, out_scale=torch.tensor(1.0))
    assert codes.tolist() == [[127, -128], [-128, 127], [127, -127]]


def test_folded_input_scale_is_not_applied_again() -> None:
    weight = random_weight(5, 16, FORMATS["int8-channel"], dyadic(5, 1))
    x, scales = random_codes(3, 16), torch.rand(16)
    y = linear(Quantized(x, scales), weight, input_scale_folded=True)
    assert torch.equal(y.double(), loop(x, weight, 1.0, None))
    with pytest.raises(ValueError, match="must be folded"):
        linear(Quantized(x, scales), weight)


def test_integers_need_a_quantized_weight() -> None:
    with pytest.raises(TypeError, match="quantized weight"):
        linear(Quantized(random_codes(2, 4), torch.tensor(1.0)), torch.randn(3, 4))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float_product(quantized: bool, with_bias: bool) -> None:
    """Float inputs, float or weight-only: a loop in float64."""
    if quantized:
        format = FORMATS["int4-group"]
        weight = random_weight(7, 24, format, torch.rand(format.scale_shape((7, 24))))
        real = weight.codes().double() * weight.scale.double().repeat_interleave(8, dim=1)
    else:
        weight = real = torch.randn(7, 24, dtype=torch.float64)
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64) if with_bias else None
    expected = torch.empty(2, 3, 7, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for n in range(7):
                total = sum(float(x[b, t, k]) * float(real[n, k]) for k in range(24))
                expected[b, t, n] = total + (float(bias[n]) if bias is not None else 0.0)
    y = linear(x, weight, bias, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    out_scale = torch.rand(7) + 0.1
    assert_codes(linear(x, weight, bias, out_scale=out_scale), expected / out_scale.double(), slack=1e-9)
    single = linear(x.float(), weight, bias)
    plain = torch.nn.functional.linear(x.float(), real.float(), None if bias is None else bias.float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() <= 2 * (plain - expected).abs().max()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (2, 3, 4, 16), (16,)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    weight = random_weight(5, 16, FORMATS["int4-group"], dyadic(5, 2))
    x = random_codes(*shape)
    y = linear(Quantized(x, torch.tensor(1.0)), weight)
    assert torch.equal(y.double(), loop(x.reshape(-1, 16), weight, 1.0, None).view(*shape[:-1], 5))
    real = linear(x.float(), weight)
    assert real.shape == y.shape


def test_non_contiguous_input_is_left_alone() -> None:
    weight = random_weight(5, 16, FORMATS["int8-channel"], dyadic(5, 1))
    wide = random_codes(2, 3, 40)
    x = wide[..., 8:24]
    before = wide.clone()
    y = linear(Quantized(x, torch.tensor(0.5)), weight)
    assert torch.equal(y.double().view(6, 5), loop(x.reshape(6, 16), weight, 0.5, None))
    assert torch.equal(wide, before)
