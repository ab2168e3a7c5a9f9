"""Mamba2's scan against the recurrence, one token and one head after the other in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.kernels.reference.ssd import ssd_scan, ssd_step

pytestmark = pytest.mark.usefixtures("poison_empty")

HEADS, HEADDIM, D_STATE = 8, 3, 4
# Around the border of MAX_CHUNK (64).
LENGTHS = [1, 2, 31, 63, 64, 65, 129, 200]
NO_LIMIT = (0.0, math.inf)


def loop(
    args: dict[str, Any], state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, L, H * P) and the final state (B, H, P, N), in the dtype of A."""
    A, groups, P = args["A"], args["ngroups"], args["headdim"]
    x, dt, B, C = (as_float(args[name], A.dtype) for name in ("x", "dt", "B", "C"))
    heads, n = len(A), B.shape[-1] // groups
    start = A.new_zeros(x.shape[0], heads, P, n) if state is None else state.to(A.dtype)
    S = list(start.unbind(1))
    low, high = args.get("dt_limit", NO_LIMIT)
    y = []
    for t in range(x.shape[1]):
        raw = dt[:, t] if args["dt_bias"] is None else dt[:, t] + args["dt_bias"]
        delta = torch.where(raw > 20, raw, torch.log1p(torch.exp(-raw.abs())) + raw.clamp(min=0))
        delta = delta.clamp(low, high)
        for h in range(heads):
            group = slice(h // (heads // groups) * n, (h // (heads // groups) + 1) * n)
            x_h, d = x[:, t, h * P : (h + 1) * P], delta[:, h, None, None]
            new = torch.exp(d * A[h]) * S[h] + d * x_h[:, :, None] * B[:, t, None, group]
            S[h] = new if mask is None else torch.where(mask[:, t, None, None], new, S[h])
            y_h = (S[h] * C[:, t, None, group]).sum(-1)
            if args["D"] is not None:
                D = args["D"][h] if len(args["D"]) == heads else args["D"][h * P : (h + 1) * P]
                y_h = y_h + D * x_h
            y.append(y_h)
    return (torch.cat(y, dim=1).view(x.shape) if y else x), torch.stack(S, dim=1)


def random_args(
    batch: int, length: int, ngroups: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "x": draw(batch, length, HEADS * HEADDIM),
        "dt": draw(batch, length, HEADS),
        "A": -torch.exp(draw(HEADS)),
        "B": draw(batch, length, ngroups * D_STATE),
        "C": draw(batch, length, ngroups * D_STATE),
        "D": draw(HEADS),
        "dt_bias": draw(HEADS) - 2,
        "headdim": HEADDIM,
        "ngroups": ngroups,
    }


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in args.items()}


def with_codes(args: dict[str, Any], per_channel: bool) -> dict[str, Any]:
    def codes(like: Tensor) -> Quantized:
        scale = torch.rand(like.shape[-1] if per_channel else ()) * 0.02 + 0.01
        return Quantized(random_codes(*like.shape), scale)

    return {**args, **{name: codes(args[name]) for name in ("x", "dt", "B", "C")}}


def token(x: Activation, t: int) -> Activation:
    return Quantized(x.codes[:, t], x.scale) if isinstance(x, Quantized) else x[:, t]


def tokens(args: dict[str, Any], t: int) -> dict[str, Any]:
    return {**args, **{name: token(args[name], t) for name in ("x", "dt", "B", "C")}}


def random_state(batch: int) -> Tensor:
    return torch.randn(batch, HEADS, HEADDIM, D_STATE, dtype=torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_recurrence(length: int, ngroups: int, masked: bool) -> None:
    args = random_args(2, length, ngroups)
    mask = None
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, : length // 2] = False
        mask[0, length // 3 : length // 3 + 2] = False  # the op takes any mask, models only left padding
    before = {name: v.clone() for name, v in args.items() if isinstance(v, Tensor)}
    for start in (None, random_state(2)):
        expected, final = loop(args, start, mask)
        state = torch.zeros_like(random_state(2)) if start is None else start.clone()
        y = ssd_scan(**args, state=state, mask=mask, out_dtype=torch.float64)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
        if start is None:
            stateless = ssd_scan(**args, mask=mask, out_dtype=torch.float64)
            assert torch.equal(stateless, y)
    assert all(torch.equal(args[name], value) for name, value in before.items())


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 63, 64, 256])
def test_any_chunk_size_is_the_same_function(chunk_size: int) -> None:
    args = random_args(2, 67)
    expected, final = loop(args)
    state = torch.zeros_like(random_state(2))
    y = ssd_scan(**args, chunk_size=chunk_size, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", [None, "head", "channel"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dt_limit", [NO_LIMIT, (0.05, 0.3), (0.0, 0.2), (0.1, math.inf)])
@pytest.mark.parametrize("masked", [False, True])
def test_options(D: str | None, with_bias: bool, dt_limit: tuple[float, float], masked: bool) -> None:
    """A lower limit of dt must not move the state at padded tokens."""
    args = random_args(2, 20)
    args["D"] = {None: None, "head": args["D"], "channel": torch.randn(HEADS * HEADDIM).double()}[D]
    args["dt_bias"] = args["dt_bias"] if with_bias else None
    args["dt_limit"] = dt_limit
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = not masked
    expected, final = loop(args, None, mask)
    state = torch.zeros_like(random_state(2))
    y = ssd_scan(**args, state=state, mask=mask if masked else None, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    if not masked:
        state = torch.zeros_like(state)
        for t in range(20):
            step = ssd_step(**tokens(args, t), state=state, out_dtype=torch.float64)
            torch.testing.assert_close(step, expected[:, t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_strong_decay_neither_overflows_nor_vanishes() -> None:
    """dt from nearly 0 to 50 and A to -20: decays from 1 to exp(-1000) in one chunk."""
    args = random_args(2, 130)
    args["dt"] = torch.rand(2, 130, HEADS, dtype=torch.float64) ** 4 * 50 - 3
    args["dt"][:, ::7] = 50.0
    args["A"] = -torch.linspace(0.01, 20.0, HEADS, dtype=torch.float64)
    start = random_state(2) * 100
    expected, final = loop(args, start)
    state = start.clone()
    y = ssd_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ngroups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 65, 200])
def test_float32_errs_no_more_than_twice_the_loop(length: int, ngroups: int) -> None:
    single = cast(random_args(4, length, ngroups), torch.float32)
    plain, plain_final = loop(single)
    exact, final = loop(cast(single, torch.float64))
    state = random_state(4).float().zero_()
    y = ssd_scan(**single, state=state)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (state - final).abs().max() <= 2 * (plain_final - final).abs().max()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("length", [1, 65])
def test_int8_inputs(per_channel: bool, length: int) -> None:
    args = with_codes(random_args(2, length), per_channel)
    expected, _ = loop(args)
    y = ssd_scan(**args, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, D_STATE), (HEADS, HEADDIM, D_STATE), (HEADS, HEADDIM, 1)]
)
def test_int8_state(length: int, shape: tuple[int, ...]) -> None:
    args = random_args(2, length)
    scale = torch.rand(shape) * 0.02 + 0.01
    codes = random_codes(2, HEADS, HEADDIM, D_STATE)
    start = codes.double() * scale.double()
    expected, final = loop(args, start)
    state = codes.clone()
    y = ssd_scan(**args, state=state, state_scale=scale, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_codes(state, final / scale.double(), slack=1e-9)
    state = codes.clone()
    step = ssd_step(**tokens(args, 0), state=state, state_scale=scale, out_dtype=torch.float64)
    torch.testing.assert_close(step, expected[:, 0], rtol=1e-12, atol=1e-12)
    first = {name: v[:, :1] if name in ("x", "dt", "B", "C") else v for name, v in args.items()}
    assert_codes(state, loop(first, start)[1] / scale.double(), slack=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_states_are_rounded_once(dtype: torch.dtype) -> None:
    args = random_args(2, 65)
    start = random_state(2).to(dtype)
    expected, final = loop(args, start)
    state = start.clone()
    y = ssd_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert state.dtype == dtype
    assert ((state.double() - final).abs() <= 0.5001 * torch.finfo(dtype).eps * final.abs() + 1e-7).all()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2, 8])
def test_step_is_a_scan_of_one_token(quantized: bool, ngroups: int) -> None:
    args = random_args(3, 1, ngroups)
    args = with_codes(args, True) if quantized else args
    start = random_state(3)
    scanned, stepped = start.clone(), start.clone()
    y = ssd_scan(**args, state=scanned, out_dtype=torch.float64)[:, 0]
    step = ssd_step(**tokens(args, 0), state=stepped, out_dtype=torch.float64)
    torch.testing.assert_close(step, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stepped, scanned, rtol=1e-12, atol=1e-12)


def test_pieces_carry_the_state() -> None:
    args = random_args(2, 140)
    expected, final = loop(args)
    state = torch.zeros_like(random_state(2))
    outputs, start = [], 0
    for size in (1, 63, 65, 0, 11):
        part = {n: v[:, start : start + size] if n in ("x", "dt", "B", "C") else v for n, v in args.items()}
        outputs.append(ssd_scan(**part, state=state, out_dtype=torch.float64))
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_non_contiguous_inputs() -> None:
    """As the model gives them: slices of the projections' outputs, here also transposed."""
    args = random_args(2, 70)
    sizes = [HEADS * HEADDIM, HEADS, 2 * D_STATE, 2 * D_STATE]
    wide = torch.randn(70, 2, sum(sizes), dtype=torch.float64).transpose(0, 1)
    args.update(zip(("x", "dt", "B", "C"), wide.split(sizes, dim=-1), strict=True))
    expected, final = loop(args)
    state = torch.zeros(D_STATE, HEADDIM, HEADS, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    y = ssd_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    before = state.clone()
    step = ssd_step(**tokens(args, 0), state=state, out_dtype=torch.float64)
    first = {name: v[:, :1] if name in ("x", "dt", "B", "C") else v for name, v in args.items()}
    torch.testing.assert_close(step, loop(first, before)[0][:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, length: int) -> None:
    args, state = random_args(batch, length), random_state(batch)
    before = state.clone()
    assert ssd_scan(**args, state=state).shape == (batch, length, HEADS * HEADDIM)
    if length == 0:
        assert torch.equal(state, before)


def test_gradients_are_those_of_the_recurrence() -> None:
    """For sensitivities of the loss, which decide how embedding rows are rounded."""
    args = random_args(2, 70)
    names = ("x", "dt", "B", "C")
    leaves = [args[name].requires_grad_() for name in names]
    direction = torch.randn_like(args["x"])
    expected = torch.autograd.grad((loop(args)[0] * direction).sum(), leaves)
    y = ssd_scan(**args, out_dtype=torch.float64)
    for found, wanted in zip(torch.autograd.grad((y * direction).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
