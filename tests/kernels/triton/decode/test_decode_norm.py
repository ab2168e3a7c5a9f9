"""The norm of a step against the reference in float64: floats, codes and wide codes."""

from __future__ import annotations

import pytest
import torch
from decode_cases import assert_as_accurate, guarded, is_untouched, natural, real
from rounding import assert_codes
from torch import Tensor

from quamba.kernels.reference.norm import add_norm
from quamba.kernels.triton.decode.norm import norm
from quamba.kernels.triton.decode.vectors import BLOCK, Vector

EPS = 1e-5
SHAPES = pytest.mark.parametrize("shape", [(1, 32), (3, 96), (4, 160)], ids=str)


def draw(shape: tuple[int, int], weight: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of very different sizes, which the norm makes alike."""
    sizes = torch.tensor([1.0, 30.0, 1e-3, 5.0])[: shape[0], None]
    x = ((torch.randn(shape) + 0.3) * sizes).to(device)
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    return x, None if weight == "no weight" else torch.randn(shape[1]).to(device, dtypes[weight])


def expected(x: Tensor, weight: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    weight = None if weight is None else weight.to(dtype)
    return add_norm(x.to(dtype), None, weight, eps=EPS, out_dtype=dtype)[0]


@SHAPES
@pytest.mark.parametrize("weight", ["no weight", "float32", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_floats(shape: tuple[int, int], weight: str, dtype: torch.dtype, device: torch.device) -> None:
    x, w = draw((shape[0], shape[1] - 3), weight, device)  # no multiple of a block
    out, behind = guarded(*x.shape, dtype, device)
    norm(x, w, None, Vector(out), EPS)
    exact = expected(x, w)
    assert_as_accurate(out, expected(x, w, torch.float32).to(dtype), exact)
    assert is_untouched(behind)


@SHAPES
@pytest.mark.parametrize("weight", ["no weight", "float32"])
@pytest.mark.parametrize("split", [False, True])
def test_codes(shape: tuple[int, int], weight: str, split: bool, device: torch.device) -> None:
    x, w = draw(shape, weight, device)
    scale = torch.tensor(0.0137, device=device)
    out, behind = guarded(*shape, torch.int8, device)
    norm(x, w, scale, Vector(out, split=split), EPS)
    exact = expected(x, w) / scale.double()
    assert (exact.abs() > 128).any(), "some saturate"
    assert_codes(natural(Vector(out, split=split)), exact, slack=1e-4)
    assert is_untouched(behind)


@SHAPES
@pytest.mark.parametrize("split", [False, True])
def test_wide_codes(shape: tuple[int, int], split: bool, device: torch.device) -> None:
    x, w = draw(shape, "float32", device)
    halves, behind = guarded(shape[0], 2 * shape[1], torch.int8, device)
    scale, behind_scale = guarded(shape[0], shape[1] // BLOCK, torch.float32, device)
    out = Vector(halves.view(shape[0], 2, shape[1]), scale, split)
    norm(x, w, None, out, EPS)
    exact = expected(x, w)
    largest = exact.abs().unflatten(1, (-1, BLOCK)).amax(2).repeat_interleave(BLOCK, dim=1)
    assert ((real(out) - exact).abs() <= 2.0**-15 * largest).all()
    assert is_untouched(behind) and is_untouched(behind_scale)


def test_a_residual_of_float16(device: torch.device) -> None:
    x, w = draw((2, 64), "float32", device)
    x = x.half()
    out, _ = guarded(2, 64, torch.float16, device)
    norm(x, w, None, Vector(out), EPS)
    assert_as_accurate(out, expected(x, w, torch.float32).half(), expected(x, w))


def test_a_row_of_zeros(device: torch.device) -> None:
    x = torch.zeros(1, 64, device=device)
    wide = Vector.wide(1, 64, device, split=False)
    norm(x, None, None, wide, EPS)
    assert not wide.values.any() and wide.wide_scale is not None and wide.wide_scale.isfinite().all()
