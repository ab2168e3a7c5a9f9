"""What rounding may do: int8 codes are the nearest integers, saturated; what it costs in decibels."""

from __future__ import annotations

import math

import torch


def assert_codes(codes: torch.Tensor, exact: torch.Tensor, slack: float = 2e-5) -> None:
    """codes int8 are round(exact) clamped to [-128, 127].

    exact  float64, the real value divided by the scale
    slack  by how much of a step float32 arithmetic may have moved a value before it was rounded: only values
           this close to the middle between two integers may go either way
    """
    assert codes.dtype == torch.int8
    assert codes.shape == exact.shape
    distance = (codes.double() - exact.clamp(-128, 127)).abs()
    assert distance.max() <= 0.5 + slack, f"off by {distance.max().item()} of a step"


def random_codes(*shape: int, low: int = -128) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


def sqnr_db(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """10 log10(sum exact^2 / sum (exact - rounded)^2)."""
    noise = (exact.double() - rounded.double()).square().sum()
    return 10 * math.log10(float(exact.double().square().sum()) / max(float(noise), 1e-300))
