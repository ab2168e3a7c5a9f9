"""Between scan and projection: factors of the gated norm, rotation, codes; against the ops in float64."""

from __future__ import annotations

import pytest
import torch
from decode_cases import assert_as_accurate, guarded, is_untouched, natural, real
from rounding import assert_codes
from torch import Tensor

from quamba.formats.activation import Overflow, Rounding
from quamba.formats.hadamard import hadamard_matrix, sylvester_matrix
from quamba.kernels.reference.hadamard import hadamard, hadamard_quantize
from quamba.kernels.reference.quantize import quantize
from quamba.kernels.triton.decode.mix import block_signs, block_size, mix
from quamba.kernels.triton.decode.vectors import BLOCK, Vector

EPS = 1e-5
#: Channels, groups of the norm, parts of the sums of squares. M has order 1, 12 and 40 (not symmetric); there
#: are 1, 24 or 40 blocks of 64 or 32 channels: the last program of rows is ragged, or all are.
SIZES = pytest.mark.parametrize(
    ("channels", "ngroups", "parts"), [(64, 1, 1), (1536, 2, 6), (1280, 1, 5), (1280, 4, 20), (256, 8, 8)]
)
MODES = [("half_even", "saturate"), ("half_away", "saturate"), ("half_even", "wrap"), ("half_away", "wrap")]


def draw(batch: int, channels: int, device: torch.device) -> Tensor:
    """Groups and sequences of different sizes."""
    sizes = (
        torch.linspace(0.2, 8.0, 8).repeat_interleave(channels // 8) * torch.linspace(1, 3, batch)[:, None]
    )
    return (torch.randn(batch, channels) * sizes).to(device)


def sums_of_squares(x: Tensor, parts: int) -> Tensor:
    """(B, parts), as the kernel before gives them."""
    return x.square().unflatten(1, (parts, -1)).sum(2)


def expected(x: Tensor, ngroups: int, rotate: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    grouped = x.to(dtype).unflatten(1, (ngroups, -1))
    y = (grouped * torch.rsqrt(grouped.square().mean(2, keepdim=True) + EPS)).flatten(1)
    return hadamard(y) if rotate else y


def size_of(channels: int, ngroups: int, rotate: bool) -> int:
    size = block_size(channels, ngroups) if rotate else 32
    assert size is not None
    return size


@SIZES
@pytest.mark.parametrize("rotate", [False, True])
def test_floats(channels: int, ngroups: int, parts: int, rotate: bool, device: torch.device) -> None:
    x = draw(2, channels, device)
    out, behind = guarded(2, channels, torch.float32, device)
    squares, size = sums_of_squares(x, parts), size_of(channels, ngroups, rotate)
    mix(x, Vector(out), size=size, squares=squares, eps=EPS, ngroups=ngroups, rotate=rotate)
    plain = expected(x, ngroups, rotate, torch.float32)
    assert_as_accurate(out, plain, expected(x, ngroups, rotate))
    assert is_untouched(behind)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_without_a_norm(rotate: bool, dtype: torch.dtype, device: torch.device) -> None:
    """As Mamba1 has it; blocks of 64 channels, too, where nothing is rotated."""
    x = draw(4, 768, device)
    out, behind = guarded(4, 768, dtype, device)
    mix(x, Vector(out), size=64, rotate=rotate)
    exact = hadamard(x.double()) if rotate else x.double()
    assert_as_accurate(out, (hadamard(x) if rotate else x).to(dtype), exact)
    assert is_untouched(behind)


@SIZES
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_codes(
    channels: int, ngroups: int, parts: int, rotate: bool, split: bool, device: torch.device
) -> None:
    x, scale = draw(3, channels, device), torch.tensor(0.0143, device=device)
    out, behind = guarded(3, channels, torch.int8, device)
    squares, size = sums_of_squares(x, parts), size_of(channels, ngroups, rotate)
    options = {"size": size, "squares": squares, "eps": EPS, "ngroups": ngroups, "rotate": rotate}
    mix(x, Vector(out, split=split), **options, out_scale=scale)
    exact = expected(x, ngroups, rotate) / scale.double()
    assert (exact.abs() > 128).any() and exact.abs().median() < 100
    assert_codes(natural(Vector(out, split=split)), exact, slack=5e-4)
    assert is_untouched(behind)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_ties(rounding: Rounding, overflow: Overflow, rotate: bool, device: torch.device) -> None:
    """Sums of integers by 1/8 by 4, or quarters of integers: nothing is rounded before the codes."""
    x = torch.randint(-60, 61, (3, 64)).float() * (1 if rotate else 8)
    x, scale = x.to(device), torch.tensor(0.25 if rotate else 2.0, device=device)
    x[:, :3] = x[:, :3] + 1
    out, _ = guarded(3, 64, torch.int8, device)
    options = {"half_away": rounding == "half_away", "wrap": overflow == "wrap"}
    mix(x, Vector(out), size=64, rotate=rotate, out_scale=scale, **options)
    cut = hadamard_quantize if rotate else quantize
    codes = {mode: cut(x, scale, rounding=mode[0], overflow=mode[1]) for mode in MODES}
    assert torch.equal(out, codes[rounding, overflow])
    others = [c for mode, c in codes.items() if mode != (rounding, overflow)]
    assert not any(torch.equal(out, other) for other in others), "a mode that changes nothing"


@SIZES
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_wide_codes(
    channels: int, ngroups: int, parts: int, rotate: bool, split: bool, device: torch.device
) -> None:
    x = draw(2, channels, device)
    halves, behind = guarded(2, 2 * channels, torch.int8, device)
    steps, behind_steps = guarded(2, channels // BLOCK, torch.float32, device)
    out = Vector(halves.view(2, 2, channels), steps, split)
    squares, size = sums_of_squares(x, parts), size_of(channels, ngroups, rotate)
    mix(x, out, size=size, squares=squares, eps=EPS, ngroups=ngroups, rotate=rotate)
    exact = expected(x, ngroups, rotate)
    largest = exact.abs().unflatten(1, (-1, BLOCK)).amax(2).repeat_interleave(BLOCK, dim=1)
    assert ((real(out) - exact).abs() <= 2.0**-15 * largest).all()
    assert is_untouched(behind) and is_untouched(behind_steps)


@pytest.mark.parametrize(
    ("channels", "ngroups", "size"),
    [
        (32, 1, 32),
        (1536, 1, 64),
        (5120, 1, 64),
        (16384, 1, 64),
        (1280, 1, 32),
        (768, 8, 32),  # groups of 96
        (8192, 8, 64),
        (640, 1, None),  # 40 x 16
        (16, 1, None),
        (64, 4, None),
        (32768, 1, None),
    ],
)
def test_block_size(channels: int, ngroups: int, size: int | None) -> None:
    assert block_size(channels, ngroups) == size


@pytest.mark.parametrize(("channels", "size"), [(64, 64), (64, 32), (1280, 32), (1536, 64)])
def test_signs_of_blocks(channels: int, size: int) -> None:
    blocks = channels // size
    signs = block_signs(channels, size, torch.device("cpu")).double()
    assert len(signs) >= max(16, blocks) and not signs[blocks:].any() and not signs[:, blocks:].any()
    whole = torch.kron(signs[:blocks, :blocks], sylvester_matrix(size.bit_length() - 1)) * channels**-0.5
    torch.testing.assert_close(whole, hadamard_matrix(channels))
