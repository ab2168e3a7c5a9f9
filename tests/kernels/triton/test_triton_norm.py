"""The Triton norms against the reference in float64: at most twice the error of float32."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.kernels.reference import norm as reference
from quamba.kernels.triton import norm
from quamba.kernels.triton.norm import add_norm, gated_rms_norm, rms_norm
from quamba.kernels.triton.quantize import Tile

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TO_BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="Triton's interpreter truncates floats to bfloat16: needs CUDA"
    ),
)
EPS = 1e-5


def assert_as_accurate(given: Tensor, in_float32: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """|given - exact| <= 2 |in_float32 - exact| + a few last bits, at the largest."""
    ours = (given.cpu().double() - exact).abs().max()
    bound = 2 * (in_float32.double() - exact).abs().max() + floor * exact.abs().max()
    assert ours <= bound, f"error {ours.item():.3g}, allowed {bound.item():.3g}"


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 63), (2, 3, 130), (1, 2560)], ids=str)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_float32(
    shape: tuple[int, ...], center: bool, with_residual: bool, with_weight: bool, device: torch.device
) -> None:
    x, residual = torch.randn(shape) + 0.3, torch.randn(shape) if with_residual else None
    weight = torch.randn(shape[-1]) if with_weight else None
    bias = torch.randn(shape[-1]) if with_weight and center else None
    on_device = [None if t is None else t.to(device) for t in (x, residual, weight, bias)]
    y, r = add_norm(*on_device, eps=EPS, center=center)
    y32, r32 = reference.add_norm(x, residual, weight, bias, eps=EPS, center=center)
    summed = r32.double()
    exact, _ = reference.add_norm(summed, None, wide(weight), wide(bias), eps=EPS, center=center)
    assert torch.equal(r.cpu(), r32)
    assert_as_accurate(y, y32, exact)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, TO_BFLOAT16])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.float16])
def test_residual_dtypes(
    x_dtype: torch.dtype, dtype: torch.dtype, residual_dtype: torch.dtype | None, device: torch.device
) -> None:
    x, residual = torch.randn(3, 70).to(x_dtype), torch.randn(3, 70).to(dtype)
    for before in (residual, None):
        moved = None if before is None else before.to(device)
        y, r = add_norm(x.to(device), moved, None, eps=EPS, residual_dtype=residual_dtype, out_dtype=dtype)
        y32, r32 = reference.add_norm(
            x, before, None, eps=EPS, residual_dtype=residual_dtype, out_dtype=torch.float32
        )
        assert (y.dtype, r.dtype) == (dtype, r32.dtype)
        assert torch.equal(r.cpu(), r32)
        assert_as_accurate(y, y32.to(dtype).float(), y32.double(), floor=1e-6)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("columns", [63, 256])
def test_codes(rows: int, columns: int, device: torch.device) -> None:
    x, residual = torch.randn(rows, columns).half(), torch.randn(rows, columns)
    weight, bias, scale = torch.randn(columns).half(), torch.randn(columns), torch.tensor(0.021)
    for center in (False, True):
        moved = [t.to(device) for t in (x, residual, weight, bias)]
        y, _ = add_norm(*moved, eps=EPS, center=center, out_scale=scale.to(device))
        summed = (x.float() + residual).double()
        exact, _ = reference.add_norm(summed, None, weight.double(), bias.double(), eps=EPS, center=center)
        assert_codes(y.cpu(), exact / scale.double(), slack=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_several_rows_a_program(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows are taken together on a GPU once there are thousands."""
    monkeypatch.setattr(norm, "whole_row_tile", lambda rows, columns: Tile(4, 64, 1))
    x, z = torch.randn(rows, 40), torch.randn(rows, 40)
    y, r = add_norm(x.to(device), z.to(device), None, eps=EPS)
    expected, summed = reference.add_norm(x, z, None, eps=EPS)
    torch.testing.assert_close(y.cpu(), expected)
    assert torch.equal(r.cpu(), summed)
    given = gated_rms_norm(x.to(device), z.to(device), None, eps=EPS, group_size=20)
    torch.testing.assert_close(given.cpu(), reference.gated_rms_norm(x, z, None, eps=EPS, group_size=20))


def test_strided_rows_and_one_residual(device: torch.device) -> None:
    x = torch.randn(4, 3, 90, device=device)
    y, r = add_norm(x[..., 20:70], None, None, eps=EPS)
    expected, _ = reference.add_norm(x[..., 20:70].cpu(), None, None, eps=EPS)
    torch.testing.assert_close(y.cpu(), expected)
    assert torch.equal(r, x[..., 20:70])
    y, r = add_norm(x[..., 20:70], x[..., :50], None, eps=EPS)
    assert torch.equal(r, x[..., 20:70] + x[..., :50])


def test_empty(device: torch.device) -> None:
    x = torch.empty(0, 4, 8, device=device)
    y, r = add_norm(x, x, None, eps=EPS, residual_dtype=torch.float16)
    assert (y.shape, r.shape, r.dtype) == (x.shape, x.shape, torch.float16)
    assert gated_rms_norm(x, x, None, eps=EPS, group_size=4).shape == x.shape


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 5, 48)], ids=str)
def test_unit_norm(shape: tuple[int, ...], per_channel: bool, device: torch.device) -> None:
    codes, scale = random_codes(*shape), torch.rand(shape[-1] if per_channel else ()) + 0.1
    out_scale = torch.tensor(0.03)
    x = Quantized(codes, scale)
    moved = Quantized(codes.to(device), scale.to(device))
    exact = reference.rms_norm(codes.double() * scale.double(), eps=EPS, out_dtype=torch.float64)
    assert_as_accurate(rms_norm(moved, eps=EPS), reference.rms_norm(x, eps=EPS), exact)
    given = rms_norm(moved, eps=EPS, out_scale=out_scale.to(device))
    assert_codes(given.cpu(), exact / out_scale.double(), slack=1e-4)
    floats = torch.randn(shape).half()
    given = rms_norm(floats.to(device), eps=EPS, out_dtype=torch.float16)
    torch.testing.assert_close(given.cpu(), reference.rms_norm(floats, eps=EPS, out_dtype=torch.float16))


def gate(kind: str, *shape: int) -> Tensor | Quantized:
    if kind == "float16":
        return torch.randn(shape).half()
    return Quantized(random_codes(*shape), torch.rand(shape[-1] if kind == "channels" else ()) * 0.05)


@pytest.mark.parametrize("kind", ["float16", "scalar", "channels"])
@pytest.mark.parametrize(("rows", "groups", "group_size"), [(1, 1, 63), (3, 2, 40), (5, 4, 8), (2, 1, 1500)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_gated(
    kind: str,
    rows: int,
    groups: int,
    group_size: int,
    norm_before_gate: bool,
    with_weight: bool,
    device: torch.device,
) -> None:
    channels = groups * group_size
    y, z = torch.randn(1, rows, channels), gate(kind, 1, rows, channels)
    weight = torch.randn(channels) if with_weight else None
    options = {"eps": EPS, "group_size": group_size, "norm_before_gate": norm_before_gate}
    moved = Quantized(*(t.to(device) for t in z)) if isinstance(z, Quantized) else z.to(device)
    given = gated_rms_norm(y.to(device), moved, None if weight is None else weight.to(device), **options)
    in_float32 = reference.gated_rms_norm(y, z, weight, **options)
    real = z.codes.double() * z.scale.double() if isinstance(z, Quantized) else z.double()
    exact = reference.gated_rms_norm(y.double(), real, wide(weight), **options, out_dtype=torch.float64)
    assert_as_accurate(given, in_float32, exact)


def test_gated_slices(device: torch.device) -> None:
    both = torch.randn(2, 3, 100, device=device).half()
    y, z = both[..., 10:50], both[..., 60:]
    given = gated_rms_norm(y, z, None, eps=EPS, group_size=20, out_dtype=torch.float16)
    expected = reference.gated_rms_norm(y.cpu(), z.cpu(), None, eps=EPS, group_size=20)
    torch.testing.assert_close(given.cpu().float(), expected, rtol=1e-3, atol=1e-6)


def test_refusals(device: torch.device) -> None:
    x = torch.randn(4, 6, device=device)
    with pytest.raises(ValueError, match="residual has stride 4 in its last dimension"):
        add_norm(x, torch.randn(6, 4, device=device).T, None, eps=EPS)
    with pytest.raises(ValueError, match="group_size 4 does not divide the 6 channels"):
        gated_rms_norm(x, x, None, eps=EPS, group_size=4)
    with pytest.raises(ValueError, match="x is float64"):
        rms_norm(x.double(), eps=EPS)
    with pytest.raises(ValueError, match="expected at most 32768"):
        rms_norm(torch.randn(1, 32769, device=device), eps=EPS)
    with pytest.raises(ValueError, match=r"out_scale has shape \[6\]"):
        rms_norm(x, eps=EPS, out_scale=torch.ones(6, device=device))
