"""Compiled quantization against the reference: the same codes, always."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.activation import Overflow, Rounding
from quamba.kernels.cpu.quantize import quantize
from quamba.kernels.reference import quantize as reference

pytestmark = pytest.mark.usefixtures("instruction_set", "poison_empty")

MODES: list[tuple[Rounding, Overflow]] = [
    ("half_even", "saturate"),
    ("half_even", "wrap"),
    ("half_away", "saturate"),
    ("half_away", "wrap"),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rounding", "overflow"), MODES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 150), (1, 40000), (70, 2049), (3000, 7)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_same_codes(
    shape: tuple[int, ...], per_channel: bool, rounding: Rounding, overflow: Overflow
) -> None:
    x = torch.randn(shape) * 60
    scale = torch.rand(shape[-1:] if per_channel else ()) + 0.5
    wanted = reference.quantize(x, scale, rounding=rounding, overflow=overflow)
    assert torch.equal(quantize(x, scale, rounding=rounding, overflow=overflow), wanted)


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_ties_and_far_out(rounding: Rounding, overflow: Overflow) -> None:
    ties = torch.arange(-1200, 1200) / 4
    below = torch.nextafter(torch.tensor([0.5, -0.5, 127.5, -128.5]), torch.tensor(0.0))
    far = torch.tensor([2.0**23 + 1, 2.0**30, 2.0**31 - 128, 2.0**31, 2.0**32 + 512, 3e38, torch.inf])
    x = torch.cat([ties, below, far, -far])
    for scale in (torch.tensor(1.0), torch.ones(x.shape)):
        wanted = reference.quantize(x, scale, rounding=rounding, overflow=overflow)
        assert torch.equal(quantize(x, scale, rounding=rounding, overflow=overflow), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_slices(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 3, 300) * 3).to(dtype)
    scale = torch.rand(131) * 0.05 + 0.01
    for part in (x[..., 11:142], x[:, 1, 11:142], x.mT[:, 7:138].mT):
        assert torch.equal(quantize(part, scale), reference.quantize(part, scale))
        one = scale[:1]
        assert torch.equal(quantize(part, one), reference.quantize(part, one))
    by_row = torch.rand(4, 1, 1) + 0.01
    assert torch.equal(quantize(x, by_row), reference.quantize(x, by_row))


def test_empty_and_one_number() -> None:
    assert quantize(torch.empty(0, 3), torch.tensor(1.0)).shape == (0, 3)
    assert quantize(torch.tensor(2.6), torch.tensor(0.5)).item() == 5
