"""Mamba1's gated step against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_cases import assert_as_accurate, columns_of, guarded, is_untouched
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.linear import linear
from quamba.kernels.reference.quantize import quantize
from quamba.kernels.reference.selective_scan import selective_scan_step
from quamba.kernels.reference.state import spread_scale
from quamba.kernels.triton.decode.scan import TimeSteps, scan_gate
from quamba.kernels.triton.decode.ssd import Part

CHANNELS, RANK, D_STATE = 40, 12, 6  # three programs, the last one ragged; no size a power of two
FORMATS = {"tensor": WeightFormat(8, "tensor"), "channel": WeightFormat(8, "channel")}


def random_weight(kind: str, device: torch.device, rank: int = RANK) -> Tensor | QuantizedWeight:
    if kind in ("float16", "float32"):
        return (torch.randn(CHANNELS, rank) * rank**-0.5).to(device, getattr(torch, kind))
    format = FORMATS[kind]
    scale = torch.rand(format.scale_shape((CHANNELS, rank))) * 4e-3 + 1e-3
    return QuantizedWeight(random_codes(CHANNELS, rank, low=-127), scale, format).to(device)


def draw(
    device: torch.device, batch: int, formats: str, rank: int = RANK, d_state: int = D_STATE
) -> dict[str, Activation]:
    """u, z, rank, B, C; formats of each: "f" floats, "1" codes of one scale, "c" of one a channel."""
    columns = {"u": CHANNELS, "z": CHANNELS, "rank": rank, "B": d_state, "C": d_state}
    drawn: dict[str, Activation] = {}
    for (name, size), format in zip(columns.items(), formats, strict=True):
        if format == "f":
            drawn[name] = torch.randn(batch, size).to(device)
        else:
            scale = torch.rand(size if format == "c" else ()) * 0.02 + 0.01
            drawn[name] = Quantized(random_codes(batch, size).to(device), scale.to(device))
    return drawn


def parameters(device: torch.device, d_state: int = D_STATE) -> dict[str, Tensor | None]:
    return {
        "A": -torch.exp(torch.randn(CHANNELS, d_state)).to(device),
        "D": torch.randn(CHANNELS).to(device),
        "dt_bias": torch.randn(CHANNELS).to(device) - 1,
    }


def check(
    drawn: dict[str, Activation],
    weight: Tensor | QuantizedWeight,
    fixed: dict[str, Tensor | None],
    state: Tensor,
    *,
    dt_scale: Tensor | None = None,
    half: bool = False,
    folded: bool = False,
    **options: Any,
) -> Tensor:
    """The output; returns the exact state, float64, to which ``state`` was advanced.

    folded  the weight's columns contain the scale of rank
    """
    batch, device = state.shape[0], state.device
    scale = spread_scale(options.get("state_scale"), options.get("state_group"), (CHANNELS,))
    before = state.double() if scale is None else state.double() * scale.double()
    w = weight.dequantize(torch.float64) if isinstance(weight, QuantizedWeight) else weight.double()
    rank = drawn["rank"]
    low_rank = (
        rank.codes.double() if folded and isinstance(rank, Quantized) else as_float(rank, torch.float64)
    )
    dt = low_rank @ w.T
    if dt_scale is not None:  # as the op before it gives them: its own test is that of projections
        real = (dt / dt_scale.double()).abs()
        assert ((real - real.floor() - 0.5).abs() > 1e-4).all(), "a tie: take another seed"
        dt = quantize(dt, dt_scale).double() * dt_scale.double()
    elif half:
        dt = dt.half().double()

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, D, dt_bias = (None if t is None else t.to(dtype) for t in fixed.values())
        u, z, B, C = (as_float(drawn[name], dtype) for name in ("u", "z", "B", "C"))
        after = before.to(dtype)
        y = selective_scan_step(u, dt.to(dtype), A, B, C, D, z, dt_bias, state=after, out_dtype=dtype)
        return y, after

    projected, parts = columns_of({name: drawn[name] for name in ("u", "z")})
    selected, others = columns_of({name: drawn[name] for name in ("rank", "B", "C")})
    parts |= others
    if folded:
        parts["rank"] = Part(0, None)
    steps = TimeSteps.of(weight, dt_scale, half)
    assert steps is not None
    out, behind = guarded(batch, CHANNELS, torch.float32, device)
    scan_gate(projected, selected, parts, steps, *fixed.values(), state, out, **options)
    exact, plain = expected(torch.float64), expected(torch.float32)
    # float16 time steps that are near a tie may be rounded the other way.
    assert_as_accurate(out, plain[0], exact[0], floor=3e-4 if half else 2e-6)
    assert is_untouched(behind)
    return exact[1]


def random_state(batch: int, device: torch.device, d_state: int = D_STATE) -> Tensor:
    return torch.randn(batch, CHANNELS, d_state).to(device)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weight", ["float16", "float32", "channel", "tensor"])
def test_floats(weight: str, batch: int, device: torch.device) -> None:
    """Weights of int8 too: time steps are int8 also where activations are floats."""
    drawn, fixed, state = draw(device, batch, "fffff"), parameters(device), random_state(batch, device)
    before = state.clone()
    after = check(drawn, random_weight(weight, device), fixed, state)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(state, before, atol=1e-2)


def test_float16(device: torch.device) -> None:
    drawn = {name: x.half() for name, x in draw(device, 2, "fffff").items() if isinstance(x, Tensor)}
    state = random_state(2, device)
    after = check(dict(drawn), random_weight("float16", device), parameters(device), state, half=True)
    torch.testing.assert_close(state.double(), after, rtol=1e-3, atol=1e-3)


def test_float16_time_steps_are_rounded(device: torch.device) -> None:
    """To what the op between would have given, and only if it gives float16."""
    drawn, weight = draw(device, 2, "fffff"), random_weight("float32", device)
    fixed, found = parameters(device), []
    for half in (False, True):
        out = torch.empty(2, CHANNELS, device=device)
        projected, parts = columns_of({name: drawn[name] for name in ("u", "z")})
        selected, others = columns_of({name: drawn[name] for name in ("rank", "B", "C")})
        steps = TimeSteps.of(weight, None, half)
        assert steps is not None
        state = torch.zeros(2, CHANNELS, D_STATE, device=device)
        scan_gate(projected, selected, parts | others, steps, *fixed.values(), state, out)
        found.append(out)
    error = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    assert 1e-6 < error < 1e-3


def test_without_skip_and_bias(device: torch.device) -> None:
    state, fixed = random_state(2, device), parameters(device)
    fixed["D"] = fixed["dt_bias"] = None
    after = check(draw(device, 2, "fffff"), random_weight("float32", device), fixed, state)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("formats", "weight", "dt_scales"),
    [
        ("11111", "tensor", "one"),
        ("cc1cc", "channel", "channels"),
        ("1c1c1", "channel", "none"),
        ("c11c1", "tensor", "channels"),
    ],
)
def test_codes(formats: str, weight: str, dt_scales: str, device: torch.device) -> None:
    drawn, state = draw(device, 3, formats), random_state(3, device)
    dt_scale = None
    if dt_scales != "none":
        dt_scale = (torch.rand(CHANNELS if dt_scales == "channels" else ()) * 0.02 + 0.01).to(device)
    after = check(drawn, random_weight(weight, device), parameters(device), state, dt_scale=dt_scale)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)


def test_codes_whose_scale_the_weight_contains(device: torch.device) -> None:
    drawn, weight, state = draw(device, 2, "cccc1"), random_weight("channel", device), random_state(2, device)
    assert isinstance(weight, QuantizedWeight)
    weight.scale.mul_(0.02)
    scale = torch.tensor(0.015, device=device)
    after = check(drawn, weight, parameters(device), state, dt_scale=scale, folded=True)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)


def test_time_steps_are_those_of_the_projection(device: torch.device) -> None:
    """Ties included, for scales are powers of two. With a state of 0, and 1 for u and B, it becomes delta."""
    rank = Quantized((random_codes(2, RANK) // 16).to(device), torch.tensor(2.0**-4, device=device))
    codes = random_codes(CHANNELS, RANK) // 16
    weight = QuantizedWeight(codes, torch.full((1, 1), 0.25), FORMATS["tensor"]).to(device)
    dt_scale = torch.tensor(2.0**-4, device=device)
    ones = Quantized(torch.ones(2, 1, dtype=torch.int8, device=device), torch.tensor(1.0, device=device))
    many = Quantized(ones.codes.repeat(1, CHANNELS), ones.scale)
    state, out = torch.zeros(2, CHANNELS, 1, device=device), torch.empty(2, CHANNELS, device=device)
    projected, parts = columns_of({"u": many, "z": many})
    selected, others = columns_of({"rank": rank, "B": ones, "C": ones})
    steps = TimeSteps.of(weight, dt_scale, half=False)
    assert steps is not None
    A = torch.full((CHANNELS, 1), -1.0, device=device)
    scan_gate(projected, selected, parts | others, steps, A, None, None, state, out)
    dt = Quantized(linear(rank, weight, out_scale=dt_scale), dt_scale).dequantize()
    torch.testing.assert_close(state[..., 0], torch.nn.functional.softplus(dt), rtol=1e-5, atol=1e-7)
    quotient = linear(rank, weight) / dt_scale
    assert (quotient - quotient.floor() == 0.5).any(), "no ties"


@pytest.mark.parametrize(
    ("rank", "d_state", "formats"), [(4, 5, "fffff"), (4, 5, "cc1cc"), (8, 1, "cc1cc"), (1, 16, "fffff")]
)
def test_sizes(rank: int, d_state: int, formats: str, device: torch.device) -> None:
    """Rows of codes that begin in the middle of a word; one column."""
    weight = random_weight("float32" if formats == "fffff" else "channel", device, rank)
    drawn, state = draw(device, 2, formats, rank, d_state), random_state(2, device, d_state)
    after = check(drawn, weight, parameters(device, d_state), state)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_shape", ["one", "column", "channel", "all", "groups", "group rows"])
def test_a_state_of_int8(scale_shape: str, device: torch.device) -> None:
    shapes = {
        "one": (1, 1),
        "column": (1, D_STATE),
        "channel": (CHANNELS, 1),
        "all": (CHANNELS, D_STATE),
        "groups": (3, D_STATE),
        "group rows": (3, 1),
    }
    scale = (torch.rand(shapes[scale_shape]) * 0.05 + 0.005).to(device)
    options: dict[str, Any] = {"state_scale": scale}
    if "group" in scale_shape:
        options["state_group"] = torch.randint(3, (CHANNELS,), dtype=torch.int32).to(device)
    state = random_codes(2, CHANNELS, D_STATE).to(device)
    drawn, weight = draw(device, 2, "cc1cc"), random_weight("channel", device)
    after = check(drawn, weight, parameters(device), state, **options)
    per_code = spread_scale(scale, options.get("state_group"), (CHANNELS,))
    assert per_code is not None
    exact = after / per_code.double()
    assert (exact.abs() > 128).any() and (exact.abs() < 100).any()
    assert_codes(state, exact, slack=1e-4)


def test_a_state_of_float16(device: torch.device) -> None:
    """Values beyond float16 saturate."""
    state = random_state(2, device).half()
    state[0, 0], state[0, 17] = 65504, -65504
    fixed = parameters(device)
    fixed["A"] = torch.full((CHANNELS, D_STATE), -1e-6, device=device)
    after = check(draw(device, 2, "fffff"), random_weight("float32", device), fixed, state)
    torch.testing.assert_close(state.double(), after.clamp(-65504, 65504), rtol=2**-11, atol=1e-4)
    assert state.isfinite().all()


def test_states_far_apart(device: torch.device) -> None:
    both = torch.zeros(3, 2, CHANNELS, D_STATE, device=device)
    weight = random_weight("float32", device)
    after = check(draw(device, 3, "fffff"), weight, parameters(device), both[:, 1])
    torch.testing.assert_close(both[:, 1].double(), after, rtol=1e-5, atol=1e-5)
    assert not both[:, 0].any()


def test_what_is_not_projected(device: torch.device) -> None:
    def of(weight: Tensor | QuantizedWeight) -> TimeSteps | None:
        return TimeSteps.of(weight, None, half=False)

    assert of(torch.randn(12, CHANNELS, device=device).T) is None
    packed = torch.zeros(CHANNELS, 64, dtype=torch.uint8)
    assert of(QuantizedWeight(packed, torch.ones(CHANNELS, 1), WeightFormat(4, "channel"))) is None
    grouped = QuantizedWeight(
        torch.zeros(CHANNELS, 8, dtype=torch.int8),
        torch.ones(CHANNELS, 2, dtype=torch.float16),
        WeightFormat(8, "group", 4),
    )
    assert of(grouped) is None
    assert of(random_weight("channel", device, rank=6)) is None
    kept = of(random_weight("channel", device))
    assert kept is not None and kept.weight.dtype == torch.int8 and kept.scale is not None
