"""Mamba1's compiled scan against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.cpu.selective_scan import selective_scan, selective_scan_step
from quamba.kernels.reference import selective_scan as reference
from quamba.kernels.reference.state import spread_scale

pytestmark = pytest.mark.usefixtures("instruction_set", "poison_empty")

#: Channels and states: neither whole vectors; the usual ones, with more than a tile; other whole vectors.
SIZES = [(40, 12), (290, 16), (70, 32), (33, 1), (16, 24)]
INPUTS = ("u", "dt", "B", "C", "z")
KINDS = ["float", "float16", "bfloat16", "int8", "int8 channels"]


def random_args(batch: int, length: int, size: tuple[int, int] = (40, 12), kind: str = "float") -> Any:
    channels, d_state = size
    args = {name: torch.randn(batch, length, d_state if name in "BC" else channels) for name in INPUTS}
    changed = {name: as_kind(x, kind) for name, x in args.items()}
    A = -torch.exp(torch.randn(channels, d_state))
    return {**changed, "A": A, "D": torch.randn(channels), "dt_bias": torch.randn(channels) - 2}


def as_kind(x: Tensor, kind: str) -> Activation:
    if kind.startswith("int8"):
        scale = torch.rand(x.shape[-1] if kind.endswith("channels") else ()) * 0.02 + 0.01
        return Quantized(random_codes(*x.shape), scale)
    return x.to({"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind])


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in args.items()}


def random_state(kind: str, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    shape = (batch, *size)
    if kind in ("float32", "float16"):
        return {"state": torch.randn(shape).to(getattr(torch, kind))}
    if kind.startswith("groups"):
        columns = size[1] if kind == "groups" else 1
        group = torch.randint(0, 3, size[:1], dtype=torch.int32)
        return {
            "state": random_codes(*shape),
            "state_scale": torch.rand(3, columns) * 0.02 + 0.01,
            "state_group": group,
        }
    rows = {"one": (), "channel": (size[0], 1), "column": (size[1],), "each": size}[kind]
    return {"state": random_codes(*shape), "state_scale": torch.rand(rows) * 0.02 + 0.01}


STATES = ["float32", "float16", "one", "channel", "column", "each", "groups", "groups of one"]


def assert_like_float32(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the float32 reference's error, and a few roundings where that happens to be nothing."""
    assert found.shape == exact.shape
    error, allowed = (found - exact).abs().max(), 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def check(op: Any, plain_op: Any, args: dict[str, Any], stored: dict[str, Any], **options: Any) -> None:
    """y, and the state in its format: float as close as float32, codes a step off only next to a tie."""
    start = stored.get("state")
    copies = [{**stored, "state": start.clone()} if start is not None else {} for _ in range(3)]
    plain = plain_op(**args, **copies[0], **options)
    if start is not None:
        scale = spread_scale(stored.get("state_scale"), stored.get("state_group"), start.shape[1:2])
        real = start.double() if scale is None else start.double() * scale.double()
        copies[1] = {"state": real}
    exact = plain_op(**double(args), **copies[1], out_dtype=torch.float64, **options)
    found = op(**args, **copies[2], **options)
    assert_like_float32(found, plain, exact)
    if start is None:
        return
    state, real = copies[2]["state"], copies[1]["state"]
    if scale is None:
        assert_like_float32(state, copies[0]["state"], real)
    else:
        steps = (real / scale.double()).clamp(-128, 127)
        assert ((state - steps).abs() <= 0.5 + 1e-3).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 5), (2, 63), (1, 130)])
def test_lengths(batch: int, length: int, size: tuple[int, int]) -> None:
    args = random_args(batch, length, size)
    check(selective_scan, reference.selective_scan, args, {})
    check(selective_scan, reference.selective_scan, args, random_state("float32", batch, size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("length", [2, 70])
def test_formats(kind: str, state: str, length: int) -> None:
    for size in SIZES[:2]:
        args = random_args(2, length, size, kind)
        check(selective_scan, reference.selective_scan, args, random_state(state, 2, size))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_step(kind: str, state: str) -> None:
    for size in SIZES:
        args = random_args(3, 1, size, kind)
        for name in INPUTS:
            x = args[name]
            args[name] = Quantized(x.codes[:, 0], x.scale) if isinstance(x, Quantized) else x[:, 0]
        check(selective_scan_step, reference.selective_scan_step, args, random_state(state, 3, size))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias"])
@pytest.mark.parametrize("length", [1, 70])
def test_absent(absent: str, length: int) -> None:
    args = {**random_args(2, length), absent: None}
    check(selective_scan, reference.selective_scan, args, random_state("float32", 2, (40, 12)))


@pytest.mark.parametrize("length", [1, 2, 70])
def test_mask(length: int) -> None:
    mask = torch.rand(2, length) < 0.6
    mask[1] = False
    for size in SIZES[:2]:
        args, stored = random_args(2, length, size), random_state("float32", 2, size)
        check(selective_scan, reference.selective_scan, args, stored, mask=mask)
        before = stored["state"].clone()
        selective_scan(**args, **stored, mask=mask)
        assert torch.equal(stored["state"][1], before[1])


@pytest.mark.parametrize("length", [1, 70])
def test_slices_of_wider_tensors(length: int) -> None:
    wide = torch.randn(2, length, 200)
    args = random_args(2, length)
    args |= {"u": wide[..., 1:41], "dt": wide[..., 50:90], "z": wide[..., 100:140]}
    args |= {"B": wide[..., 150:162], "C": wide[..., 170:182], "D": args["D"].half()}
    check(selective_scan, reference.selective_scan, args, {})
    states = torch.randn(2, 40, 24)
    for op in (selective_scan, reference.selective_scan):
        check(op, reference.selective_scan, args, {"state": states[..., ::2]})
    state = states[..., ::2].clone().mT.contiguous().mT
    expected = state.clone(memory_format=torch.contiguous_format)
    selective_scan(**args, state=state)
    selective_scan(**args, state=expected)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("length", [1, 66])
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_extreme_steps(length: int, size: tuple[int, int]) -> None:
    """Steps from nothing to thousands, rates from slow to at once, gates far out; a full float16 state."""
    args = random_args(1, length, size)
    args["dt"] = torch.linspace(-100, 3000, length * size[0]).view(1, length, size[0])
    args["A"] = -torch.exp(torch.linspace(-12, 8, size[0] * size[1])).view(size)
    args["z"] = torch.linspace(-300, 300, length * size[0]).view(1, length, size[0])
    check(selective_scan, reference.selective_scan, args, random_state("float32", 1, size))
    stored = random_state("float16", 1, size)
    args["u"] = args["u"] * 1e5
    selective_scan(**args, **stored)
    assert stored["state"].isfinite().all()
    assert stored["state"].abs().max() == 65504


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_outputs(out_dtype: torch.dtype) -> None:
    args = random_args(2, 9)
    found = selective_scan(**args, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    wanted = reference.selective_scan(**args)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
    wide = double(args)
    assert torch.equal(selective_scan(**wide), reference.selective_scan(**wide))
    assert selective_scan(**random_args(2, 0)).shape == (2, 0, 40)
