"""The norms against loops in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.kernels.reference.norm import add_norm, gated_rms_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poison_empty")

EPS = 1e-3


def loop(rows: Tensor, weight: Tensor | None, bias: Tensor | None, center: bool) -> Tensor:
    out = torch.empty(rows.shape, dtype=torch.float64)
    for index, row in enumerate(rows.reshape(-1, rows.shape[-1]).tolist()):
        mean = sum(row) / len(row) if center else 0.0
        centred = [v - mean for v in row]
        norm = math.sqrt(sum(v * v for v in centred) / len(row) + EPS)
        for c, v in enumerate(centred):
            value = v / norm * (1.0 if weight is None else float(weight[c]))
            out.view(-1, rows.shape[-1])[index, c] = value + (0.0 if bias is None else float(bias[c]))
    return out


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_add_norm(with_residual: bool, with_weight: bool, with_bias: bool, center: bool) -> None:
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    residual = torch.randn(2, 3, 7, dtype=torch.float64) if with_residual else None
    weight = torch.randn(7, dtype=torch.float64) if with_weight else None
    bias = torch.randn(7, dtype=torch.float64) if with_bias else None
    total = x if residual is None else x + residual
    expected = loop(total, weight, bias, center)
    before = x.clone()
    y, r = add_norm(x, residual, weight, bias, eps=EPS, center=center, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(r, total)
    assert torch.equal(x, before)
    scale = torch.tensor(0.03)
    codes, _ = add_norm(x, residual, weight, bias, eps=EPS, center=center, out_scale=scale)
    assert_codes(codes, expected / scale.double(), slack=1e-9)


def test_float32_errs_no_more_than_twice_torch() -> None:
    x, weight = torch.randn(64, 96), torch.randn(96)
    exact = loop(x.double(), weight, None, False)
    plain = torch.nn.functional.rms_norm(x, (96,), weight, EPS)
    y, _ = add_norm(x, None, weight, eps=EPS)
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_mean_squares_of_half_precision_do_not_overflow() -> None:
    y, r = add_norm(torch.full((1, 8), 6e4, dtype=torch.float16), None, None, eps=EPS)
    torch.testing.assert_close(y, torch.ones(1, 8))
    assert r.dtype == torch.float16


@pytest.mark.parametrize(
    ("x", "residual", "asked", "given"),
    [
        (torch.float16, torch.float32, None, torch.float32),
        (torch.float32, torch.float16, None, torch.float16),
        (torch.float16, torch.float16, torch.float32, torch.float32),
        (torch.float16, None, torch.float32, torch.float32),
        (torch.float64, None, None, torch.float64),
    ],
)
def test_residual_dtype(
    x: torch.dtype, residual: torch.dtype | None, asked: torch.dtype | None, given: torch.dtype
) -> None:
    y, r = add_norm(
        torch.ones(2, 4, dtype=x),
        None if residual is None else torch.ones(2, 4, dtype=residual),
        None,
        eps=EPS,
        residual_dtype=asked,
    )
    assert (y.dtype, r.dtype) == (torch.float32, given)


def test_wide_residual_keeps_what_half_precision_loses() -> None:
    _, r = add_norm(torch.tensor([[0.5]], dtype=torch.float16), torch.tensor([[4096.0]]), None, eps=EPS)
    assert r.item() == 4096.5


def test_codes_saturate() -> None:
    x = torch.tensor([[3.0, -3.0]])
    codes, _ = add_norm(x, None, None, eps=0.0, out_scale=torch.tensor(0.001))
    assert codes.tolist() == [[127, -128]]


@pytest.mark.parametrize("per_channel", [False, True])
def test_rms_norm(per_channel: bool) -> None:
    codes, scale = random_codes(2, 3, 7), torch.rand(7 if per_channel else ()) * 0.1 + 0.01
    expected = loop(codes.double() * scale.double(), None, None, False)
    y = rms_norm(Quantized(codes, scale), eps=EPS)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    out_scale = torch.rand(7) * 0.01 + 0.01
    assert_codes(
        rms_norm(Quantized(codes, scale), eps=EPS, out_scale=out_scale), expected / out_scale.double()
    )
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    y = rms_norm(x, eps=EPS, out_dtype=torch.float64)
    torch.testing.assert_close(y, loop(x, None, None, False), rtol=1e-13, atol=1e-13)


def gated_loop(y: Tensor, z: Tensor, weight: Tensor | None, size: int, before: bool) -> Tensor:
    def silu(v: float) -> float:
        return v / (1 + math.exp(-v))

    out = torch.empty(y.shape, dtype=torch.float64)
    for index, (row, gates) in enumerate(
        zip(y.reshape(-1, y.shape[-1]).tolist(), z.reshape(-1, y.shape[-1]).tolist(), strict=True)
    ):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            if not before:
                group = [v * silu(g) for v, g in zip(group, gates[start : start + size], strict=True)]
            norm = math.sqrt(sum(v * v for v in group) / size + EPS)
            for c, v in enumerate(group, start):
                value = v / norm * (1.0 if weight is None else float(weight[c]))
                out.view(-1, y.shape[-1])[index, c] = value * silu(gates[c]) if before else value
    return out


@pytest.mark.parametrize("group_size", [12, 6, 3])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_gated_norm(group_size: int, norm_before_gate: bool, with_weight: bool) -> None:
    y, z = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    weight = torch.randn(12, dtype=torch.float64) if with_weight else None
    options = {"eps": EPS, "group_size": group_size, "norm_before_gate": norm_before_gate}
    copies = y.clone(), z.clone()
    out = gated_rms_norm(y, z, weight, **options, out_dtype=torch.float64)
    expected = gated_loop(y, z, weight, group_size, norm_before_gate)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(y, copies[0])
    assert torch.equal(z, copies[1])

    codes, scale = random_codes(2, 3, 12), torch.rand(12) * 0.05 + 0.01
    expected = gated_loop(y, codes.double() * scale.double(), weight, group_size, norm_before_gate)
    out = gated_rms_norm(y, Quantized(codes, scale), weight, **options, out_dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    out = gated_rms_norm(y.float(), Quantized(codes, scale), weight, **options)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (8,)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y, r = add_norm(x, x, torch.ones(8), eps=EPS)
    assert y.shape == r.shape == shape
    assert rms_norm(x, eps=EPS).shape == shape
    assert gated_rms_norm(x, x, None, eps=EPS, group_size=4).shape == shape


def test_non_contiguous_input() -> None:
    wide = torch.randn(5, 4, 24, dtype=torch.float64).transpose(0, 1)
    x = wide[..., 8:16]
    y, _ = add_norm(x, x, None, eps=EPS, out_dtype=torch.float64)
    torch.testing.assert_close(y, loop(2 * x, None, None, False), rtol=1e-13, atol=1e-13)
    y = gated_rms_norm(x, x, None, eps=EPS, group_size=4, out_dtype=torch.float64)
    torch.testing.assert_close(y, gated_loop(x, x, None, 4, False), rtol=1e-13, atol=1e-13)
