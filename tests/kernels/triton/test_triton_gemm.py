"""Products on tensor cores: every format on every way to share out the sum, ragged edges included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference import linear as reference
from quamba.kernels.triton import gemm
from quamba.kernels.triton.gemm import (
    Operand,
    Product,
    Target,
    TileLaunch,
    fits,
    in_planes,
    multiply,
    tile_launch,
)

FORMATS = {
    "int8-channel": WeightFormat(8, "channel"),
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-group": WeightFormat(8, "group", 128),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 128),
    "int4-group-of-48": WeightFormat(4, "group", 48),
    "int4-group-of-192": WeightFormat(4, "group", 192),
    "int4-two-level": WeightFormat(4, "two_level", 128),
}
LAUNCHES = {
    "whole": TileLaunch(64, 16),
    "splits": TileLaunch(64, 16, splits=3),
    "short-steps": TileLaunch(32, 16, inputs=64, splits=2),
    "slices": TileLaunch(16, 16, slices=4),
    "short-slices": TileLaunch(32, 32, inputs=64, slices=2),
    "order": TileLaunch(16, 16, order=2),
}
SENTINEL = -77


def random_weight(format: WeightFormat, features: int, inputs: int) -> QuantizedWeight:
    """Scales are powers of two, so every product of a sum and its scales is known to the last bit."""
    codes = torch.randint(
        -8 if format.bits == 4 else -128, 8 if format.bits == 4 else 128, (features, inputs)
    )
    shape = format.scale_shape((features, inputs))
    scale = torch.exp2(torch.randint(-8, -5, shape).float())
    if format.granularity != "two_level":
        return QuantizedWeight.from_codes(codes.to(torch.int8), scale.to(format.scale_dtype), format)
    weight = QuantizedWeight.from_codes(codes.to(torch.int8), scale.half(), format)
    levels = torch.rand(shape) * 17 + 0.3  # some products are above 127 and must be clamped
    levels[0] = 0.5  # ties
    return QuantizedWeight(
        weight.data, levels.half(), format, torch.exp2(torch.randint(-8, -5, (features, 1)).float())
    )


def operand_of(weight: QuantizedWeight) -> Operand:
    if weight.channel_scale is not None:
        return Operand(weight.data, 4, levels=weight.scale, row_scale=weight.channel_scale)
    if weight.scale.shape[1] > 1:
        return Operand(weight.data, weight.format.bits, group_scale=weight.scale)
    return Operand(weight.data, weight.format.bits, row_scale=weight.scale)


def product(rows: Tensor, weight: QuantizedWeight, launch: TileLaunch | None, dtype: torch.dtype) -> Tensor:
    """Into columns of a larger tensor, of which nothing else may change."""
    features = weight.shape[0]
    around = torch.full((rows.shape[0], features + 5), SENTINEL, dtype=dtype, device=rows.device)
    multiply(rows, operand_of(weight), Target(around[:, 3 : features + 3]), launch)
    assert (around[:, :3] == SENTINEL).all() and (around[:, features + 3 :] == SENTINEL).all()
    return around[:, 3 : features + 3]


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_integer_sums_are_exact(format: WeightFormat, launch: TileLaunch, device: torch.device) -> None:
    tokens, features, inputs = 21, 67, 384
    weight = random_weight(format, features, inputs).to(device)
    rows = torch.randint(-128, 128, (tokens, inputs), dtype=torch.int8, device=device)
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, launch, torch.float32), expected)


@pytest.mark.parametrize("launch", ["whole", "splits", "slices"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_products_of_halves(format: WeightFormat, launch: str, device: torch.device) -> None:
    """x are small integers: all sums are exact in float32."""
    weight = random_weight(format, 35, 384).to(device)
    rows = torch.randint(-16, 17, (18, 384), device=device).half()
    expected = reference.linear(rows.float(), weight)
    assert torch.equal(product(rows, weight, LAUNCHES[launch], torch.float32), expected)


@pytest.mark.parametrize("launch", ["whole", "splits", "slices"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1, -1], ids=["largest", "smallest"])
def test_extreme_sums(launch: str, bits: int, size: int, device: torch.device) -> None:
    """The largest and the smallest sum of a group have exact floats, too."""
    weight = random_weight(WeightFormat(bits, "group", 128), 16, 256).to(device)
    weight.data.fill_(0x88 if bits == 4 else -128)
    rows = torch.full((16, 256), -128 if size == 1 else 127, dtype=torch.int8, device=device)
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, LAUNCHES[launch], torch.float32), expected)


@pytest.mark.parametrize("launch", ["whole", "splits", "slices"])
@pytest.mark.parametrize("channel", [False, True], ids=["one-scale", "channel-scales"])
def test_codes_bias_and_scale_of_x(launch: str, channel: bool, device: torch.device) -> None:
    """All factors are powers of two, and so many results are ties between two codes."""
    features = 35
    weight = random_weight(FORMATS["int4-group"], features, 256).to(device)
    rows = torch.randint(-128, 128, (19, 256), dtype=torch.int8, device=device)
    x = Quantized(rows, torch.tensor(0.5, device=device))
    bias = torch.randint(-100, 101, (features,), device=device).float() / 4
    shape = (features,) if channel else ()
    scale = torch.exp2(torch.randint(-5, -2, shape, device=device).float())
    out = torch.full((19, features), SENTINEL, dtype=torch.int8, device=device)
    multiply(rows, operand_of(weight), Target(out, x.scale, bias, scale), LAUNCHES[launch])
    expected = reference.linear(x, weight, bias, out_scale=scale)
    assert torch.equal(out, expected)
    real = reference.linear(x, weight, bias) / scale
    assert ((real - real.floor()) == 0.5).any() and (real.abs() > 128).any()


@pytest.mark.parametrize("format", ["int4-group", "int4-two-level", "int4-group-of-48"])
def test_planes_made_before(format: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(gemm, "_PLANAR_ROWS", 1)
    weight = random_weight(FORMATS[format], 33, 384).to(device)
    rows = torch.randint(-128, 128, (20, 384), dtype=torch.int8, device=device)
    assert torch.equal(in_planes(rows), torch.cat([rows[:, 0::2], rows[:, 1::2]], 1))
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, LAUNCHES["splits"], torch.float32), expected)


@pytest.mark.parametrize("inputs", [2, 6, 130, 200], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("launch", ["whole", "splits", "slices"])
def test_rows_of_any_length(inputs: int, bits: int, launch: str, device: torch.device) -> None:
    weight = random_weight(WeightFormat(bits, "channel"), 5, inputs).to(device)
    rows = torch.randint(-128, 128, (7, inputs), dtype=torch.int8, device=device)
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, LAUNCHES[launch], torch.float32), expected)


def test_parts_of_an_operand(device: torch.device) -> None:
    weight = random_weight(FORMATS["int8-tensor"], 40, 64).to(device)
    bias, scale = torch.randn(40, device=device), torch.rand(40, device=device) + 1
    rows = torch.randint(-128, 128, (6, 64), dtype=torch.int8, device=device)
    out = torch.full((6, 40), SENTINEL, dtype=torch.int8, device=device)
    for start, stop in ((0, 17), (17, 40)):
        target = Target(out, None, bias, scale).columns(start, stop)
        multiply(rows, operand_of(weight).rows(start, stop), target)
    x = Quantized(rows, torch.ones((), device=device))
    assert torch.equal(out, reference.linear(x, weight, bias, out_scale=scale))


def test_what_fits() -> None:
    """Halves take four int4 at a time, or two int8; int8 takes two int4."""
    four = Operand(torch.zeros(4, 5, dtype=torch.uint8), 4, row_scale=torch.ones(4, 1))
    assert fits(four, False) and not fits(four, True)
    groups = dataclasses.replace(four, row_scale=None, group_scale=torch.ones(4, 2).half())
    assert groups.groups == 2 and not fits(groups, False)
    eight = Operand(torch.zeros(4, 5, dtype=torch.int8), 8, row_scale=torch.ones(4, 1))
    assert fits(eight, False) and not fits(eight, True)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 65, 512, 8192])
@pytest.mark.parametrize("features", [24, 2560, 10576, 50288])
def test_launches_are_possible(tokens: int, features: int) -> None:
    for bits, half in ((8, False), (4, False), (8, True), (4, True)):
        for scales in ("row", "group", "levels"):
            launch = tile_launch(Product(tokens, features, 2560, bits, half, scales, 128))
            sizes = (launch.features, launch.tokens, launch.inputs, launch.slices, launch.warps)
            assert all(size & (size - 1) == 0 for size in sizes)
            assert launch.slices == 1 or launch.splits == 1
            assert launch.inputs <= 256, "longer sums of int8 have no exact float32 by additions"
