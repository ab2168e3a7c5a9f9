"""Wide codes: two int8 that hold 16 bits of a value, relative to the largest of its block."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from decode_cases import merge_rows, real, split_rows
from torch import Tensor

from quamba.kernels.triton.decode.vectors import BLOCK, Vector, place, wide_codes


@triton.jit
def _encode(
    x: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    scale: tl.tensor,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    block, j = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, 32)
    at = block[:, None] * 32 + j[None, :]
    upper, lower, step = wide_codes(tl.load(x + at))
    to = place(at, CHANNELS, SPLIT)
    tl.store(high + to, upper)
    tl.store(low + to, lower)
    tl.store(scale + block, step)


def encode(x: Tensor, split: bool = False, blocks: int = 4) -> Vector:
    """x (channels,) float32, some blocks a program."""
    values = torch.full((1, 2, len(x)), 0x5A, dtype=torch.int8, device=x.device)
    scale = torch.full((1, len(x) // BLOCK), float("nan"), device=x.device)
    grid = (len(x) // (BLOCK * blocks),)
    _encode[grid](x, values[0, 0], values[0, 1], scale, CHANNELS=len(x), BLOCKS=blocks, SPLIT=split)
    return Vector(values, scale, split)


def largest_of_blocks(x: Tensor) -> Tensor:
    return x.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("split", [False, True])
def test_sixteen_bits_of_the_largest(size: float, split: bool, device: torch.device) -> None:
    x = (torch.randn(8 * BLOCK) * size * torch.logspace(-6, 6, 8).repeat_interleave(BLOCK)).to(device)
    found = encode(x, split)
    error = (real(found)[0] - x.double()).abs()
    assert (error <= 2.0**-15 * largest_of_blocks(x).double()).all()
    assert (error <= 0.501 * found.wide_scale[0].double().repeat_interleave(BLOCK)).all()
    assert (error > 0).any(), "a bound of nothing"


def test_every_code_comes_back(device: torch.device) -> None:
    """All of them beside the largest one of their block, so that a step is 1; neither half leaves int8."""
    codes = torch.zeros(2112, BLOCK, dtype=torch.int32)
    every = torch.arange(-32512, 32513, dtype=torch.int32)
    codes[:, 0] = 32512
    free = torch.zeros(2112 * 31, dtype=torch.int32)
    free[: len(every)] = every
    codes[:, 1:] = free.view(-1, 31)
    found = encode(codes.flatten().float().to(device), blocks=64)
    high, low = found.values[0].cpu().int()
    assert torch.equal(high * 256 + low, codes.flatten())
    assert int(high.abs().max()) == 127 and (int(low.min()), int(low.max())) == (-128, 127)


def test_zeros_and_what_is_next_to_them(device: torch.device) -> None:
    x = torch.zeros(4 * BLOCK, device=device)
    x[BLOCK] = -1e-37
    x[2 * BLOCK] = 1e-30
    x[3 * BLOCK] = 2.5
    found = encode(x)
    assert found.wide_scale.isfinite().all() and (found.wide_scale > 0).all()
    torch.testing.assert_close(real(found)[0], x.double(), rtol=2.0**-15, atol=1e-37)
    assert not found.values[..., : 2 * BLOCK].any()


def test_place(device: torch.device) -> None:
    x = torch.randn(2 * BLOCK, device=device)
    plain, split = encode(x), encode(x, split=True)
    assert torch.equal(split.values, split_rows(plain.values))
    assert torch.equal(merge_rows(split.values), plain.values)


def test_vectors_of_a_step(device: torch.device) -> None:
    codes = Vector.codes(3, 64, device, split=True)
    wide = Vector.wide(3, 64, device, split=False)
    floats = Vector.floats(3, 64, device, torch.float16)
    assert (codes.values.shape, codes.values.dtype, codes.wide_scale) == ((3, 64), torch.int8, None)
    assert (wide.values.shape, wide.values.dtype) == ((3, 2, 64), torch.int8)
    assert wide.wide_scale is not None and wide.wide_scale.shape == (3, 2)
    assert (floats.values.shape, floats.values.dtype) == ((3, 64), torch.float16)
    assert (codes.split, wide.split, floats.split) == (True, False, False)
