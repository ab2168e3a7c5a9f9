"""Products of hundreds of rows, by descriptors: every format, ragged edges, all that may follow the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.cases import Draw, all_cases
from quamba.kernels.reference import linear as reference
from quamba.kernels.triton import gemm_wide
from quamba.kernels.triton import linear as linears
from quamba.kernels.triton.gemm import Operand, Product, Target, in_planes
from quamba.kernels.triton.gemm_wide import (
    WideLaunch,
    multiply_wide,
    wide_candidates,
    wide_fits,
    wide_launch,
)

FORMATS = {
    "int8-channel": WeightFormat(8, "channel"),
    "int8-tensor": WeightFormat(8, "tensor"),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 128),
    "int4-group-of-256": WeightFormat(4, "group", 256),
}
OTHERS = {
    "int8-group": WeightFormat(8, "group", 128),
    "int4-group-of-64": WeightFormat(4, "group", 64),
    "int4-two-level": WeightFormat(4, "two_level", 128),
}
LAUNCHES = {
    "one-part": WideLaunch(64, 32, 32),
    "parts": WideLaunch(64, 64, 16, order=2),
    "short-steps": WideLaunch(64, 64, 32, inputs=64, stages=2),
}
SENTINEL = -77


def random_weight(format: WeightFormat, features: int, inputs: int) -> QuantizedWeight:
    """Scales are powers of two, so every product of a sum and its scales is known to the last bit."""
    least, most = (-8, 8) if format.bits == 4 else (-128, 128)
    codes = torch.randint(least, most, (features, inputs)).to(torch.int8)
    scale = torch.exp2(torch.randint(-8, -5, format.scale_shape((features, inputs))).float())
    weight = QuantizedWeight.from_codes(codes, scale.to(format.scale_dtype), format)
    if format.granularity != "two_level":
        return weight
    return QuantizedWeight(weight.data, weight.scale, format, torch.ones(features, 1))


def operand_of(weight: QuantizedWeight) -> Operand:
    return linears._operand(weight)


def codes(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def product(rows: Tensor, weight: QuantizedWeight, launch: WideLaunch, dtype: torch.dtype) -> Tensor:
    """Into columns of a larger tensor, of which nothing else may change."""
    features = weight.shape[0]
    around = torch.full((rows.shape[0], features + 5), SENTINEL, dtype=dtype, device=rows.device)
    multiply_wide(rows, operand_of(weight), Target(around[:, 3 : features + 3]), launch)
    assert (around[:, :3] == SENTINEL).all() and (around[:, features + 3 :] == SENTINEL).all()
    return around[:, 3 : features + 3]


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tokens, features", [(70, 67), (64, 128), (1, 1), (33, 65)], ids=str)
def test_integer_sums_are_exact(
    format: WeightFormat, launch: WideLaunch, tokens: int, features: int, device: torch.device
) -> None:
    weight = random_weight(format, features, 512).to(device)
    rows = codes(tokens, 512, device=device)
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, launch, torch.float32), expected)


@pytest.mark.parametrize("inputs", [16, 144, 160])
def test_the_last_step_may_be_short(inputs: int, device: torch.device) -> None:
    weight = random_weight(FORMATS["int8-channel"], 20, inputs).to(device)
    rows = codes(40, inputs + 32, device=device)[:, 16 : inputs + 16]  # as columns of a larger tensor
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, LAUNCHES["one-part"], torch.float32), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1, -1], ids=["largest", "smallest"])
def test_extreme_sums(bits: int, size: int, device: torch.device) -> None:
    format = WeightFormat(4, "group", 128) if bits == 4 else WeightFormat(8, "channel")
    weight = random_weight(format, 16, 256).to(device)
    weight.data.fill_(0x88 if bits == 4 else -128)
    rows = torch.full((16, 256), -128 if size == 1 else 127, dtype=torch.int8, device=device)
    expected = reference.linear(Quantized(rows, torch.ones((), device=device)), weight)
    assert torch.equal(product(rows, weight, LAUNCHES["parts"], torch.float32), expected)


@pytest.mark.parametrize("format", ["int8-channel", "int4-group"])
@pytest.mark.parametrize("channel", [False, True], ids=["one-scale", "channel-scales"])
def test_codes_bias_and_scale_of_x(format: str, channel: bool, device: torch.device) -> None:
    """All factors are powers of two, and so many results are ties between two codes."""
    features = 35
    weight = random_weight(FORMATS[format], features, 256).to(device)
    x = Quantized(codes(19, 256, device=device), torch.tensor(0.5, device=device))
    bias = torch.randint(-100, 101, (features,), device=device).float() / 4
    some = torch.exp2(torch.randint(-3, 2, (features,)).float())
    scale = (some if channel else torch.tensor(0.25)).to(device)
    out = torch.full((19, features), SENTINEL, dtype=torch.int8, device=device)
    multiply_wide(x.codes, operand_of(weight), Target(out, x.scale, bias, scale), LAUNCHES["parts"])
    assert torch.equal(out, reference.linear(x, weight, bias, out_scale=scale))
    real = reference.linear(x, weight, bias) / scale
    assert ((real - real.floor()) == 0.5).any() and (real.abs() > 128).any()


@pytest.mark.parametrize("format", [*FORMATS, *OTHERS])
def test_which_products_are_wide(format: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """All that fit go this way, and only they; the rest is right, too."""
    monkeypatch.setattr(gemm_wide, "WIDE_ROWS", 24)
    monkeypatch.setattr(gemm_wide, "WIDE_TILES", 1)
    asked = []
    monkeypatch.setattr(linears, "multiply_wide", lambda *a: (asked.append(a), multiply_wide(*a)))
    weight = random_weight({**FORMATS, **OTHERS}[format], 40, 512).to(device)
    for tokens in (24, 23):
        x = Quantized(codes(tokens, 512, device=device), torch.tensor(0.25, device=device))
        found = linears.linear(x, weight, out_dtype=torch.float32)
        assert torch.equal(found, reference.linear(x, weight))
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
    assert len(asked) == (0 if old or format in OTHERS else 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_descriptors_cannot_read(
    bits: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(gemm_wide, "WIDE_TILES", 1)

    def fits(rows: Tensor, inputs: int) -> bool:
        return wide_fits(rows, operand_of(random_weight(WeightFormat(bits, "channel"), 8, inputs).to(device)))

    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
    assert fits(codes(256, 512, device=device), 512) is not old
    assert not fits(codes(255, 512, device=device), 512)
    assert not fits(codes(256, 520, device=device)[:, :512], 512)  # rows of whole 8 bytes
    assert not fits(codes(256, 72, device=device), 72)
    monkeypatch.setattr(gemm_wide, "WIDE_TILES", 3)
    assert not fits(codes(256, 512, device=device), 512)  # two tiles


def test_planes_of_steps(device: torch.device) -> None:
    rows = codes(3, 40, device=device)[:, :32]
    expected = torch.cat([rows[:, i : i + 8][:, p::2] for i in range(0, 32, 8) for p in (0, 1)], 1)
    assert torch.equal(in_planes(rows, 8), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [256, 512, 2048, 8192])
@pytest.mark.parametrize("features", [192, 2560, 10576])
def test_launches_are_whole(bits: int, tokens: int, features: int) -> None:
    chosen = Product(tokens, features, 2560, bits, False, "group" if bits == 4 else "row", 128)
    for launch in (wide_launch(chosen), *wide_candidates(chosen)):
        assert launch.tokens % launch.part == 0 and launch.features % 64 == 0
        assert bits == 8 or launch.inputs == 128


def test_the_doctor_checks_wide_products() -> None:
    sizes = {case.name: case.make(Draw(0))[0][:2] for case in all_cases("cuda") if "257x" in case.name}
    found = [wide_fits(x.codes, operand_of(weight)) for x, weight in sizes.values()]
    assert found == [True, True, True]
    # Of int8, of groups, and of integers of whole rows.
    assert [linears._is_whole(x.codes, weight) for x, weight in sizes.values()] == [False, False, True]
