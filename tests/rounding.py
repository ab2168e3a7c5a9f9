"""What int8 codes may be, given the exact value: nothing but its nearest integers, saturated."""

from __future__ import annotations

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
