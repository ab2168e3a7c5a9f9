"""Rounding and saturation of activations and cached states."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from quamba.formats.activation import Overflow, Rounding
from quamba.kernels.reference.quantize import quantize, quantize_or_cast

pytestmark = pytest.mark.usefixtures("poison_empty")


def test_rounds_half_to_even_and_saturates() -> None:
    steps = [-1e9, -129.0, -128.5, -127.5, -2.5, -1.5, -0.5, -0.0, 0.49, 0.5, 1.5, 2.5, 126.5, 127.4, 1e9]
    codes = [-128, -128, -128, -128, -2, -2, 0, 0, 0, 0, 2, 2, 126, 127, 127]
    scale = torch.tensor(0.25)
    assert quantize(torch.tensor(steps) * 0.25, scale).tolist() == codes


def test_infinities_saturate() -> None:
    assert quantize(torch.tensor([math.inf, -math.inf]), torch.tensor(3.0)).tolist() == [127, -128]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_divides_by_one_scale_a_channel(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0, -3.0], [4.0, -5.0, 6.0]], dtype=dtype)
    codes = quantize(x, torch.tensor([0.5, 2.0, 0.25]))
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[2, 1, -12], [8, -2, 24]]


def test_divides_rather_than_multiplying_by_an_inverse() -> None:
    """x / s is the definition; x * (1 / s) rounds twice and falls on the other side of a tie."""
    scale = torch.tensor(7.0)
    multiples = torch.arange(-127, 128, dtype=torch.float32) + 0.5
    expected = multiples.round().clamp(-128, 127)  # 7 (n + 0.5) is exact in float32, and so is its quotient
    assert torch.equal(quantize(multiples * 7, scale).float(), expected)
    assert not torch.equal((multiples * 7 * (1 / scale)).round().clamp(-128, 127), expected)


def test_input_is_not_changed() -> None:
    x = torch.randn(4, 5)
    before = x.clone()
    quantize(x, torch.tensor(0.1))
    assert torch.equal(x, before)


def test_without_a_scale_it_casts() -> None:
    x = torch.tensor([1.0, 2.5])
    assert quantize_or_cast(x, None, torch.float16).dtype == torch.float16
    assert quantize_or_cast(x, torch.tensor(1.0), torch.float16).tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert quantize(torch.zeros(shape), torch.ones(3)).shape == shape


BELOW_HALF = 0.5 - 2.0**-25  # the float32 before 0.5, which becomes 1 where 0.5 is added before a floor
HARD_QUOTIENTS = [
    *(sign * (n + 0.5) for n in (0, 1, 2, 3, 126, 127, 128, 254, 255, 300) for sign in (1, -1)),
    *(BELOW_HALF, -BELOW_HALF, 0.0, -0.0, 1.0, -1.0, 2.4999998, -2.4999998, 2.5000002, -2.5000002),
    *(127.0, 127.49999, 128.0, -128.0, -128.49998, -129.0, 255.0, 256.0, -256.0, 383.0, 8388607.5, 8388608.0),
    *(2.0**31 - 128, 2.0**31, -(2.0**31), 1e20, -1e20),
]


def scalar_code(quotient: float, rounding: Rounding, overflow: Overflow) -> int:
    """The definition in exact arithmetic, one number at a time."""
    exact = Fraction(quotient)
    if rounding == "half_even":
        whole = round(exact)
    else:
        magnitude = math.floor(abs(exact) + Fraction(1, 2))
        whole = magnitude if exact >= 0 else -magnitude
    if overflow == "saturate":
        return min(max(whole, -128), 127)
    low_byte = min(max(whole, -(2**31)), 2**31 - 1) & 0xFF
    return low_byte - 256 if low_byte >= 128 else low_byte


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_rounding_and_overflow(
    rounding: Rounding, overflow: Overflow, dtype: torch.dtype, scale: float
) -> None:
    quotients = torch.cat([torch.tensor(HARD_QUOTIENTS), torch.randn(2000) * 150]).to(dtype)
    codes = quantize(quotients * scale, torch.tensor(scale), rounding=rounding, overflow=overflow)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [scalar_code(q, rounding, overflow) for q in quotients.tolist()]


def test_the_roundings_by_hand() -> None:
    one, x = torch.tensor(1.0), torch.tensor([-2.5, -0.5, BELOW_HALF, 0.5, 1.5, 127.5, 128.0, -129.0, 1e20])
    assert quantize(x, one, rounding="half_away").tolist() == [-3, -1, 0, 1, 2, 127, 127, -128, 127]
    wrapped = quantize(x, one, rounding="half_away", overflow="wrap")
    assert wrapped.tolist() == [-3, -1, 0, 1, 2, -128, -128, 127, -1]
    assert quantize_or_cast(x[:4], one, torch.float32, "half_away").tolist() == [-3, -1, 0, 1]
