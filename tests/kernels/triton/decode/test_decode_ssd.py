"""Mamba2's gated step against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decode_cases import assert_as_accurate, columns_of, guarded, is_untouched
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.kernels.reference.ssd import ssd_step
from quamba.kernels.reference.state import spread_scale
from quamba.kernels.triton.decode.ssd import Part, square_parts, ssd_gate, ssd_launch

HEADS, HEADDIM, D_STATE = 4, 20, 12  # neither size a power of two: heads of two programs, the second ragged
D_INNER = HEADS * HEADDIM


def draw(device: torch.device, batch: int, ngroups: int, formats: str = "") -> dict[str, Activation]:
    """What the projection and the convolution give, in the order of the projection's outputs.

    formats  of z, x, B, C, dt: "f" floats, "1" codes of one scale, "c" of one a channel
    """
    columns = {"z": D_INNER, "x": D_INNER, "B": ngroups * D_STATE, "C": ngroups * D_STATE, "dt": HEADS}
    drawn: dict[str, Activation] = {}
    for (name, size), format in zip(columns.items(), formats or "fffff", strict=True):
        if format == "f":
            drawn[name] = torch.randn(batch, size).to(device)
        else:
            scale = torch.rand(size if format == "c" else ()) * 0.02 + 0.01
            drawn[name] = Quantized(random_codes(batch, size).to(device), scale.to(device))
    return drawn


def parameters(device: torch.device, D: str = "head") -> dict[str, Tensor | None]:
    skip = {"none": None, "head": torch.randn(HEADS), "channel": torch.randn(D_INNER)}[D]
    return {
        "A": -torch.exp(torch.randn(HEADS)).to(device),
        "D": None if skip is None else skip.to(device),
        "dt_bias": None if skip is None else torch.randn(HEADS).to(device) - 2,
    }


def check(
    drawn: dict[str, Activation],
    fixed: dict[str, Tensor | None],
    state: Tensor,
    ngroups: int,
    *,
    weight: Tensor | None = None,
    norm_before_gate: bool = False,
    **options: Any,
) -> Tensor:
    """Output and sums of squares; returns the exact state, float64, to which ``state`` was advanced."""
    device, batch = state.device, state.shape[0]
    scale = spread_scale(options.get("state_scale"), options.get("state_group"), (HEADS, HEADDIM))
    before = state.double() if scale is None else state.double() * scale.double()

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        args = {name: None if t is None else t.to(dtype) for name, t in fixed.items()}
        x, dt, B, C, z = (as_float(drawn[name], dtype) for name in ("x", "dt", "B", "C", "z"))
        after = before.to(dtype)
        limit = options.get("dt_limit", (0.0, math.inf))
        y = ssd_step(
            x,
            dt,
            args["A"],
            B,
            C,
            args["D"],
            args["dt_bias"],
            headdim=HEADDIM,
            ngroups=ngroups,
            dt_limit=limit,
            state=after,
            out_dtype=dtype,
        )
        gated = y * torch.nn.functional.silu(z)
        counted = y if norm_before_gate else gated
        return gated if weight is None else gated * weight.to(dtype), counted.square(), after

    projected, parts = columns_of(drawn)
    out, behind = guarded(batch, D_INNER, torch.float32, device)
    columns = square_parts(batch, HEADS, HEADDIM, D_STATE)
    squares, behind_squares = guarded(batch, columns, torch.float32, device)
    ssd_gate(
        projected,
        parts,
        **fixed,
        weight=weight,
        state=state,
        out=out,
        squares=squares,
        headdim=HEADDIM,
        ngroups=ngroups,
        norm_before_gate=norm_before_gate,
        **options,
    )
    exact, plain = expected(torch.float64), expected(torch.float32)
    assert_as_accurate(out, plain[0], exact[0])
    by_head = [s.unflatten(1, (HEADS, -1)).sum(2) for s in (squares, plain[1], exact[1])]
    assert columns % HEADS == 0
    assert_as_accurate(*by_head)
    assert is_untouched(behind) and is_untouched(behind_squares)
    return exact[2]


def random_state(batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, HEADS, HEADDIM, D_STATE).to(device)


@pytest.mark.parametrize(
    ("batch", "ngroups", "D", "dt_limit", "norm_before_gate"),
    [
        (1, 1, "head", (0.0, math.inf), False),
        (3, 2, "channel", (0.05, 0.3), False),
        (2, 4, "none", (0.1, math.inf), True),
        (4, 2, "head", (0.0, 0.2), True),
    ],
)
def test_floats(
    batch: int,
    ngroups: int,
    D: str,
    dt_limit: tuple[float, float],
    norm_before_gate: bool,
    device: torch.device,
) -> None:
    state, fixed = random_state(batch, device), parameters(device, D)
    weight = torch.randn(D_INNER, device=device) if ngroups == 2 else None
    drawn = draw(device, batch, ngroups)
    options: dict[str, Any] = {"dt_limit": dt_limit, "norm_before_gate": norm_before_gate}
    before = state.clone()
    after = check(drawn, fixed, state, ngroups, weight=weight, **options)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(state, before, atol=1e-2)


@pytest.mark.parametrize("formats", ["11111", "ccccc", "1cc1c", "c11c1"])
def test_codes_in(formats: str, device: torch.device) -> None:
    state = random_state(2, device)
    after = check(draw(device, 2, 2, formats), parameters(device, "channel"), state, 2)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-5)


def test_a_projection_of_float16(device: torch.device) -> None:
    drawn = {name: x.half() for name, x in draw(device, 2, 1).items() if isinstance(x, Tensor)}
    state = random_state(2, device)
    check(dict(drawn), parameters(device), state, 1)


@pytest.mark.parametrize("scale_shape", ["one", "column", "head", "channel", "all", "groups", "group rows"])
def test_a_state_of_int8(scale_shape: str, device: torch.device) -> None:
    shapes = {
        "one": (1, 1),
        "column": (1, D_STATE),
        "head": (HEADS, 1, 1),
        "channel": (HEADS, HEADDIM, 1),
        "all": (HEADS, HEADDIM, D_STATE),
        "groups": (5, D_STATE),
        "group rows": (5, 1),
    }
    scale = (torch.rand(shapes[scale_shape]) * 0.05 + 0.005).to(device)
    options: dict[str, Any] = {"state_scale": scale}
    if "group" in scale_shape:
        options["state_group"] = torch.randint(5, (D_INNER,), dtype=torch.int32).to(device)
    state = random_codes(2, HEADS, HEADDIM, D_STATE).to(device)
    after = check(draw(device, 2, 2, "1cccc"), parameters(device), state, 2, **options)
    per_code = spread_scale(scale, options.get("state_group"), (HEADS, HEADDIM))
    assert per_code is not None
    exact = after / per_code.double()
    assert (exact.abs() > 128).any() and (exact.abs() < 100).any()
    assert_codes(state, exact, slack=1e-4)


def test_a_state_of_float16(device: torch.device) -> None:
    """Values beyond float16 saturate."""
    state = random_state(2, device).half()
    state[0, 0, 0] = 65504
    state[0, 1, 3] = -65504
    drawn, fixed = draw(device, 2, 1), parameters(device)
    fixed["A"] = torch.full((HEADS,), -1e-6, device=device)
    after = check(drawn, fixed, state, 1)
    torch.testing.assert_close(state.double(), after.clamp(-65504, 65504), rtol=2**-11, atol=1e-4)
    assert state.isfinite().all()


def test_states_far_apart(device: torch.device) -> None:
    """A layer's states may be parts of a larger buffer."""
    both = torch.zeros(3, 2, HEADS, HEADDIM, D_STATE, device=device)
    drawn, fixed = draw(device, 3, 2), parameters(device)
    after = check(drawn, fixed, both[:, 1], 2)
    torch.testing.assert_close(both[:, 1].double(), after, rtol=1e-5, atol=1e-5)
    assert not both[:, 0].any()


@pytest.mark.parametrize("headdim", [4, 12])
def test_small_heads(headdim: int, device: torch.device) -> None:
    """A program has one of them, whole."""
    columns = {"z": 2 * headdim, "x": 2 * headdim, "B": 4, "C": 4, "dt": 2}
    drawn: dict[str, Tensor] = {name: torch.randn(1, size).to(device) for name, size in columns.items()}
    projected, parts = columns_of(dict(drawn))
    state = torch.randn(1, 2, headdim, 4).to(device)
    A, expected_state = -torch.rand(2, device=device), state.clone()
    out, _ = guarded(1, 2 * headdim, torch.float32, device)
    assert square_parts(1, 2, headdim, 4) == 2
    squares, _ = guarded(1, 2, torch.float32, device)
    ssd_gate(projected, parts, A, None, None, None, state, out, squares, headdim=headdim, ngroups=1)
    x, dt, B, C = (drawn[name] for name in ("x", "dt", "B", "C"))
    y = ssd_step(x, dt, A, B, C, None, None, headdim=headdim, ngroups=1, state=expected_state)
    y *= torch.nn.functional.silu(drawn["z"])
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(squares, y.square().unflatten(1, (2, -1)).sum(2))


@pytest.mark.parametrize("headdim", [1, 4, 12, 20, 24, 64, 80])
@pytest.mark.parametrize("nheads", [1, 600])
def test_launches(nheads: int, headdim: int) -> None:
    """A program is part of one head, a power of two of channels."""
    channels = ssd_launch(1, nheads, headdim, 128).channels
    assert channels & (channels - 1) == 0 and channels < 2 * headdim
    assert square_parts(1, nheads, headdim, 128) == nheads * -(-headdim // channels)


def test_parts(device: torch.device) -> None:
    scale = torch.tensor([0.5, 0.5], device=device)
    channels = Part(3, scale)
    one = channels.with_one_scale()
    assert (channels.mode, one.mode, Part(3, None).mode) == (2, 1, 0)
    assert one.first == 3 and one.scale is not None and one.scale.ndim == 0 and float(one.scale) == 0.5
    assert Part(3, None).with_one_scale() == Part(3, None)
    assert Part(0, scale[0]).with_one_scale().mode == 1
