"""The compiled rotation, alone and after the gated norm, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.activation import Overflow, Quantized, Rounding
from quamba.kernels.cpu.hadamard import gated_norm_hadamard, hadamard, hadamard_quantize
from quamba.kernels.reference import hadamard as reference
from quamba.kernels.reference import norm as reference_norm
from quamba.kernels.reference import quantize as reference_quantize

pytestmark = pytest.mark.usefixtures("instruction_set", "poison_empty")

#: Powers of two below, at and above each number of lanes; the Paley orders, with every 2^k beside them.
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384]
SIZES += [12, 20, 28, 36, 40, 44, 80, 88, 96, 160, 192, 320, 640, 1536, 2560, 5120, 76 * 32]
MODES: list[tuple[Rounding, Overflow]] = [
    ("half_even", "saturate"),
    ("half_even", "wrap"),
    ("half_away", "saturate"),
    ("half_away", "wrap"),
]


def exact(x: Tensor, transpose: bool = False) -> Tensor:
    return reference.hadamard(x.double(), transpose)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_float32(n: int, transpose: bool) -> None:
    x = torch.randn(3, n)
    wanted = exact(x, transpose)
    error = (hadamard(x, transpose).double() - wanted).abs().max()
    allowed = (reference.hadamard(x, transpose).double() - wanted).abs().max()
    assert error <= 2 * allowed + 3e-7 * x.abs().max()


@pytest.mark.usefixtures("threads")
def test_many_rows_and_slices() -> None:
    x = torch.randn(2, 37, 400)
    for n in (12, 128, 384):
        part = x[..., 11 : 11 + n]
        torch.testing.assert_close(hadamard(part).double(), exact(part), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [8, 64, 80, 1536])
def test_sums_of_integers_are_exact(n: int) -> None:
    """In float32 any order of sums of small integers is exact: before the last factor all bits agree."""
    x = torch.randint(-1000, 1001, (2, n)).float()
    sums = (exact(x) * n**0.5).round().float()
    assert torch.equal(hadamard(x), sums * torch.tensor(n**-0.5, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [8, 40, 128])
def test_other_floats(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, n).to(dtype)
    given = hadamard(x)
    assert given.dtype == dtype
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(given.double(), exact(x), rtol=ulp, atol=ulp * 1e-2)


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_ties_of_codes(rounding: Rounding, overflow: Overflow, dtype: torch.dtype) -> None:
    """Sums of integers by 1/8 by 4: nothing is rounded before the codes, and half of them are ties."""
    x, scale = torch.randint(-60, 61, (3, 64)).to(dtype), torch.tensor(0.25)
    wanted = reference_quantize.quantize(exact(x).float(), scale, rounding=rounding, overflow=overflow)
    assert torch.equal(hadamard_quantize(x, scale, rounding=rounding, overflow=overflow), wanted)


@pytest.mark.parametrize("n", [24, 40, 128, 1536])
def test_codes(n: int) -> None:
    x, scale = torch.randn(2, n) * 2, torch.tensor(0.03)
    assert_codes(hadamard_quantize(x, scale), exact(x) / scale.double(), slack=1e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("n", "groups"), [(24, 1), (24, 3), (64, 4), (256, 8), (1536, 1), (5120, 1)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("kind", ["float", "scalar", "channels"])
def test_after_the_gated_norm(n: int, groups: int, norm_before_gate: bool, kind: str) -> None:
    y, weight = torch.randn(3, 1, n), torch.randn(n) if norm_before_gate or groups == 1 else None
    scale, out_scale = torch.rand(n if kind == "channels" else ()) * 0.05, torch.tensor(0.02)
    codes = random_codes(3, 1, n)
    z = torch.randn(3, 1, n) if kind == "float" else Quantized(codes, scale)
    real = z.dequantize(torch.float64) if isinstance(z, Quantized) else z.double()
    options = {"eps": 1e-5, "group_size": n // groups, "norm_before_gate": norm_before_gate}
    wide = None if weight is None else weight.double()
    normed = reference_norm.gated_rms_norm(y.double(), real, wide, **options, out_dtype=torch.float64)
    wanted = exact(normed)
    given = gated_norm_hadamard(y, z, weight, out_scale=out_scale, **options)
    assert_codes(given, wanted / out_scale.double(), slack=3e-4)
    given = gated_norm_hadamard(y, z, weight, **options)
    assert given.dtype == torch.float32
    assert (given.double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    narrow = gated_norm_hadamard(y, z, weight, out_dtype=torch.float16, **options)
    assert narrow.dtype == torch.float16
    assert (narrow.double() - wanted).norm() <= 5e-4 * wanted.norm()


def test_after_the_gated_norm_of_slices() -> None:
    n = 96
    both, scale = torch.randn(2, 3 * n).half(), torch.tensor(0.003)
    parts = both[:, 5 : 5 + n], both[:, n + 7 : 2 * n + 7]
    wide = [part.double() for part in parts]
    normed = reference_norm.gated_rms_norm(*wide, None, eps=1e-5, group_size=n, out_dtype=torch.float64)
    steps = (exact(normed) / scale.double()).round()
    given = gated_norm_hadamard(
        *parts, None, eps=1e-5, group_size=n, out_scale=scale, rounding="half_away", overflow="wrap"
    )
    off = ((given - steps + 128) % 256 - 128).abs()
    assert off.max() <= 1
    assert off.count_nonzero() <= 1


def test_refusals() -> None:
    x = torch.randn(2, 24)
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        hadamard(torch.zeros(2, dtype=torch.int8))
    with pytest.raises(QuambaError, match="nearest supported sizes are 12 and 16"):
        hadamard(torch.randn(2, 14))
    with pytest.raises(ValueError, match="group_size 10 does not divide the 24 channels"):
        gated_norm_hadamard(x, x, None, eps=1e-5, group_size=10)
    one = torch.tensor(1.0)
    assert hadamard(x[:0]).shape == hadamard_quantize(x[:0], one).shape == (0, 24)
    assert gated_norm_hadamard(x[:0], x[:0], None, eps=1e-5, group_size=24).shape == (0, 24)
