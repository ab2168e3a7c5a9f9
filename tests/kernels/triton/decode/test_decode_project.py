"""Projections of a step, and what follows the product: every kind of vector and weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from decode_cases import assert_as_accurate, guarded, is_untouched, real, split_rows
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Quantized, Rounding
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.conv import causal_conv1d
from quamba.kernels.reference.linear import linear
from quamba.kernels.reference.norm import add_norm
from quamba.kernels.triton.decode.norm import norm
from quamba.kernels.triton.decode.project import CODES, FLOATS, HALVES, WIDE, ConvStep, Matrix, project
from quamba.kernels.triton.decode.vectors import BLOCK, Normed, Vector

FORMATS = {
    "int4-group": WeightFormat(4, "group", 128),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-two-level": WeightFormat(4, "two_level", 128),
    "int8-channel": WeightFormat(8, "channel"),
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-group": WeightFormat(8, "group", 128),
}
#: Those that read split vectors, too.
SPLITTABLE = ("int4-group", "int4-channel")
OPERANDS = [(name, split) for name in FORMATS for split in (False, True) if not split or name in SPLITTABLE]
#: batch, features, inputs; rows and elements of a program: several chunks, the last one shorter (2560, 384
#: and 896 inputs), masked (896), or one chunk that is longer than the row (128).
SHAPES = [(1, 6, 2560, 8, 128), (3, 19, 384, 16, 32), (4, 5, 896, 8, 64), (2, 9, 128, 4, 256)]
#: Every operand with two of the shapes, every shape with words of int4 and of int8.
CASES = [(*operand, shape) for i, operand in enumerate(OPERANDS) for shape in SHAPES[i % 2 :: 2]]
CASES += [("int4-group", True, SHAPES[0]), ("int8-channel", False, SHAPES[0])]
UseRows = Callable[[int, int], None]


def random_weight(
    name: str, features: int, inputs: int, device: torch.device, unit: float | None = None
) -> QuantizedWeight:
    """Scales differ by up to a factor of 10. unit: all are this one, and all codes have 4 bits."""
    format = FORMATS[name]
    codes = random_codes(features, inputs, low=-127)
    if format.bits == 4 or unit is not None:
        codes = torch.randint(-8, 8, (features, inputs), dtype=torch.int8)
    one = format.one_level
    step = 0.01 if format.bits == 8 else 0.16
    scale = torch.rand(one.scale_shape((features, inputs))) * step + step / 10
    scale = (scale if unit is None else torch.full_like(scale, unit)).to(one.scale_dtype)
    return QuantizedWeight.from_codes(codes, scale, format).to(device)


def coded(codes: Tensor, split: bool = False, space: int = 0) -> Vector:
    """space: bytes between the rows."""
    values = split_rows(codes) if split else codes
    wider = torch.cat([values, values[:, :space]], dim=1)
    return Vector(wider[:, : values.shape[1]], None, split)


def random_wide(batch: int, inputs: int, device: torch.device, split: bool) -> Vector:
    values = random_codes(batch, 2, inputs)
    values[:, 0].clamp_(min=-127)
    scale = torch.rand(batch, inputs // BLOCK) * 1e-4 + 1e-6
    return Vector((split_rows(values) if split else values).to(device), scale.to(device), split)


def matrix_of(weight: Tensor | QuantizedWeight, x: Vector | Normed, kind: int) -> Matrix:
    matrix = Matrix.of(weight, x)
    assert matrix is not None and matrix.kind == kind
    return matrix


@pytest.mark.parametrize(("name", "split", "shape"), CASES, ids=str)
def test_codes(
    name: str, split: bool, shape: tuple[int, ...], use_rows: UseRows, device: torch.device
) -> None:
    """Floats out; rows of x are apart, and x has a scale or a weight that contains it."""
    batch, features, inputs, rows, chunk = shape
    use_rows(rows, chunk)
    weight, bias = random_weight(name, features, inputs, device), torch.randn(features, device=device)
    x = Quantized(random_codes(batch, inputs).to(device), torch.tensor(0.02, device=device))
    vector = coded(x.codes, split, space=64)
    out, behind = guarded(batch, features, torch.float32, device)
    project(vector, matrix_of(weight, vector, CODES), out, x_scale=x.scale, bias=bias)
    exact = x.dequantize(torch.float64) @ weight.dequantize(torch.float64).T + bias.double()
    assert_as_accurate(out, linear(x, weight, bias), exact)
    project(vector, matrix_of(weight, vector, CODES), out)
    exact = x.codes.double() @ weight.dequantize(torch.float64).T
    assert_as_accurate(out, linear(x, weight, input_scale_folded=True), exact)
    assert is_untouched(behind)


@pytest.mark.parametrize(("name", "split"), OPERANDS)
@pytest.mark.parametrize(("channels", "folded"), [(False, False), (True, True)], ids=["one-scale", "folded"])
def test_codes_out(
    name: str, split: bool, channels: bool, folded: bool, use_rows: UseRows, device: torch.device
) -> None:
    batch, features, inputs = 2, 19, 384
    use_rows(32, 32)
    weight, bias = random_weight(name, features, inputs, device), torch.randn(features, device=device)
    x_scale = torch.tensor(1.0 if folded else 0.02)
    x = Quantized(random_codes(batch, inputs).to(device), x_scale.to(device))
    step = 1.5 if folded else 0.03
    scale = (torch.rand(features if channels else ()) * step + step / 3).to(device)
    vector = coded(x.codes, split)
    out, behind = guarded(batch, features, torch.int8, device)
    given = None if folded else x.scale
    project(vector, matrix_of(weight, vector, CODES), out, x_scale=given, bias=bias, out_scale=scale)
    expected = linear(x, weight, bias, out_scale=scale, input_scale_folded=folded)
    real_codes = linear(x, weight, bias).double() / scale
    near_tie = ((real_codes - real_codes.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(out[~near_tie], expected[~near_tie])
    assert near_tie.sum() <= 2 and int((out.int() - expected.int()).abs().max()) <= 1
    assert (expected == 127).any() and (expected == -128).any() and (expected.abs() < 127).any()
    assert is_untouched(behind)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int4-two-level"])
def test_ties_of_codes(name: str, use_rows: UseRows, device: torch.device) -> None:
    """Scales are powers of two, so nothing is rounded before the codes, and a quarter of them are halves."""
    use_rows(16, 16)
    weight = random_weight(name, 24, 256, device, unit=2.0**-8)
    x = Quantized((random_codes(3, 256) // 32).to(device), torch.tensor(0.25, device=device))
    bias = (torch.randint(-8, 8, (24,)) * 2.0**-10).to(device)
    scale = torch.tensor(2.0**-8, device=device)
    vector = coded(x.codes)
    out, _ = guarded(3, 24, torch.int8, device)
    project(vector, matrix_of(weight, vector, CODES), out, x_scale=x.scale, bias=bias, out_scale=scale)
    quotient = linear(x, weight, bias) / scale
    assert torch.equal(out, quotient.round().clamp(-128, 127).to(torch.int8))
    assert torch.equal(out, linear(x, weight, bias, out_scale=scale))
    assert (quotient - quotient.floor() == 0.5).sum() > 8, "no ties"


def test_the_largest_sums(use_rows: UseRows, device: torch.device) -> None:
    """All codes at the end of their range, where 2560 products of a lane are summed in integers."""
    use_rows(4, 128)
    for name, code in (("int4-channel", -8), ("int8-tensor", -127)):
        format = FORMATS[name]
        codes = torch.full((2, 2560), code, dtype=torch.int8)
        weight = QuantizedWeight.from_codes(codes, torch.ones(format.scale_shape((2, 2560))), format).to(
            device
        )
        ends = torch.tensor([[-128], [127]], dtype=torch.int8, device=device).expand(2, 2560).contiguous()
        out, _ = guarded(2, 2, torch.float32, device)
        project(coded(ends), matrix_of(weight, coded(ends), CODES), out)
        expected = torch.tensor([[-128.0], [127.0]], device=device) * 2560 * code
        assert torch.equal(out, expected.expand(2, 2))
        wide = Vector(ends[:, None].repeat(1, 2, 1).clamp(min=-127), torch.ones(2, 80, device=device))
        project(wide, matrix_of(weight, wide, WIDE), out)
        expected = torch.tensor([[-127.0 * 257], [127.0 * 257]], device=device) * 2560 * code
        torch.testing.assert_close(out, expected.expand(2, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "split", "shape"), CASES, ids=str)
def test_wide_codes(
    name: str, split: bool, shape: tuple[int, ...], use_rows: UseRows, device: torch.device
) -> None:
    batch, features, inputs, rows, chunk = shape
    use_rows(rows, chunk)
    weight, bias = random_weight(name, features, inputs, device), torch.randn(features, device=device)
    x = random_wide(batch, inputs, device, split)
    out, behind = guarded(batch, features, torch.float32, device)
    project(x, matrix_of(weight, x, WIDE), out, bias=bias)
    exact = real(x) @ weight.dequantize(torch.float64).T + bias.double()
    assert_as_accurate(out, linear(real(x).float(), weight, bias), exact)
    assert is_untouched(behind)


def normed(batch: int, inputs: int, scale: Tensor | None, weighted: bool, device: torch.device) -> Normed:
    """Of a residual whose norm has no ties of codes, which a sum in another order may round elsewhere."""
    weight = torch.rand(inputs) + 0.5 if weighted else None
    residual = torch.randn(batch, inputs) * torch.tensor([[0.1], [3.0], [1.0], [40.0]])[:batch]
    for _ in range(50):
        exact, _ = add_norm(residual.double(), None, weight, eps=1e-3, out_dtype=torch.float64)
        quotient = exact / (1.0 if scale is None else scale.double())
        ties = (quotient - quotient.floor() - 0.5).abs() < 1e-4
        if scale is None or not ties.any():
            given = None if weight is None else weight.to(device)
            return Normed(residual.to(device), given, None if scale is None else scale.to(device), 1e-3)
        residual[ties] += 0.01 * residual[ties].abs() + 1e-3
    raise AssertionError("ties remain")


@pytest.mark.parametrize("wide", [False, True], ids=["codes", "wide"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[3]], ids=str)
def test_norm_as_it_reads(
    name: str, wide: bool, shape: tuple[int, ...], use_rows: UseRows, device: torch.device
) -> None:
    """What the norm's own launch and a projection of its result give."""
    batch, features, inputs, rows, chunk = shape
    use_rows(rows, chunk)
    weight = random_weight(name, features, inputs, device)
    x = normed(batch, inputs, None if wide else torch.tensor(0.02), batch > 2, device)
    stored = Vector.wide(batch, inputs, device, False) if wide else Vector.codes(batch, inputs, device, False)
    norm(x.residual, x.weight, x.scale, stored, x.eps)
    assert wide or int(stored.values.abs().max()) == 127
    kind = WIDE if wide else CODES
    (out, behind), (expected, _) = (guarded(batch, features, torch.float32, device) for _ in range(2))
    project(x, matrix_of(weight, x, kind), out, x_scale=x.scale)
    project(stored, matrix_of(weight, stored, kind), expected, x_scale=x.scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert wide or torch.equal(out, expected)
    assert is_untouched(behind)


@pytest.mark.parametrize("name", SPLITTABLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves(name: str, shape: tuple[int, ...], use_rows: UseRows, device: torch.device) -> None:
    """float16 and int4: at most twice the error of the reference in float16, which rounds each weight."""
    batch, features, inputs, rows, chunk = shape
    use_rows(rows, chunk)
    weight, bias = random_weight(name, features, inputs, device), torch.randn(features, device=device)
    x = torch.randn(batch, inputs, device=device).half()
    vector = Vector(torch.cat([x, x[:, :32]], dim=1)[:, :inputs])
    out, behind = guarded(batch, features, torch.float16, device)
    project(vector, matrix_of(weight, vector, HALVES), out, bias=bias)
    exact = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    plain = linear(x, weight, bias, out_dtype=torch.float16)
    assert float((out - exact).norm()) <= 2 * float((plain - exact).norm())
    assert is_untouched(behind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats(dtype: torch.dtype, shape: tuple[int, ...], use_rows: UseRows, device: torch.device) -> None:
    batch, features, inputs, rows, chunk = shape
    use_rows(rows, 4 * chunk)
    weight = (torch.randn(features, inputs) * inputs**-0.5).to(device, dtype)
    bias, x = torch.randn(features, device=device), torch.randn(batch, inputs).to(device, dtype)
    vector = Vector(torch.cat([x, x[:, :20]], dim=1)[:, :inputs])
    out, behind = guarded(batch, features, torch.float32, device)
    project(vector, matrix_of(weight, vector, FLOATS), out, bias=bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert_as_accurate(out, linear(x.float(), weight.float(), bias), exact)
    assert is_untouched(behind)


def test_floats_of_no_whole_words(use_rows: UseRows, device: torch.device) -> None:
    """What is behind a row is not read: after the last one it may be anything."""
    use_rows(8, 64)
    weight, x = guarded(5, 75, torch.float32, device)[0], Vector(torch.randn(2, 75, device=device))
    weight.normal_()
    out, _ = guarded(2, 5, torch.float32, device)
    project(x, matrix_of(weight, x, FLOATS), out)
    assert_as_accurate(out, linear(x.values, weight), real(x) @ weight.double().T)


@pytest.mark.parametrize("kind", ["codes", "wide", "halves", "floats"])
def test_launches_of_the_heuristic(kind: str, device: torch.device) -> None:
    batch, features, inputs = 2, 3, 256
    weight: Tensor | QuantizedWeight = random_weight("int4-group", features, inputs, device)
    if kind == "codes":
        x = coded(random_codes(batch, inputs).to(device))
    elif kind == "wide":
        x = random_wide(batch, inputs, device, split=True)
    else:
        x = Vector(torch.randn(batch, inputs, device=device).half())
    if kind == "floats":
        weight = torch.randn(features, inputs, device=device).half()
    matrix = Matrix.of(weight, x)
    assert matrix is not None
    out, behind = guarded(batch, features, torch.float32, device)
    project(x, matrix, out)
    w = weight.double() if isinstance(weight, Tensor) else weight.dequantize(torch.float64)
    torch.testing.assert_close(out.double(), real(x) @ w.T, rtol=1e-3, atol=5e-3)
    assert is_untouched(behind)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["codes", "wide", "floats"])
def test_the_residual_sum(
    kind: str, residual_dtype: torch.dtype, use_rows: UseRows, device: torch.device
) -> None:
    """It has what the projection alone would have given, rounded to float16, and that is not written."""
    batch, features, inputs = 3, 19, 256
    use_rows(16, 64)
    weight: Tensor | QuantizedWeight = random_weight("int4-group", features, inputs, device)
    if kind == "codes":
        x = coded(random_codes(batch, inputs).to(device), split=True)
    elif kind == "wide":
        x = random_wide(batch, inputs, device, split=True)
    else:
        x, weight = (
            Vector(torch.randn(batch, inputs, device=device).half()),
            torch.randn(features, inputs, device=device).half(),
        )
    matrix, bias = Matrix.of(weight, x), torch.randn(features, device=device)
    assert matrix is not None
    scale = torch.tensor(0.02, device=device) if kind == "codes" else None
    alone, _ = guarded(batch, features, torch.float16, device)
    project(x, matrix, alone, x_scale=scale, bias=bias)
    residual, behind = guarded(batch, features, residual_dtype, device)
    before = torch.randn(batch, features).to(device, residual_dtype)
    residual.copy_(before)
    unused, _ = guarded(batch, 1, torch.float16, device)
    project(x, matrix, unused, x_scale=scale, bias=bias, residual=residual)
    assert torch.equal(residual, before + alone.to(residual_dtype))
    assert is_untouched(unused) and is_untouched(behind)


# The convolution: its channels begin and end in the middle of programs of 16 rows, between others of the same
# projection; the last program is ragged.
FEATURES, FIRST, CHANNELS, INPUTS = 45, 19, 20, 128
IN_CONV = slice(FIRST, FIRST + CHANNELS)


def random_taps(kind: str, width: int, device: torch.device) -> Tensor | QuantizedWeight:
    if kind == "float":
        return torch.randn(CHANNELS, width).to(device) * 0.5
    format = WeightFormat(8, "tensor" if kind == "tensor" else "channel")
    scale = torch.rand(format.scale_shape((CHANNELS, width))) * 0.008 + 0.002
    return QuantizedWeight(random_codes(CHANNELS, width, low=-127), scale, format).to(device)


def conv_step(
    taps: Tensor | QuantizedWeight,
    window: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    rounding: Rounding = "half_even",
) -> ConvStep:
    away = rounding == "half_away"
    if isinstance(taps, QuantizedWeight):
        return ConvStep(FIRST, window, taps.codes(), taps.scale, bias, out_scale, away)
    return ConvStep(FIRST, window, taps, None, bias, out_scale, away)


@pytest.mark.parametrize(
    ("taps_kind", "width", "scales", "batch"),
    [
        ("tensor", 4, "one", 1),
        ("channel", 4, "channels", 3),
        ("float", 4, "channels", 2),
        ("channel", 2, "one", 4),
        ("tensor", 2, "channels", 1),
        ("float", 2, "one", 2),
        ("channel", 1, "channels", 2),
    ],
)
def test_conv_of_codes(
    taps_kind: str, width: int, scales: str, batch: int, use_rows: UseRows, device: torch.device
) -> None:
    use_rows(16, 32)
    weight = random_weight("int4-channel", FEATURES, INPUTS, device)
    x = Quantized(random_codes(batch, INPUTS).to(device), torch.tensor(0.02, device=device))
    by_channel = scales == "channels"
    scale = (torch.rand(FEATURES if by_channel else ()) * 0.1 + 0.05).to(device)
    conv_scale = (torch.rand(CHANNELS if by_channel else ()) * 0.05 + 0.03).to(device)
    taps = random_taps(taps_kind, width, device)
    bias = torch.randn(CHANNELS, device=device) if width == 4 else None
    window = random_codes(batch, width - 1, CHANNELS).to(device)
    expected_window = window.clone()

    out, behind = guarded(batch, FEATURES, torch.int8, device)
    conv = conv_step(taps, window, bias, conv_scale)
    vector = coded(x.codes)
    matrix = matrix_of(weight, vector, CODES)
    project(vector, matrix, out, x_scale=x.scale, out_scale=scale, conv=conv)

    projected = linear(x, weight, out_scale=scale)
    exact = causal_conv1d(
        Quantized(projected, scale).dequantize(torch.float64)[:, None, IN_CONV],
        taps.dequantize(torch.float64) if isinstance(taps, QuantizedWeight) else taps.double(),
        None if bias is None else bias.double(),
        state=Quantized(expected_window, scale[IN_CONV] if by_channel else scale).dequantize(torch.float64),
        out_dtype=torch.float64,
    )[:, 0]
    conv_in = Quantized(projected[:, None, IN_CONV], scale[IN_CONV] if by_channel else scale)
    causal_conv1d(conv_in, taps, bias, state=expected_window, out_scale=conv_scale)

    assert torch.equal(window, expected_window)
    assert torch.equal(out[:, :FIRST], projected[:, :FIRST])
    assert torch.equal(out[:, IN_CONV.stop :], projected[:, IN_CONV.stop :])
    assert_codes(out[:, IN_CONV], exact / conv_scale.double(), slack=1e-4)
    assert out[:, IN_CONV].unique().numel() > 8
    assert is_untouched(behind)


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_ties_of_the_conv(rounding: Rounding, use_rows: UseRows, device: torch.device) -> None:
    """silu(v) is v in float32 from 18 on: half of these are ties."""
    use_rows(16, 32)
    weight = random_weight("int8-tensor", FEATURES, INPUTS, device, unit=2.0**-10)
    x = Quantized(random_codes(2, INPUTS).abs().to(device), torch.tensor(1.0, device=device))
    weight.data.abs_()  # sums above 0
    scale, conv_scale = torch.tensor(8.0, device=device), torch.tensor(1.0, device=device)
    codes = torch.zeros(CHANNELS, 2, dtype=torch.int8)
    codes[:, 1] = 1
    taps = QuantizedWeight(codes, torch.full((1, 1), 2.0**-4), WeightFormat(8, "tensor")).to(device)
    bias = torch.full((CHANNELS,), 20.0, device=device)
    window = random_codes(2, 1, CHANNELS).to(device)
    conv = conv_step(taps, window.clone(), bias, conv_scale, rounding)
    out, _ = guarded(2, FEATURES, torch.int8, device)
    matrix = matrix_of(weight, coded(x.codes), CODES)
    project(coded(x.codes), matrix, out, x_scale=x.scale, out_scale=scale, conv=conv)

    projected = linear(x, weight, out_scale=scale)
    conv_in = Quantized(projected[:, None, IN_CONV], scale)
    expected = causal_conv1d(conv_in, taps, bias, state=window, out_scale=conv_scale, rounding=rounding)
    assert torch.equal(out[:, IN_CONV], expected[:, 0])
    other: Rounding = "half_away" if rounding == "half_even" else "half_even"
    other_codes = causal_conv1d(conv_in, taps, bias, out_scale=conv_scale, rounding=other)
    assert not torch.equal(other_codes, expected), "no ties"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("kind", ["wide", "floats"])
def test_conv_of_floats(
    dtype: torch.dtype, width: int, kind: str, use_rows: UseRows, device: torch.device
) -> None:
    batch = 2
    use_rows(16, 64)
    weight: Tensor | QuantizedWeight = random_weight("int4-group", FEATURES, INPUTS, device)
    x = random_wide(batch, INPUTS, device, split=True)
    if kind == "floats":
        weight = (torch.randn(FEATURES, INPUTS) * INPUTS**-0.5).to(device, dtype)
        x = Vector(torch.randn(batch, INPUTS).to(device, dtype))
    matrix = Matrix.of(weight, x)
    assert matrix is not None
    taps = random_taps("float", width, device).to(dtype)
    bias = torch.randn(CHANNELS).to(device, dtype)
    before = torch.randn(batch, width - 1, CHANNELS).to(device, dtype)
    projected, _ = guarded(batch, FEATURES, dtype, device)
    project(x, matrix, projected)
    window, behind_window = guarded(batch, (width - 1) * CHANNELS, dtype, device)
    window = window.view_as(before).copy_(before)
    out, behind = guarded(batch, FEATURES, dtype, device)
    project(x, matrix, out, conv=conv_step(taps, window, bias, None))

    conv_in = projected[:, None, IN_CONV]
    assert torch.equal(window, torch.cat([before, conv_in], dim=1)[:, 1:])
    exact, plain = (
        causal_conv1d(conv_in.to(wide), taps.to(wide), bias.to(wide), state=before.to(wide), out_dtype=wide)[
            :, 0
        ]
        for wide in (torch.float64, torch.float32)
    )
    assert_as_accurate(out[:, IN_CONV], plain.to(dtype), exact)
    outside = torch.ones(FEATURES, dtype=torch.bool, device=device)
    outside[IN_CONV] = False
    assert torch.equal(out[:, outside], projected[:, outside])
    assert is_untouched(behind) and is_untouched(behind_window)


def test_what_is_not_multiplied(device: torch.device) -> None:
    codes, halves = Vector.codes(1, 256, device, split=False), Vector.floats(1, 256, device, torch.float16)
    wide = Vector.wide(1, 256, device, split=False)
    floats = Vector.floats(1, 256, device, torch.float32)
    group = random_weight("int4-group", 4, 256, device)
    # Floats with 8 bits, or wider than float16; codes with floats.
    assert Matrix.of(random_weight("int8-channel", 4, 256, device), halves) is None
    assert Matrix.of(random_weight("int4-two-level", 4, 256, device), halves) is None
    assert Matrix.of(group, floats) is None
    for x in (codes, wide):
        assert Matrix.of(torch.randn(4, 256, device=device), x) is None
    # Groups of another size, and rows of no whole words.
    group_of_64 = WeightFormat(4, "group", 64)
    data, scale = torch.zeros(4, 128, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.float16)
    assert Matrix.of(QuantizedWeight(data, scale, group_of_64), codes) is None
    ragged = QuantizedWeight(torch.zeros(4, 40, dtype=torch.int8), torch.ones(4, 1), FORMATS["int8-channel"])
    assert Matrix.of(ragged, Vector.codes(1, 40, device, split=False)) is None
    # Strides.
    assert Matrix.of(torch.randn(256, 4, device=device).T, floats) is None
    strided = QuantizedWeight(
        torch.zeros(4, 512, dtype=torch.int8)[:, ::2], torch.ones(4, 1), FORMATS["int8-channel"]
    )
    assert Matrix.of(strided, codes) is None
    # And what is.
    found = [Matrix.of(group, x) for x in (codes, wide, halves)]
    assert [m.kind for m in found if m is not None] == [CODES, WIDE, HALVES]
