"""The Triton quantizer gives the codes of the reference."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.activation import Overflow, Rounding
from quamba.kernels.reference import quantize as reference
from quamba.kernels.triton.quantize import quantize

pytestmark = pytest.mark.usefixtures("poison_empty")

MODES = [("half_even", "saturate"), ("half_away", "saturate"), ("half_even", "wrap"), ("half_away", "wrap")]
SHAPES = [(1,), (0, 3), (5,), (2, 63), (3, 65), (1, 1, 1000), (2, 3, 4097)]


def same(x: torch.Tensor, scale: torch.Tensor, device: torch.device, r: Rounding, o: Overflow) -> None:
    given = quantize(x.to(device), scale.to(device), rounding=r, overflow=o)
    expected = reference.quantize(x.float(), scale, rounding=r, overflow=o)
    assert given.dtype == torch.int8
    assert torch.equal(given.cpu(), expected)


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: tuple[int, ...], rounding: Rounding, overflow: Overflow, device: torch.device) -> None:
    x = torch.randn(shape) * 4
    same(x, torch.tensor(0.037), device, rounding, overflow)
    same(x, torch.rand(shape[-1]) * 0.1 + 0.01, device, rounding, overflow)


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_ties_and_extremes(rounding: Rounding, overflow: Overflow, device: torch.device) -> None:
    halves = torch.arange(-1200, 1201) * 0.25
    near = torch.nextafter(torch.tensor([0.5, 0.5, 1.5, -0.5]), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    far = torch.tensor([1e6, 8388607.5, 4194304.5, 2147483520.0, 2147483648.0, 3e9, 1e30, float("inf")])
    x = torch.cat([halves, near, far, -far])
    same(x, torch.tensor(1.0), device, rounding, overflow)
    same(x * 0.125, torch.tensor(0.125), device, rounding, overflow)


def test_quotients_are_rounded_like_divisions(device: torch.device) -> None:
    """x = (k + 1/2) * scale rounded to float32: on which side the quotient falls is up to its last bit."""
    scale = torch.rand(257) + 0.01
    x = (torch.arange(-127, 127).float()[:, None] + 0.5) * scale
    same(x, scale, device, "half_even", "saturate")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_divide_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    same((torch.randn(7, 130) * 50).to(dtype), torch.tensor(0.7), device, "half_even", "saturate")


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3, 1, 1), (3, 4, 6)], ids=str)
def test_scales_broadcast(shape: tuple[int, ...], device: torch.device) -> None:
    same(torch.randn(3, 4, 6), torch.rand(shape) * 0.1 + 0.01, device, "half_even", "saturate")


def test_strided_rows(device: torch.device) -> None:
    wide = torch.randn(2, 5, 24)
    same(wide[..., 7:19], torch.tensor(0.03), device, "half_even", "saturate")
    same(wide[:, 1:4, 7:19], torch.rand(12) + 0.01, device, "half_even", "saturate")


def test_refusals(device: torch.device) -> None:
    scale = torch.tensor(1.0, device=device)
    with pytest.raises(ValueError, match="x has stride 4 in its last dimension"):
        quantize(torch.randn(3, 4, device=device).T, scale)
    with pytest.raises(ValueError, match="x is float64"):
        quantize(torch.randn(3, dtype=torch.float64, device=device), scale)
