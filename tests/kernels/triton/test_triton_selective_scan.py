"""Mamba1's Triton kernels against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.reference import selective_scan as reference
from quamba.kernels.triton import selective_scan as module
from quamba.kernels.triton.selective_scan import ScanLaunch, StepLaunch, selective_scan, selective_scan_step

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
]

D_INNER, D_STATE = 40, 12  # neither a power of two; two programs of channels
INPUTS = ("u", "dt", "B", "C", "z")


def use_segments(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    launch = ScanLaunch(channels=32, lanes=4, tokens=4, segments=segments, num_warps=1)
    monkeypatch.setattr(module, "scan_launch", lambda *sizes: launch)


def random_args(device: torch.device, batch: int, length: int) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device)

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


def codes_like(x: Tensor, per_channel: bool) -> Quantized:
    scale = torch.rand(x.shape[-1] if per_channel else ()) * 0.02 + 0.01
    return Quantized(random_codes(*x.shape).to(x.device), scale.to(x.device))


def with_codes(args: dict[str, Any], per_channel: str, names: str = "u dt B C z") -> dict[str, Any]:
    return {**args, **{name: codes_like(args[name], name in per_channel.split()) for name in names.split()}}


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in args.items()}


def random_state(device: torch.device, batch: int) -> Tensor:
    return torch.randn(batch, D_INNER, D_STATE).to(device)


def first_token(args: dict[str, Any]) -> dict[str, Any]:
    def token(x: Activation | None) -> Activation | None:
        if x is None:
            return None
        return Quantized(x.codes[:, 0], x.scale) if isinstance(x, Quantized) else x[:, 0]

    return {**args, **{name: token(args[name]) for name in INPUTS}}


def assert_like_float32(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the float32 reference's error, and a few roundings where that happens to be nothing."""
    assert found.shape == exact.shape
    error, allowed = (found - exact).abs().max(), 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def check_scan(args: dict[str, Any], start: Tensor | None, **options: Any) -> None:
    plain_state, exact_state = (start, start) if start is None else (start.clone(), start.double())
    plain = reference.selective_scan(**args, state=plain_state, **options)
    exact = reference.selective_scan(**double(args), state=exact_state, out_dtype=torch.float64, **options)
    state = None if start is None else start.clone()
    assert_like_float32(selective_scan(**args, state=state, **options), plain, exact)
    if state is not None:
        assert_like_float32(state, plain_state, exact_state)


def check_step(args: dict[str, Any], start: Tensor) -> None:
    plain_state, exact_state, state = start.clone(), start.double(), start.clone()
    plain = reference.selective_scan_step(**args, state=plain_state)
    exact = reference.selective_scan_step(**double(args), state=exact_state, out_dtype=torch.float64)
    assert_like_float32(selective_scan_step(**args, state=state), plain, exact)
    assert_like_float32(state, plain_state, exact_state)


@pytest.mark.parametrize(("length", "segments"), [(1, 1), (2, 2), (21, 1), (21, 4)])
def test_scan(device: torch.device, monkeypatch: pytest.MonkeyPatch, length: int, segments: int) -> None:
    """With a state and a mask, left padding and holes; and without either."""
    use_segments(monkeypatch, segments)
    args = random_args(device, 2, length)
    mask = torch.ones(2, length, dtype=torch.bool, device=device)
    mask[1, : length // 2] = False
    mask[0, length // 3 : length // 3 + 2] = False
    check_scan(args, random_state(device, 2), mask=mask)
    check_scan(args, None)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_optional_arguments(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, segments: int, absent: tuple[str, ...]
) -> None:
    use_segments(monkeypatch, segments)
    args = {**random_args(device, 1, 5), **dict.fromkeys(absent)}
    check_scan(args, random_state(device, 1))
    check_step(first_token(args), random_state(device, 1))


@pytest.mark.parametrize("segments", [1, 3])
def test_strong_decay_neither_overflows_nor_vanishes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, segments: int
) -> None:
    """dt from nearly 0 to 50 and A to -20: decays from 1 to exp(-1000)."""
    use_segments(monkeypatch, segments)
    args = random_args(device, 1, 30)
    args["dt"] = torch.rand(1, 30, D_INNER, device=device) ** 4 * 50 - 3
    args["dt"][:, ::7] = 50.0
    args["A"] = -torch.linspace(0.01, 20.0, D_INNER * D_STATE, device=device).view(D_INNER, D_STATE)
    check_scan(args, random_state(device, 1) * 100)


@pytest.mark.parametrize("raw", [-100.0, -30.0, -12.0, -9.0, -4.0, 0.0, 19.9, 20.1, 60.0])
def test_small_steps_of_time_keep_their_digits(device: torch.device, raw: float) -> None:
    """log1p(exp(v)) of very negative v: with u = B = C = 1 and no state, y is N delta."""
    args = {**random_args(device, 1, 1), "D": None, "z": None, "dt_bias": None}
    args = {name: torch.ones_like(v) if name in ("u", "B", "C") else v for name, v in args.items()}
    args["dt"] = torch.full_like(args["dt"], raw) + torch.linspace(0, 0.1, D_INNER, device=device)
    exact = D_STATE * torch.nn.functional.softplus(args["dt"].double())
    torch.testing.assert_close(
        selective_scan(**args).double(), exact, rtol=2e-6 + 1e-7 * abs(raw), atol=1e-37
    )


@pytest.mark.parametrize(
    ("codes", "per_channel"), [("u dt B C z", ""), ("u dt B C z", "u dt B C z"), ("B z", "B"), ("u C", "C")]
)
def test_int8_inputs(device: torch.device, codes: str, per_channel: str) -> None:
    args = with_codes(random_args(device, 1, 5), per_channel, codes)
    check_scan(args, random_state(device, 1))
    check_step(first_token(args), random_state(device, 1))


def check_int8_state(args: dict[str, Any], codes: Tensor, scale: Tensor, **group: Tensor) -> None:
    wide = scale[group["state_group"].long()] if group else scale
    for scan, ref in (
        (selective_scan, reference.selective_scan),
        (selective_scan_step, reference.selective_scan_step),
    ):
        now = args if scan is selective_scan else first_token(args)
        exact_state, plain_state, state = codes.double() * wide.double(), codes.clone(), codes.clone()
        exact = ref(**double(now), state=exact_state, out_dtype=torch.float64)
        plain = ref(**now, state=plain_state, state_scale=wide)
        y = scan(**now, state=state, state_scale=scale, **group)
        assert_like_float32(y, plain, exact)
        assert_codes(state, exact_state / wide.double(), slack=1e-4)
        assert (state != plain_state).float().mean() <= 1e-3


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (1, D_STATE), (D_INNER, 1), (D_INNER, D_STATE)])
def test_int8_state(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, segments: int, shape: tuple[int, int]
) -> None:
    use_segments(monkeypatch, segments)
    scale = (torch.rand(shape) * 0.02 + 0.01).to(device)
    codes = random_codes(2, D_INNER, D_STATE).to(device)
    args = random_args(device, 2, 4)
    args["u"][:, :, ::3] *= 20
    check_int8_state(args, codes, scale)


@pytest.mark.parametrize("columns", [1, D_STATE])
def test_state_groups(device: torch.device, columns: int) -> None:
    """A table of scales and the group of each channel, instead of a scale for each channel."""
    table = (torch.rand(3, columns) * 0.02 + 0.01).to(device)
    group = torch.randint(0, 3, (D_INNER,), dtype=torch.int32).to(device)
    codes = random_codes(2, D_INNER, D_STATE).to(device)
    check_int8_state(random_args(device, 2, 4), codes, table, state_group=group)


@pytest.mark.parametrize("step", [False, True])
def test_float16_state_saturates(device: torch.device, step: bool) -> None:
    args = random_args(device, 1, 1)
    args["u"][..., :5] = 2e6
    args["u"][..., 5:9] = -2e6
    start = random_state(device, 1).half()
    exact = start.double()
    reference.selective_scan(**double(args), state=exact)
    assert exact.abs().max() > 65504
    if step:
        selective_scan_step(**first_token(args), state=start)
    else:
        selective_scan(**args, state=start)
    assert start.dtype == torch.float16
    limited = exact.clamp(-65504, 65504)
    assert ((start.double() - limited).abs() <= 5.1e-4 * limited.abs() + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_step(device: torch.device, monkeypatch: pytest.MonkeyPatch, batch: int, rows: int) -> None:
    """Several sequences a program, the last program with fewer."""
    launch = StepLaunch(channels=16, rows=rows, num_warps=1)
    monkeypatch.setattr(module, "step_launch", lambda *sizes: launch)
    args = first_token(random_args(device, batch, 1))
    check_step(args, random_state(device, batch))


def test_strided_inputs(device: torch.device) -> None:
    """As the model gives them: slices of the projections' outputs; a mask and a state out of larger ones."""
    args = random_args(device, 2, 4)
    sizes = [D_INNER, D_INNER, D_STATE, D_STATE, D_INNER]
    wide = torch.randn(4, 2, sum(sizes), device=device).transpose(0, 1)
    args.update(zip(INPUTS, wide.split(sizes, dim=-1), strict=True))
    mask = (torch.rand(4, 4, device=device) > 0.3).t()[::2]
    check_scan(args, None, mask=mask)
    states = torch.randn(4, D_INNER, D_STATE, device=device)
    before, kept = states[::2].clone(), states[1::2].clone()
    y = selective_scan(**args, state=states[::2], mask=mask)
    assert torch.equal(y, selective_scan(**args, state=before, mask=mask))
    assert torch.equal(states[::2], before)
    y = selective_scan_step(**first_token(args), state=states[::2])
    assert torch.equal(y, selective_scan_step(**first_token(args), state=before))
    assert torch.equal(states[::2], before)
    assert torch.equal(states[1::2], kept)


def test_half_precision_in_and_out(device: torch.device) -> None:
    """float16 activations are read as they are; only the result is rounded."""
    args = random_args(device, 1, 5)
    args = {name: v.half() if name in INPUTS else v for name, v in args.items()}
    exact = reference.selective_scan(**double(args), out_dtype=torch.float64)
    y = selective_scan(**args, out_dtype=torch.float16)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), exact, rtol=6e-4, atol=1e-5)
    state = torch.zeros(1, D_INNER, D_STATE, dtype=torch.float16, device=device)
    y = selective_scan_step(**first_token(args), state=state, out_dtype=torch.float16)
    torch.testing.assert_close(y.double(), exact[:, 0], rtol=6e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_to_do(device: torch.device, batch: int, length: int) -> None:
    args, state = random_args(device, batch, length), random_state(device, batch)
    before = state.clone()
    assert selective_scan(**args, state=state).shape == (batch, length, D_INNER)
    assert torch.equal(state, before)


def refused(name: str, args: dict[str, Any], state: Tensor, **options: Any) -> bool:
    for scan, now in ((selective_scan, args), (selective_scan_step, first_token(args))):
        with pytest.raises(ValueError, match=rf"^(the scale of )?{name} (is|has)"):
            scan(**now, state=state, **options)
    return True


def test_what_the_kernels_do_not_read_is_refused_by_name(device: torch.device) -> None:
    args, state = random_args(device, 2, 3), random_state(device, 2)
    before = state.clone()
    for name in INPUTS:
        assert refused(name, {**args, name: args[name].double()}, state)
        assert refused(name, {**args, name: torch.stack([args[name]] * 2, dim=-1)[..., 0]}, state)
        assert refused(name, {**args, name: args[name].clone().requires_grad_()}, state)
        wrong = Quantized(args[name].to(torch.int8), torch.ones(3, device=device))
        assert refused(name, {**args, name: wrong}, state)
    for name in ("A", "D", "dt_bias"):
        assert refused(name, {**args, name: args[name].double()}, state)
        assert refused(name, {**args, name: torch.stack([args[name]] * 2, dim=-1)[..., 0]}, state)
    assert refused("state", args, state.to(torch.int8))
    assert refused("state", args, state, state_scale=torch.ones(1, 1, device=device))
    assert refused("state", args, state.transpose(1, 2).contiguous().transpose(1, 2))
    table, group = torch.ones(2, 1, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    assert refused("state_group", args, state.to(torch.int8), state_scale=table, state_group=group)
    assert torch.equal(state, before)


@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("d_inner", [1536, 5120])
@pytest.mark.parametrize("length", [1, 512, 2048])
def test_launches_fill_the_gpu(batch: int, d_inner: int, length: int) -> None:
    scan = module.scan_launch(batch, length, d_inner)
    assert scan.segments == 1 or length // scan.segments >= 32
    assert batch * d_inner // scan.channels * scan.segments >= 2 * 132 or length < 512
    step = module.step_launch(batch, d_inner, 16)
    assert d_inner // step.channels * -(-batch // step.rows) >= 132
