"""Rounding and saturation of activations and cached states."""

from __future__ import annotations

import math

import pytest
import torch

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
