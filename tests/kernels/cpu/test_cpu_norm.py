"""Compiled norms against the reference in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.cpu.norm import add_norm, gated_rms_norm, rms_norm
from quamba.kernels.reference import norm as reference

pytestmark = pytest.mark.usefixtures("instruction_set", "poison_empty")

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_close(given: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice the error of the reference op in float32, plus the rounding of a narrow result."""
    assert given.dtype == plain.dtype
    assert given.shape == exact.shape
    allowed = 2 * (plain.double() - exact).abs().max() + 3e-7 * exact.abs().max()
    assert (given.double() - exact).abs().max() <= allowed


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("columns", [1, 7, 64, 150, 2049])
@pytest.mark.parametrize("rows", [1, 67])
@pytest.mark.parametrize("center", [False, True])
def test_add_norm(rows: int, columns: int, center: bool) -> None:
    x, residual = torch.randn(rows, columns) + 0.3, torch.randn(rows, columns) * 3
    weight, bias, scale = torch.randn(columns), torch.randn(columns), torch.tensor(0.03)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        named = {"eps": EPS, "center": center}
        wide = [None if t is None else t.double() for t in (w, b)]
        total = x + residual
        exact, _ = reference.add_norm(total.double(), None, *wide, **named, out_dtype=torch.float64)
        plain, _ = reference.add_norm(x, residual, w, b, **named)
        given, new = add_norm(x, residual, w, b, **named)
        assert_close(given, exact, plain)
        assert torch.equal(new, total)
        codes, new = add_norm(x, residual, w, b, **named, out_scale=scale)
        # A row of one channel is zero over the root of eps: nothing but the rounding of the mean.
        if columns > 1:
            assert_codes(codes, exact / scale.double(), slack=3e-4)
        assert torch.equal(new, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("stored", [None, *DTYPES])
def test_residual_is_bit_equal(
    dtype: torch.dtype, residual_dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    x, residual = torch.randn(5, 150).to(dtype), torch.randn(5, 150).to(residual_dtype)
    for out_dtype in DTYPES:
        named = {"eps": EPS, "residual_dtype": stored, "out_dtype": out_dtype}
        wanted, r = reference.add_norm(x, residual, None, **named)
        given, new = add_norm(x, residual, None, **named)
        assert new.dtype == r.dtype
        assert torch.equal(new, r)
        assert_close(given, reference.add_norm(r.double(), None, None, eps=EPS)[0].double(), wanted)
        assert torch.equal(add_norm(x, None, None, **named)[1], reference.add_norm(x, None, None, **named)[1])


def test_slices_and_three_dimensions() -> None:
    both = torch.randn(2, 3, 64)
    x, residual, weight = both[..., 5:29], both[..., 30:54], torch.randn(24)
    given, new = add_norm(x, residual, weight, eps=EPS)
    wanted, r = reference.add_norm(x, residual, weight, eps=EPS)
    torch.testing.assert_close(given, wanted)
    assert torch.equal(new, r)
    assert add_norm(x, None, weight, eps=EPS)[1] is x
    assert add_norm(x[:0], None, weight, eps=EPS)[0].shape == (0, 3, 24)
    wide = x.double()
    assert torch.equal(
        add_norm(wide, None, weight, eps=EPS)[0], reference.add_norm(wide, None, weight, eps=EPS)[0]
    )


@pytest.mark.parametrize("kind", ["float", "scalar", "channels"])
def test_rms_norm(kind: str) -> None:
    x: Activation = torch.randn(3, 4, 40)[..., 3:19]
    if kind != "float":
        x = Quantized(random_codes(3, 4, 40)[..., 3:19], torch.rand(16 if kind == "channels" else ()) + 0.1)
    real = x.dequantize(torch.float64) if isinstance(x, Quantized) else x.double()
    exact = real / (real.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_close(rms_norm(x, eps=EPS), exact, reference.rms_norm(x, eps=EPS))
    scale = torch.rand(16) + 0.01
    assert_codes(rms_norm(x, eps=EPS, out_scale=scale), exact / scale.double(), slack=3e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("columns", "groups"), [(12, 1), (24, 4), (150, 1), (150, 3), (1536, 1), (2048, 8)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("kind", ["float", "scalar", "channels"])
def test_gated_rms_norm(columns: int, groups: int, norm_before_gate: bool, kind: str) -> None:
    y, weight = torch.randn(3, 2, columns), torch.randn(columns)
    codes, scale = random_codes(3, 2, columns), torch.rand(columns if kind == "channels" else ()) * 0.1
    z: Activation = torch.randn(3, 2, columns) * 4 if kind == "float" else Quantized(codes, scale)
    wide = z.dequantize(torch.float64) if isinstance(z, Quantized) else z.double()
    for w in (weight, None):
        named = {"eps": EPS, "group_size": columns // groups, "norm_before_gate": norm_before_gate}
        exact = reference.gated_rms_norm(
            y.double(), wide, None if w is None else w.double(), **named, out_dtype=torch.float64
        )
        assert_close(gated_rms_norm(y, z, w, **named), exact, reference.gated_rms_norm(y, z, w, **named))
        for dtype in DTYPES[1:]:
            narrow = {"out_dtype": dtype, **named}
            plain = reference.gated_rms_norm(y, z, w, **narrow)
            assert_close(gated_rms_norm(y, z, w, **narrow), exact, plain)


def test_gated_refusals() -> None:
    x = torch.randn(2, 24)
    with pytest.raises(ValueError, match="group_size 10 does not divide the 24 channels"):
        gated_rms_norm(x, x, None, eps=EPS, group_size=10)
    assert gated_rms_norm(x[:0], x[:0], None, eps=EPS, group_size=24).shape == (0, 24)
    wide = x.double()
    assert torch.equal(
        gated_rms_norm(wide, wide, None, eps=EPS, group_size=24),
        reference.gated_rms_norm(wide, wide, None, eps=EPS, group_size=24),
    )
