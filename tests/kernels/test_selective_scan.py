"""Mamba1's scan against the recurrence, one token after the other in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.kernels.reference import selective_scan as module
from quamba.kernels.reference.selective_scan import selective_scan, selective_scan_step

pytestmark = pytest.mark.usefixtures("poison_empty")

D_INNER, D_STATE = 5, 3
# Around the borders of CHUNK (32) and SEGMENT (2048).
LENGTHS = [1, 2, 31, 32, 33, 63, 65, 96, 2047, 2049]


def loop(
    args: dict[str, Any], state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, L, Di) and the final state (B, Di, N), in the dtype of A."""
    A = args["A"]
    u, dt, B, C = (as_float(args[name], A.dtype) for name in ("u", "dt", "B", "C"))
    h = A.new_zeros(u.shape[0], *A.shape) if state is None else state.to(A.dtype).clone()
    outputs = []
    for t in range(u.shape[1]):
        raw = dt[:, t] if args["dt_bias"] is None else dt[:, t] + args["dt_bias"]
        delta = torch.where(raw > 20, raw, torch.log1p(torch.exp(-raw.abs())) + raw.clamp(min=0))
        new = torch.exp(delta[:, :, None] * A) * h + (delta * u[:, t])[:, :, None] * B[:, t][:, None, :]
        h = new if mask is None else torch.where(mask[:, t][:, None, None], new, h)
        y = (h * C[:, t][:, None, :]).sum(-1)
        if args["D"] is not None:
            y = y + args["D"] * u[:, t]
        if args["z"] is not None:
            z = as_float(args["z"], A.dtype)[:, t]
            y = y * z / (1 + torch.exp(-z))
        outputs.append(y)
    return (torch.stack(outputs, dim=1) if outputs else A.new_zeros(u.shape)), h


def random_args(batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "u": draw(batch, length, D_INNER),
        "dt": draw(batch, length, D_INNER),
        "A": -torch.exp(draw(D_INNER, D_STATE)),
        "B": draw(batch, length, D_STATE),
        "C": draw(batch, length, D_STATE),
        "D": draw(D_INNER),
        "z": draw(batch, length, D_INNER),
        "dt_bias": draw(D_INNER) - 2,
    }


def with_codes(args: dict[str, Any], per_channel: bool) -> dict[str, Any]:
    """u, dt, B, C and z as random int8 codes."""

    def codes(like: Tensor) -> Quantized:
        scale = torch.rand(like.shape[-1] if per_channel else ()) * 0.02 + 0.01
        return Quantized(random_codes(*like.shape), scale)

    return {**args, **{name: codes(args[name]) for name in ("u", "dt", "B", "C", "z")}}


def token(x: Activation | None, t: int) -> Activation | None:
    if x is None:
        return None
    return Quantized(x.codes[:, t], x.scale) if isinstance(x, Quantized) else x[:, t]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_recurrence(length: int, initial: bool, masked: bool) -> None:
    args = random_args(2, length)
    state = torch.randn(2, D_INNER, D_STATE, dtype=torch.float64) if initial else None
    mask = None
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, : length // 2] = False
        mask[0, length // 3 : length // 3 + 2] = False  # the op takes any mask, models only left padding
    expected, final = loop(args, state, mask)
    before = {name: value.clone() for name, value in args.items()}
    carried = torch.zeros(2, D_INNER, D_STATE, dtype=torch.float64) if state is None else state.clone()
    y = selective_scan(**args, state=carried, mask=mask, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(carried, final, rtol=1e-12, atol=1e-12)
    if not initial:
        stateless = selective_scan(**args, mask=mask, out_dtype=torch.float64)
        torch.testing.assert_close(stateless, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(args[name], before[name]) for name in args)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_optional_arguments(absent: tuple[str, ...]) -> None:
    args = {**random_args(2, 35), **dict.fromkeys(absent)}
    expected, final = loop(args)
    y = selective_scan(**args, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    state = torch.zeros(2, D_INNER, D_STATE, dtype=torch.float64)
    for t in range(35):
        now = {name: token(args[name], t) for name in ("u", "dt", "B", "C", "z")}
        step = selective_scan_step(**{**args, **now}, state=state, out_dtype=torch.float64)
        torch.testing.assert_close(step, expected[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 2 * D_STATE, 7 * D_STATE])
def test_tiles_of_channels(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is cut into tiles of channels, the last one ragged; 33 tokens are two rows of chunks."""
    monkeypatch.setattr(module, "CPU_TILE_ELEMENTS", 2 * tile)
    args = random_args(1, 33)
    expected, _ = loop(args)
    torch.testing.assert_close(
        selective_scan(**args, out_dtype=torch.float64), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("length", [40, 300])
def test_strong_decay_neither_overflows_nor_vanishes(length: int) -> None:
    """dt from nearly 0 to 50 and A to -20: decays from 1 to exp(-1000) in one sequence."""
    args = random_args(2, length)
    args["dt"] = torch.rand(2, length, D_INNER, dtype=torch.float64) ** 4 * 50 - 3
    args["dt"][:, ::7] = 50.0
    args["A"] = -torch.linspace(0.01, 20.0, D_INNER * D_STATE, dtype=torch.float64).view(D_INNER, D_STATE)
    state = torch.randn(2, D_INNER, D_STATE, dtype=torch.float64) * 100
    expected, final = loop(args, state)
    assert expected.isfinite().all()
    y = selective_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-11)
    single = {name: value.float() for name, value in args.items()}
    plain, _ = loop(single)
    exact, _ = loop(args)
    error = (selective_scan(**single) - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("length", [1, 33, 300])
def test_float32_errs_no_more_than_twice_the_loop(length: int) -> None:
    single = random_args(4, length, torch.float32)
    plain, plain_final = loop(single)
    exact, final = loop({name: value.double() for name, value in single.items()})
    state = torch.zeros(4, D_INNER, D_STATE)
    y = selective_scan(**single, state=state)
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (state - final).abs().max() <= 2 * (plain_final - final).abs().max()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("length", [1, 33])
def test_int8_inputs(per_channel: bool, length: int) -> None:
    args = with_codes(random_args(2, length), per_channel)
    expected, _ = loop(args)
    y = selective_scan(**args, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("shape", [(1, 1), (1, D_STATE), (D_INNER, D_STATE)])
def test_int8_state(length: int, shape: tuple[int, int]) -> None:
    args = random_args(2, length)
    scale = torch.rand(shape) * 0.02 + 0.01
    codes = random_codes(2, D_INNER, D_STATE)
    expected, final = loop(args, codes.double() * scale.double())
    state = codes.clone()
    y = selective_scan(**args, state=state, state_scale=scale, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_codes(state, final / scale.double(), slack=1e-9)
    state = codes.clone()
    now = {name: token(args[name], 0) for name in ("u", "dt", "B", "C", "z")}
    step = selective_scan_step(**{**args, **now}, state=state, state_scale=scale, out_dtype=torch.float64)
    torch.testing.assert_close(step, expected[:, 0], rtol=1e-12, atol=1e-12)
    _, after_one = loop({**args, **{n: args[n][:, :1] for n in now}}, codes.double() * scale.double())
    assert_codes(state, after_one / scale.double(), slack=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_states_are_rounded_once(dtype: torch.dtype) -> None:
    args = random_args(2, 33)
    start = torch.randn(2, D_INNER, D_STATE).to(dtype)
    expected, final = loop(args, start)
    state = start.clone()
    y = selective_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert state.dtype == dtype
    spacing = torch.finfo(dtype).eps
    assert ((state.double() - final).abs() <= 0.5001 * spacing * final.abs() + 1e-7).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_step_is_a_scan_of_one_token(quantized: bool) -> None:
    args = random_args(3, 1)
    args = with_codes(args, True) if quantized else args
    start = torch.randn(3, D_INNER, D_STATE, dtype=torch.float64)
    scanned, stepped = start.clone(), start.clone()
    y = selective_scan(**args, state=scanned, out_dtype=torch.float64)[:, 0]
    now = {name: token(args[name], 0) for name in ("u", "dt", "B", "C", "z")}
    step = selective_scan_step(**{**args, **now}, state=stepped, out_dtype=torch.float64)
    torch.testing.assert_close(step, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stepped, scanned, rtol=1e-12, atol=1e-12)


def test_pieces_carry_the_state() -> None:
    args = random_args(2, 100)
    expected, final = loop(args)
    state = torch.zeros(2, D_INNER, D_STATE, dtype=torch.float64)
    outputs, start = [], 0
    for size in (1, 31, 33, 0, 35):
        part = {n: v[:, start : start + size] if v.dim() == 3 else v for n, v in args.items()}
        outputs.append(selective_scan(**part, state=state, out_dtype=torch.float64))
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_non_contiguous_inputs() -> None:
    """As the model gives them: slices of the projections' outputs, here also transposed."""
    args = random_args(2, 35)
    wide = torch.randn(35, 2, 3 * D_INNER + 2 * D_STATE, dtype=torch.float64).transpose(0, 1)
    sizes = [D_INNER, D_INNER, D_INNER, D_STATE, D_STATE]
    args.update(zip(("u", "dt", "z", "B", "C"), wide.split(sizes, dim=-1), strict=True))
    expected, final = loop(args)
    state = torch.zeros(D_STATE, D_INNER, 2, dtype=torch.float64).permute(2, 1, 0)
    y = selective_scan(**args, state=state, out_dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, length: int) -> None:
    args = random_args(batch, length)
    state = torch.randn(batch, D_INNER, D_STATE, dtype=torch.float64)
    before = state.clone()
    assert selective_scan(**args, state=state).shape == (batch, length, D_INNER)
    if length == 0:
        assert torch.equal(state, before)


def test_gradients_are_those_of_the_recurrence() -> None:
    """For sensitivities of the loss, which decide how embedding rows are rounded."""
    args = random_args(2, 35)
    names = ("u", "dt", "B", "C", "z")
    leaves = [args[name].requires_grad_() for name in names]
    direction = torch.randn_like(args["u"])
    expected = torch.autograd.grad((loop(args)[0] * direction).sum(), leaves)
    y = selective_scan(**args, out_dtype=torch.float64)
    for found, wanted in zip(torch.autograd.grad((y * direction).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
