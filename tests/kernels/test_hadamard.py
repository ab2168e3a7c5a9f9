"""The fast transform against the dense matrix, whose own tests are in formats/test_hadamard_matrix.py."""

from __future__ import annotations

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.hadamard import hadamard_matrix, supported
from quamba.kernels.reference.hadamard import gated_norm_hadamard, hadamard
from quamba.kernels.reference.quantize import quantize

DENSE_SIZES = [n for n in range(1, 129) if supported(n)] + [
    160,
    168,
    320,
    384,
    640,
    768,
    896,
    1024,
    1536,
    2560,
]
LARGE_SIZES = [2048, 3072, 4096, 5120, 7168, 8192, 16384]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(hadamard(x), torch.tensor([[5.0, -1.0, -2.0, 0.0], [0.5, 0.5, 0.5, 0.5]]))


@pytest.mark.parametrize("n", DENSE_SIZES)
def test_equals_the_dense_matrix(n):
    x, t = random(3, n), hadamard_matrix(n)
    assert (hadamard(x) - x @ t.T).abs().max() < 1e-12
    assert (hadamard(x, transpose=True) - x @ t).abs().max() < 1e-12


@pytest.mark.parametrize("n", LARGE_SIZES)
def test_large_sizes_keep_norms_and_invert(n):
    x = random(2, n)
    y = hadamard(x)
    assert (y.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-13
    assert (hadamard(y, transpose=True) - x).abs().max() < 1e-12
    column = torch.zeros(n, dtype=torch.float64)
    column[n // 3] = 1
    assert torch.equal(hadamard(column).abs(), torch.full_like(column, n**-0.5))


@pytest.mark.parametrize("n", [5120, 4096])
def test_large_size_equals_the_dense_matrix(n):
    x, t = random(1, n), hadamard_matrix(n)
    assert (hadamard(x) - x @ t.T).abs().max() < 1e-12
    assert (hadamard(x, transpose=True) - x @ t).abs().max() < 1e-12


@pytest.mark.parametrize("n", [20, 96, 384, 768, 1024, 1536, 2560])
def test_float32_errs_no_more_than_twice_the_plain_product(n):
    x, t = random(65, n, dtype=torch.float32), hadamard_matrix(n)
    exact = x.double() @ t.T
    plain = torch.nn.functional.linear(x, t.float())
    assert hadamard(x).dtype == torch.float32
    assert (hadamard(x) - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_rounded_once(dtype):
    x = random(5, 384, dtype=dtype)
    y = hadamard(x)
    assert y.dtype == dtype
    assert torch.equal(y, hadamard(x.float()).to(dtype))


def test_float16_sums_do_not_overflow():
    x = torch.full((1024,), 1000.0, dtype=torch.float16)
    assert hadamard(x)[0].item() == 32000.0


@pytest.mark.parametrize("shape", [(384,), (1, 384), (2, 3, 5, 384), (0, 384), (4, 0, 384)])
def test_leading_dimensions(shape):
    x, t = random(*shape), hadamard_matrix(384)
    y = hadamard(x)
    assert y.shape == shape
    assert torch.allclose(y, x @ t.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transpose", [False, True])
def test_non_contiguous_input(transpose):
    x = random(320, 7).T
    before = x.clone()
    assert torch.equal(hadamard(x, transpose), hadamard(x.contiguous(), transpose))
    assert torch.equal(x, before)


def test_input_is_not_aliased():
    x = random(1, 1)
    assert hadamard(x).data_ptr() != x.data_ptr()


def test_gradients_after_a_first_use_in_inference_mode():
    n = 28 * 8
    with torch.inference_mode():
        hadamard(random(1, n))
    x = random(2, n).requires_grad_()
    hadamard(x).backward(random(2, n))
    assert (x.grad - hadamard(random(2, n), transpose=True)).abs().max() < 1e-12


def test_unsupported_size():
    with pytest.raises(QuambaError, match=r"size 52:.*48 and 56"):
        hadamard(random(2, 52))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        hadamard(torch.ones(2, 8, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("before", [False, True])
def test_after_the_gated_norm(dtype: torch.dtype, before: bool) -> None:
    """Norm, gate and rotation, the numbers between in out_dtype; by hand in float64."""
    y, z, weight = random(3, 24), random(3, 24), random(24)
    named = {"eps": 1e-5, "group_size": 12, "norm_before_gate": before}
    gate = z * torch.sigmoid(z)
    v = (y if before else y * gate).view(3, 2, 12)
    v = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(3, 24) * weight * (gate if before else 1)
    given = gated_norm_hadamard(y, z, weight, **named, out_dtype=dtype)
    assert given.dtype == dtype
    assert (given.double() - v @ hadamard_matrix(24).T).abs().max() < 16 * torch.finfo(dtype).eps
    scale = torch.tensor(0.02)
    modes = {"rounding": "half_away", "overflow": "wrap"}
    codes = gated_norm_hadamard(y, z, weight, **named, out_dtype=dtype, out_scale=scale, **modes)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(codes, quantize(hadamard(v.to(dtype).to(wide)), scale, **modes))
