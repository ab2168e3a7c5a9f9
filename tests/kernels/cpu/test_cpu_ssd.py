"""Mamba2's compiled kernels against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.cpu.ssd import ssd_scan, ssd_step
from quamba.kernels.reference import ssd as reference

pytestmark = pytest.mark.usefixtures("poison_empty", "instruction_set")

INPUTS = ("x", "dt", "B", "C")
SMALL = (4, 20, 12)  # heads, headdim, d_state: no whole vectors
USUAL = (3, 64, 128)
NO_LIMIT = (0.0, math.inf)
Sizes = tuple[int, int, int]


def random_args(batch: int, length: int, sizes: Sizes = SMALL, ngroups: int = 1) -> dict[str, Any]:
    """Inputs are slices of one wider tensor, as the model gives them."""
    heads, headdim, d_state = sizes
    widths = [heads * headdim, heads, ngroups * d_state, ngroups * d_state]
    x, dt, B, C = torch.randn(batch, length, sum(widths)).split(widths, dim=-1)
    return {
        "x": x,
        "dt": dt,
        "A": -torch.exp(torch.randn(heads)),
        "B": B,
        "C": C,
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 2,
        "headdim": headdim,
        "ngroups": ngroups,
    }


def codes_like(x: Tensor, per_channel: bool) -> Quantized:
    scale = torch.rand(x.shape[-1] if per_channel else ()) * 0.02 + 0.01
    wide = random_codes(*x.shape[:-1], x.shape[-1] + 8)
    return Quantized(wide[..., : x.shape[-1]], scale)


def with_codes(args: dict[str, Any], per_channel: bool) -> dict[str, Any]:
    return {**args, **{name: codes_like(args[name], per_channel) for name in INPUTS}}


def in_dtype(args: dict[str, Any], dtype: torch.dtype, names: tuple[str, ...] = INPUTS) -> dict[str, Any]:
    return {**args, **{name: args[name].to(dtype) for name in names}}


def double(args: dict[str, Any]) -> dict[str, Any]:
    """What codes and halves stand for, in float64."""

    def real(v: Any) -> Any:
        if isinstance(v, Quantized):
            return v.dequantize(torch.float64)
        return v.double() if isinstance(v, Tensor) else v

    return {name: real(v) for name, v in args.items()}


def some_mask(batch: int, length: int) -> Tensor:
    """Left padding in the last sequence, a hole in the first."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 2] = False
    mask[0, length // 3 : length // 3 + 2] = False
    return mask


def random_state(batch: int, sizes: Sizes = SMALL) -> Tensor:
    return torch.randn(batch, *sizes)


def token(x: Activation, t: int) -> Activation:
    return Quantized(x.codes[:, t], x.scale) if isinstance(x, Quantized) else x[:, t]


def first_token(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, **{name: token(args[name], 0) for name in INPUTS}}


def assert_like_float32(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the float32 reference's error, and a few roundings where that happens to be nothing."""
    assert found.shape == exact.shape
    error, allowed = (found - exact).abs().max(), 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def check_scan(args: dict[str, Any], start: Tensor | None, **options: Any) -> None:
    plain_state, exact_state = (start, start) if start is None else (start.clone(), start.double())
    plain = reference.ssd_scan(**args, state=plain_state, **options)
    exact = reference.ssd_scan(**double(args), state=exact_state, out_dtype=torch.float64, **options)
    state = None if start is None else start.clone()
    y = ssd_scan(**args, state=state, **options)
    assert_like_float32(y, plain, exact)
    if state is not None:
        assert_like_float32(state, plain_state, exact_state)


def check_step(args: dict[str, Any], start: Tensor, **options: Any) -> None:
    plain_state, exact_state, state = start.clone(), start.double(), start.clone()
    plain = reference.ssd_step(**args, state=plain_state, **options)
    exact = reference.ssd_step(**double(args), state=exact_state, out_dtype=torch.float64, **options)
    assert_like_float32(ssd_step(**args, state=state, **options), plain, exact)
    assert_like_float32(state, plain_state, exact_state)


@pytest.mark.parametrize("length", [1, 2, 47, 49, 70, 420])
def test_scan(length: int, threads: int) -> None:
    """With a state and a mask; without either. From one token to more chunks than are kept at a time."""
    args = random_args(2, length)
    check_scan(args, random_state(2), mask=some_mask(2, length))
    check_scan(args, torch.zeros_like(random_state(2)))
    check_scan(args, None)


@pytest.mark.parametrize("sizes", [USUAL, (2, 48, 64), (5, 8, 16), (1, 33, 7), (2, 1, 1)])
@pytest.mark.parametrize("length", [1, 60])
def test_sizes(sizes: Sizes, length: int) -> None:
    args = random_args(1, length, sizes)
    check_scan(args, random_state(1, sizes))
    check_step(first_token(args), random_state(1, sizes))


@pytest.mark.parametrize("D", [None, "head", "channel"])
@pytest.mark.parametrize("ngroups", [1, 2, 4])
@pytest.mark.parametrize("dt_limit", [NO_LIMIT, (0.05, 0.3), (0.0, 0.2), (0.1, math.inf)])
def test_options(ngroups: int, D: str | None, dt_limit: tuple[float, float]) -> None:
    """A lower limit of dt must not move the state at padded tokens."""
    args = random_args(2, 55, SMALL, ngroups)
    args["D"] = {None: None, "head": args["D"], "channel": torch.randn(80)}[D]
    args["dt_bias"] = args["dt_bias"] if D else None
    check_scan(args, random_state(2), mask=some_mask(2, 55), dt_limit=dt_limit)
    check_step(first_token(args), random_state(2), dt_limit=dt_limit)


def test_strong_decay_neither_overflows_nor_vanishes() -> None:
    """dt from nearly 0 to 50 and A to -20: decays from 1 to exp(-1000) in one chunk."""
    args = random_args(2, 130)
    args["dt"] = torch.rand(2, 130, 4) ** 4 * 50 - 3
    args["dt"][:, ::7] = 50.0
    args["A"] = -torch.linspace(0.01, 20.0, 4)
    check_scan(args, random_state(2) * 100)


def test_long_memory_keeps_its_digits() -> None:
    """Decays of nearly 1 over many chunks."""
    args = random_args(1, 1000, USUAL)
    args["A"] = torch.full((3,), -1e-3)
    check_scan(args, random_state(1, USUAL))


def without_signs(args: dict[str, Any]) -> dict[str, Any]:
    """Nothing cancels: what comes out bounds every sum of products."""
    return {**args, **{name: args[name].abs() for name in INPUTS if name != "dt"}, "D": args["D"].abs()}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("sizes", "ngroups", "length"), [(SMALL, 2, 430), (USUAL, 1, 110), ((1, 40, 250), 1, 110), (USUAL, 1, 9)]
)
def test_int8_inputs(sizes: Sizes, ngroups: int, length: int, per_channel: bool, threads: int) -> None:
    """Floats that are multiplied with codes may be integers of 16 bits, whose roundings add up."""
    args, start = with_codes(random_args(2, length, sizes, ngroups), per_channel), random_state(2, sizes)
    exact_state, bound_state, state = start.double(), start.double().abs(), start.clone()
    exact = reference.ssd_scan(**double(args), state=exact_state, out_dtype=torch.float64)
    bound = reference.ssd_scan(**without_signs(double(args)), state=bound_state, out_dtype=torch.float64)
    y = ssd_scan(**args, state=state)
    assert (y - exact).abs().max() <= 2**-14 * bound.max()
    assert (state - exact_state).abs().max() <= 2**-14 * bound_state.max()
    check_step(first_token(args), start)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_channel(lost: float) -> None:
    args, start = with_codes(random_args(1, 60, USUAL), per_channel=True), random_state(1, USUAL)
    start[0, 1, 5, 9] = lost
    args["dt_bias"] = torch.full((3,), -9.0)  # nothing is forgotten
    y = ssd_scan(**args, state=start)
    spoilt = torch.zeros(3 * 64, dtype=torch.bool)
    spoilt[64 + 5] = True
    assert not y[..., spoilt].isfinite().any()
    assert y[..., ~spoilt].isfinite().all()
    assert not start[0, 1, 5, 9].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_and_outputs(dtype: torch.dtype) -> None:
    args = in_dtype(random_args(2, 70), dtype)
    check_scan(args, random_state(2))
    check_step(first_token(args), random_state(2))
    exact = reference.ssd_scan(**double(args), out_dtype=torch.float64)
    y = ssd_scan(**args, out_dtype=dtype)
    assert y.dtype == dtype
    assert ((y - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()
    start = random_state(2)
    exact = reference.ssd_step(**double(first_token(args)), state=start.double(), out_dtype=torch.float64)
    y = ssd_step(**first_token(args), state=start, out_dtype=dtype)
    assert y.dtype == dtype
    assert ((y - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def assert_state(found: Tensor, exact: Tensor, scale: Tensor | None) -> None:
    if scale is not None:
        assert_codes(found, exact / scale.double(), slack=1e-3)
        return
    limit = torch.finfo(found.dtype)
    expected = exact.clamp(limit.min, limit.max)
    assert ((found.double() - expected).abs() <= 0.51 * limit.eps * expected.abs() + 1e-5).all()


def check_stored(args: dict[str, Any], start: Tensor, scale: Tensor | None, carried: dict[str, Any]) -> None:
    """The state is rounded once, and y knows nothing of that."""
    for op, plain, given in (
        (ssd_scan, reference.ssd_scan, args),
        (ssd_step, reference.ssd_step, first_token(args)),
    ):
        state, final = start.clone(), start.double() * (1.0 if scale is None else scale.double())
        exact = plain(**double(given), state=final, out_dtype=torch.float64)
        y = op(**given, state=state, **carried)
        torch.testing.assert_close(y.double(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))
        assert state.dtype == start.dtype
        assert_state(state, final, scale)


@pytest.mark.parametrize("sizes", [SMALL, USUAL])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_states(dtype: torch.dtype, sizes: Sizes, threads: int) -> None:
    check_stored(random_args(2, 55, sizes), random_state(2, sizes).to(dtype), None, {})


def test_float16_states_saturate() -> None:
    args = random_args(1, 50)
    args["x"] = args["x"] * 1e6
    check_stored(args, random_state(1).half(), None, {})


@pytest.mark.parametrize("sizes", [SMALL, USUAL])
@pytest.mark.parametrize("kind", ["one", "column", "head", "channel", "element", "groups", "groups column"])
def test_int8_states(kind: str, sizes: Sizes) -> None:
    heads, headdim, d_state = sizes
    start, carried = random_codes(2, *sizes), {}
    shapes = {"one": (), "column": (1, 1, d_state), "head": (heads, 1, 1), "channel": (heads, headdim, 1)}
    if kind.startswith("groups"):
        table = torch.rand(3, d_state if kind == "groups" else 1) * 0.02 + 0.01
        group = torch.randint(0, 3, (heads * headdim,), dtype=torch.int32)
        carried = {"state_scale": table, "state_group": group}
        scale = table[group.long()].view(heads, headdim, -1)
    else:
        scale = torch.rand(shapes.get(kind, sizes)) * 0.02 + 0.01
        carried = {"state_scale": scale}
    check_stored(random_args(2, 55, sizes), start, scale, carried)


@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_carry_the_state(batch: int) -> None:
    args, start = random_args(batch, 140), random_state(batch)
    whole_state, state = start.clone(), start.clone()
    whole = ssd_scan(**args, state=whole_state)
    outputs, at = [], 0
    for size in (1, 63, 65, 0, 11):
        part = {n: v[:, at : at + size] if n in INPUTS else v for n, v in args.items()}
        outputs.append(ssd_scan(**part, state=state))
        at += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole_state, rtol=1e-4, atol=1e-5)


def test_other_layouts() -> None:
    args = random_args(2, 70)
    for name in INPUTS:
        args[name] = args[name].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    start = random_state(2).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    final = start.double()
    exact = reference.ssd_scan(**double(args), state=final, out_dtype=torch.float64)
    torch.testing.assert_close(ssd_scan(**args, state=start).double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(start.double(), final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_to_do(batch: int, length: int) -> None:
    args, state = random_args(batch, length), random_state(batch)
    before = state.clone()
    assert ssd_scan(**args, state=state).shape == (batch, length, 80)
    assert torch.equal(state, before)


def test_float64_is_the_references() -> None:
    args = double(random_args(2, 9))
    state = random_state(2).double()
    same = state.clone()
    y = ssd_scan(**args, state=state, out_dtype=torch.float64)
    assert torch.equal(y, reference.ssd_scan(**args, state=same, out_dtype=torch.float64))
    assert torch.equal(state, same)
    y = ssd_step(**first_token(args), state=state, out_dtype=torch.float64)
    assert torch.equal(y, reference.ssd_step(**first_token(args), state=same, out_dtype=torch.float64))
