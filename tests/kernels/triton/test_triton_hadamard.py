"""The Triton rotation against float64, and its fused forms against the ops they replace."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.activation import Overflow, Quantized, Rounding
from quamba.formats.hadamard import hadamard_factors
from quamba.kernels.reference import hadamard as reference
from quamba.kernels.reference import norm as reference_norm
from quamba.kernels.reference import quantize as reference_quantize
from quamba.kernels.triton import hadamard as module
from quamba.kernels.triton.hadamard import (
    Split,
    gated_norm_hadamard,
    hadamard,
    hadamard_quantize,
    split_for,
)
from quamba.kernels.triton.rotate_tiles import COLUMN, Tiles, tiles_for

pytestmark = pytest.mark.usefixtures("poison_empty")

SIZES = [1, 2, 12, 20, 24, 28, 40, 44, 64, 80, 128, 256]
MODES = [("half_even", "saturate"), ("half_away", "saturate"), ("half_even", "wrap"), ("half_away", "wrap")]


@pytest.fixture(params=["few rows", "many rows"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to cut a row, whatever the number of rows and short rows too."""
    few = request.param == "few rows"

    def cut(rows: int, n: int) -> Split:
        m, bits = hadamard_factors(n)
        extra = min(bits, 2) if few and m == 1 else 0
        slow, block = m << extra, 1 if few else 8
        return Split(slow, bits - extra, block if slow > 1 else 1, 2 if slow == 1 else 1, 1)

    monkeypatch.setattr(module, "split_for", cut)


def exact(x: Tensor, transpose: bool = False) -> Tensor:
    return reference.hadamard(x.double(), transpose)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_float32(n: int, transpose: bool, device: torch.device) -> None:
    x = torch.randn(3 if n < 40 else 1, n)
    given = hadamard(x.to(device), transpose).cpu()
    error = (given.double() - exact(x, transpose)).abs().max()
    allowed = (reference.hadamard(x, transpose).double() - exact(x, transpose)).abs().max()
    assert error <= 2 * allowed + 3e-7 * x.abs().max()


@pytest.mark.parametrize(("rows", "n"), [(1, 1536), (1, 5120), (1, 16384), (17, 8192), (3, 1024)])
def test_long_rows(rows: int, n: int, device: torch.device) -> None:
    x = torch.randn(rows, n)
    torch.testing.assert_close(hadamard(x.to(device)).cpu().double(), exact(x), rtol=1e-5, atol=3e-6)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("n", [64, 80])
def test_sums_of_integers_are_exact(n: int, device: torch.device) -> None:
    """In float32 any order of sums of small integers is exact: before the last factor all bits agree."""
    x = torch.randint(-1000, 1001, (2, n)).float()
    given = hadamard(x.to(device)).cpu()
    sums = (exact(x) * n**0.5).round().float()
    assert torch.equal(given, sums * torch.tensor(n**-0.5, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 128])
def test_narrow_floats(n: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 3, n).to(dtype)
    given = hadamard(x.to(device))
    assert given.dtype == dtype
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(given.cpu().double(), exact(x), rtol=ulp, atol=ulp * 1e-2)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_ties_of_codes(rounding: Rounding, overflow: Overflow, device: torch.device) -> None:
    """Sums of integers by 1/8 by 4: nothing is rounded before the codes, and half of them are ties."""
    x, scale = torch.randint(-60, 61, (3, 64)).float(), torch.tensor(0.25)
    given = hadamard_quantize(x.to(device), scale.to(device), rounding=rounding, overflow=overflow).cpu()
    quotient = exact(x).float()
    assert torch.equal(
        given, reference_quantize.quantize(quotient, scale, rounding=rounding, overflow=overflow)
    )


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("n", [24, 40, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes(n: int, dtype: torch.dtype, device: torch.device) -> None:
    x, scale = (torch.randn(2, n) * 2).to(dtype), torch.tensor(0.03)
    given = hadamard_quantize(x.to(device), scale.to(device)).cpu()
    assert_codes(given, exact(x) / scale.double(), slack=1e-4)


@pytest.mark.usefixtures("split")
def test_strided_rows(device: torch.device) -> None:
    x = torch.randn(2, 3, 200)
    for n in (12, 128):
        part = x[..., 11 : 11 + n]
        given = hadamard(x.to(device)[..., 11 : 11 + n]).cpu()
        torch.testing.assert_close(given.double(), exact(part), rtol=1e-5, atol=1e-6)


def test_empty(device: torch.device) -> None:
    x = torch.empty(0, 24, device=device)
    one = torch.tensor(1.0, device=device)
    assert hadamard(x).shape == hadamard_quantize(x, one).shape == x.shape
    for out_scale in (None, one):
        named = {"eps": 1e-5, "group_size": 24, "out_scale": out_scale}
        assert gated_norm_hadamard(x, x, None, **named).shape == x.shape


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("n", [1, 12, 128, 1024, 1536, 2048, 5120, 8192, 16384, 40960, 65536])
def test_every_split_covers_the_row(n: int, rows: int) -> None:
    split = split_for(rows, n)
    m, _ = hadamard_factors(n)
    assert split.slow << split.fast_bits == n
    assert split.slow % m == 0
    assert split.slow_block << split.fast_bits <= 2**15
    assert split.slow_block in ((1,) if split.slow == 1 else (1, 2, 4, 8))
    assert split.rows == 1 or split.slow == 1
    assert 1 <= split.num_warps <= 16


def test_one_row_is_spread_over_programs() -> None:
    assert split_for(1, 5120) == Split(40, 7, 1, 1, 16)
    assert split_for(1, 16384) == Split(16, 10, 1, 1, 16)
    assert split_for(4096, 16384) == Split(1, 14, 1, 1, 16)
    assert split_for(4096, 5120) == Split(40, 7, 8, 1, 1)


@pytest.fixture(params=["a program each", "many tiles", "two parts"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to cut rows into tiles, whatever the number of rows: few programs walk over many tiles."""
    early, parts = request.param == "a program each", 2 if request.param == "two parts" else 1

    def cut(rows: int, n: int, gated: bool = False) -> Tiles | None:
        usual = tiles_for(rows, n, gated)
        if usual is None:
            return None
        slots = 64 if early else usual.slots
        together = slots // (n // COLUMN)
        programs = -(-rows // together) if early else 2
        cut = {"slots": slots, "rows": together, "parts": parts, "programs": programs, "at_once": early}
        return dataclasses.replace(usual, **cut)

    monkeypatch.setattr(module, "tiles_for", cut)
    monkeypatch.setattr(module, "_ROWS_FOR_TILES", 1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("rows", "n"), [(9, 128), (13, 256), (7, 1536), (2, 5120), (1, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles(rows: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(rows, n + 3)[:, :n].to(dtype)
    given = hadamard(x.to(device)).cpu()
    error = (given.double() - exact(x)).abs().max()
    allowed = (reference.hadamard(x).double() - exact(x)).abs().max()
    assert error <= 2 * allowed + 3e-7 * exact(x).abs().max()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("n", [384 * 4, 5120])
def test_transposed_tiles(n: int, device: torch.device) -> None:
    x = torch.randn(2, n)
    given = hadamard(x.to(device), transpose=True).cpu().double()
    torch.testing.assert_close(given, exact(x, transpose=True), rtol=1e-5, atol=3e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e30])
def test_tiles_of_any_size(scale: float, device: torch.device) -> None:
    """Rows of float32 are brought into the range of float16, each by a factor of its own."""
    x = torch.randn(3, 256) * scale
    x[1] *= 1e-6
    x[2] = 0
    given, wanted = hadamard(x.to(device)).cpu().double(), exact(x)
    for row in range(2):
        assert (given[row] - wanted[row]).norm() <= 3e-7 * wanted[row].norm()
    assert not given[2].any()


@pytest.mark.usefixtures("tiles")
def test_tiles_of_large_halves(device: torch.device) -> None:
    """The sums of one column are 128 times the largest float16."""
    x = torch.full((5, 256), 65504.0).half()
    x[1, 128:] *= -1
    factor = 65504.0 * 256**0.5
    given = hadamard_quantize(x.to(device), torch.tensor(factor / 100, device=device)).cpu()
    assert given[0, 0] == given[1, 128] == 100
    assert given.count_nonzero() == 5


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("rounding", "overflow"), MODES)
@pytest.mark.parametrize("size", [60, 10**5])
def test_ties_in_tiles(rounding: Rounding, overflow: Overflow, size: int, device: torch.device) -> None:
    """Sums of integers by 1/16 by 8: half of them are ties."""
    x, scale = torch.randint(-60, 61, (5, 256)).float() * (size // 60), torch.tensor(0.125)
    given = hadamard_quantize(x.to(device), scale.to(device), rounding=rounding, overflow=overflow).cpu()
    wanted = reference_quantize.quantize(exact(x).float(), scale, rounding=rounding, overflow=overflow)
    if size == 60:
        assert torch.equal(given, wanted)
    else:  # numbers in the thousands, where the last bit of a float32 sum decides some
        assert (given != wanted).float().mean() < (1e-2 if overflow == "wrap" else 1e-3)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("size", [2.0**24, 2.0**30, 2.0**31, 2.0**32, 2.0**50])
def test_codes_wrap_far_out(size: float, device: torch.device) -> None:
    """Beyond int32, numbers count as its largest and smallest."""
    x, scale = torch.zeros(1, 256), torch.tensor(1.0)
    x[0, 1] = (size + size / 2**20) * 16
    given = hadamard_quantize(x.to(device), scale.to(device), overflow="wrap").cpu()
    assert torch.equal(given, reference_quantize.quantize(exact(x).float(), scale, overflow="wrap"))


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("n", [128, 256, 1536, 2048, 3072, 5120, 8192])
def test_every_tile_holds_whole_rows(n: int, rows: int) -> None:
    tiles = tiles_for(rows, n)
    assert tiles is not None
    assert tiles.slots in (16, 32, 64)
    assert 1 <= tiles.rows == tiles.slots // (n // COLUMN)
    assert tiles.programs % tiles.parts == 0
    whole = -(-rows // tiles.rows) * tiles.parts
    assert tiles.programs == whole if tiles.at_once else tiles.programs <= whole


@pytest.mark.parametrize("n", [64, 40 * 64, 40 * 512, 16384])
def test_what_tiles_are_not_for(n: int) -> None:
    assert tiles_for(100, n) is None


def test_tiles_of_few_and_of_many_rows() -> None:
    assert tiles_for(16, 5120) == Tiles(64, 1, 2, 32, 4, 1, True, 255)
    assert tiles_for(2048, 5120) == Tiles(64, 1, 1, 264, 4, 3, False, 168)
    assert tiles_for(2048, 5120, gated=True) == Tiles(64, 1, 1, 528, 4, 1, False, 128)
    assert tiles_for(64, 1536) == Tiles(16, 1, 2, 128, 4, 1, True, 255)
    assert tiles_for(2048, 1536, gated=True) == Tiles(64, 5, 1, 410, 4, 1, False, 128)


@pytest.mark.parametrize(("n", "groups"), [(24, 1), (24, 3), (64, 4), (256, 8)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_after_the_gated_norm(n: int, groups: int, norm_before_gate: bool, device: torch.device) -> None:
    """Two launches: tiles are not for these."""
    check_gated(2, n, groups, "channels", norm_before_gate, device)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("n", "groups"), [(256, 1), (256, 2), (1536, 3)])
@pytest.mark.parametrize(
    ("kind", "norm_before_gate"), [("float", False), ("scalar", True), ("channels", False)]
)
def test_tiles_after_the_gated_norm(
    n: int, groups: int, kind: str, norm_before_gate: bool, device: torch.device
) -> None:
    check_gated(3, n, groups, kind, norm_before_gate, device)


def check_gated(
    rows: int, n: int, groups: int, kind: str, norm_before_gate: bool, device: torch.device
) -> None:
    y, weight = torch.randn(rows, 1, n), torch.randn(n) if norm_before_gate or groups == 1 else None
    scale, out_scale = torch.rand(n if kind == "channels" else ()) * 0.05, torch.tensor(0.02)
    codes = random_codes(rows, 1, n)
    real = torch.randn(rows, 1, n).double() if kind == "float" else codes.double() * scale.double()
    z = real.float().to(device) if kind == "float" else Quantized(codes.to(device), scale.to(device))
    real = real.float().double() if kind == "float" else real
    options = {"eps": 1e-5, "group_size": n // groups, "norm_before_gate": norm_before_gate}
    moved = None if weight is None else weight.to(device)
    wide = None if weight is None else weight.double()
    normed = reference_norm.gated_rms_norm(y.double(), real, wide, **options, out_dtype=torch.float64)
    wanted = exact(normed)
    given = gated_norm_hadamard(y.to(device), z, moved, out_scale=out_scale.to(device), **options)
    assert given.shape == y.shape
    assert_codes(given.cpu(), wanted / out_scale.double(), slack=3e-4)
    given = gated_norm_hadamard(y.to(device), z, moved, **options)
    assert given.dtype == torch.float32
    assert (given.cpu().double() - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    narrow = gated_norm_hadamard(y.to(device), z, moved, out_dtype=torch.float16, **options)
    assert narrow.dtype == torch.float16
    assert (narrow.cpu().double() - wanted).norm() <= 5e-4 * wanted.norm()  # rounded twice


@pytest.mark.parametrize("n", [24, 256])
def test_after_the_gated_norm_of_slices(n: int, device: torch.device) -> None:
    both = torch.randn(2, 3 * n).half()
    y, z, scale = both[:, 5 : 5 + n], both[:, n + 7 : 2 * n + 7], torch.tensor(0.003)
    moved, modes = both.to(device), {"rounding": "half_away", "overflow": "wrap"}
    parts = moved[:, 5 : 5 + n], moved[:, n + 7 : 2 * n + 7]
    named = {"eps": 1e-5, "group_size": n, **modes}
    given = gated_norm_hadamard(*parts, None, out_scale=scale.to(device), **named)
    wanted = reference.gated_norm_hadamard(y, z, None, out_scale=scale, **named)
    off = (given.cpu() - wanted).abs()  # in int8, hence around the corner too
    assert off.max() <= 1 and off.count_nonzero() <= 1


def test_refusals(device: torch.device) -> None:
    x = torch.randn(2, 24, device=device)
    with pytest.raises(TypeError, match=r"got torch\.int8"):
        hadamard(torch.zeros(2, dtype=torch.int8, device=device))
    with pytest.raises(QuambaError, match="nearest supported sizes are 12 and 16"):
        hadamard(torch.randn(2, 14, device=device))
    with pytest.raises(ValueError, match="x is float64"):
        hadamard(x.double())
    with pytest.raises(ValueError, match="x has stride 2 in its last dimension"):
        hadamard(torch.randn(24, 2, device=device).T)
    with pytest.raises(ValueError, match=r"out_scale has shape \[24\]"):
        hadamard_quantize(x, torch.ones(24, device=device))
    with pytest.raises(ValueError, match="group_size 10 does not divide the 24 channels"):
        gated_norm_hadamard(x, x, None, eps=1e-5, group_size=10)
    with pytest.raises(QuambaError, match="nearest supported sizes are 12 and 16"):
        gated_norm_hadamard(x[:, :14], x[:, :14], None, eps=1e-5, group_size=14)
    wide = torch.randn(2, 256, device=device)
    with pytest.raises(ValueError, match=r"out_scale has shape \[24\]"):
        gated_norm_hadamard(
            wide, wide, None, eps=1e-5, group_size=256, out_scale=torch.ones(24, device=device)
        )
    with pytest.raises(ValueError, match=r"the scale of z has shape \[24\]"):
        z = Quantized(torch.zeros(2, 256, dtype=torch.int8, device=device), torch.ones(24, device=device))
        gated_norm_hadamard(wide, z, None, eps=1e-5, group_size=256)
