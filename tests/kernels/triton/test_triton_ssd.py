"""Mamba2's Triton kernels against the reference in float64, and the reference's own float32 error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import assert_codes, random_codes
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.reference import ssd as reference
from quamba.kernels.triton import ssd as module
from quamba.kernels.triton.ssd import StepLaunch, ssd_scan, ssd_step
from quamba.kernels.triton.ssd_chunks import ScanLaunch, scan_launch

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
]

HEADS, HEADDIM, D_STATE = 4, 20, 12  # neither size a power of two
INPUTS = ("x", "dt", "B", "C")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_launch(monkeypatch)


def use_launch(
    monkeypatch: pytest.MonkeyPatch, chunk: int = 16, rows: int = 16, heads: int = 2, channels: int = 32
) -> None:
    launch = ScanLaunch(
        chunk=chunk,
        rows=rows,
        heads=heads,
        channels=channels,
        prepare_heads=4,
        state_warps=4,
        state_stages=2,
        output_warps=4,
        output_stages=2,
    )
    monkeypatch.setattr(module, "scan_launch", lambda *sizes: launch)


def random_args(device: torch.device, batch: int, length: int, ngroups: int = 2) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device)

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


def codes_like(x: Tensor, per_channel: bool) -> Quantized:
    scale = torch.rand(x.shape[-1] if per_channel else ()) * 0.02 + 0.01
    return Quantized(random_codes(*x.shape).to(x.device), scale.to(x.device))


def with_codes(args: dict[str, Any], per_channel: str, names: str = "x dt B C") -> dict[str, Any]:
    return {**args, **{name: codes_like(args[name], name in per_channel.split()) for name in names.split()}}


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in args.items()}


def random_state(device: torch.device, batch: int) -> Tensor:
    return torch.randn(batch, HEADS, HEADDIM, D_STATE).to(device)


def first_token(args: dict[str, Any]) -> dict[str, Any]:
    def token(x: Activation) -> Activation:
        return Quantized(x.codes[:, 0], x.scale) if isinstance(x, Quantized) else x[:, 0]

    return {**args, **{name: token(args[name]) for name in INPUTS}}


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
    y = ssd_scan(**args, state=state, precision="ieee", **options)
    assert_like_float32(y, plain, exact)
    if state is not None:
        assert_like_float32(state, plain_state, exact_state)


@pytest.mark.parametrize(
    ("length", "chunk", "rows", "heads"), [(1, 16, 16, 1), (33, 32, 16, 3), (18, 16, 16, 9)]
)
def test_scan(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, length: int, chunk: int, rows: int, heads: int
) -> None:
    """With a state and a mask, left padding and holes; and without either. Heads in two parts."""
    use_launch(monkeypatch, chunk, rows, heads, channels=16)
    args = random_args(device, 2, length)
    mask = torch.ones(2, length, dtype=torch.bool, device=device)
    mask[1, : length // 2] = False
    mask[0, length // 3 : length // 3 + 2] = False
    check_scan(args, random_state(device, 2), mask=mask)
    check_scan(args, None)


@pytest.mark.parametrize(
    ("ngroups", "D", "dt_limit"),
    [
        (1, None, (0.0, math.inf)),
        (2, "channel", (0.05, 0.3)),
        (4, "head", (0.1, math.inf)),
        (4, "channel", (0.0, 0.2)),
    ],
)
def test_scan_options(
    device: torch.device, ngroups: int, D: str | None, dt_limit: tuple[float, float]
) -> None:
    """A lower limit of dt must not move the state at padded tokens."""
    args = random_args(device, 1, 18, ngroups)
    args["D"] = {None: None, "head": args["D"], "channel": torch.randn(HEADS * HEADDIM, device=device)}[D]
    args["dt_bias"] = args["dt_bias"] if D else None
    mask = torch.ones(1, 18, dtype=torch.bool, device=device)
    mask[0, :7] = False
    check_scan(args, random_state(device, 1), mask=mask, dt_limit=dt_limit)


def test_a_chunk_size_changes_nothing(device: torch.device) -> None:
    args = random_args(device, 1, 18)
    assert torch.equal(ssd_scan(**args, chunk_size=7), ssd_scan(**args, chunk_size=256))


def test_strong_decay_neither_overflows_nor_vanishes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dt from nearly 0 to 50 and A to -20: decays from 1 to exp(-1000) in one chunk."""
    use_launch(monkeypatch, chunk=32)
    args = random_args(device, 1, 40)
    args["dt"] = torch.rand(1, 40, HEADS, device=device) ** 4 * 50 - 3
    args["dt"][:, ::7] = 50.0
    args["A"] = -torch.linspace(0.01, 20.0, HEADS, device=device)
    check_scan(args, random_state(device, 1) * 100)


@pytest.mark.parametrize(
    ("codes", "per_channel"),
    [
        ("x dt B C", ""),
        ("x dt B C", "x dt B C"),
        ("x B", "B"),
        ("x C", "C"),
        ("dt B C", "dt"),
        ("x B C", "x"),
    ],
)
def test_scan_int8_inputs(device: torch.device, codes: str, per_channel: str) -> None:
    args = with_codes(random_args(device, 1, 18), per_channel, codes)
    check_scan(args, random_state(device, 1))


@pytest.mark.parametrize("per_channel", [None, "", "x B C"])
def test_split_precision(device: torch.device, per_channel: str | None) -> None:
    """What ``Precision`` and the docstring promise, on inputs as floats and as codes."""
    args = random_args(device, 1, 50)
    args = args if per_channel is None else with_codes(args, per_channel, "x B C")
    start = random_state(device, 1)
    state, exact_state = start.clone(), start.double()
    y = ssd_scan(**args, state=state)
    exact = reference.ssd_scan(**double(args), state=exact_state, out_dtype=torch.float64)
    for found, wanted in ((y, exact), (state, exact_state)):
        size = wanted.square().mean().sqrt()
        assert (found - wanted).square().mean().sqrt() <= 2e-5 * size
        assert (found - wanted).abs().max() <= 1e-3 * size


SCALE_SHAPES = [(1, 1, 1), (1, 1, D_STATE), (HEADS, HEADDIM, 1), (HEADS, HEADDIM, D_STATE), (HEADS, 1, 1)]


@pytest.mark.parametrize("shape", SCALE_SHAPES)
def test_int8_state(device: torch.device, shape: tuple[int, ...]) -> None:
    """In a scan and in a step; codes that saturate occur."""
    args = random_args(device, 1, 18)
    scale = (torch.rand(shape) * 0.02 + 0.01).to(device)
    codes = random_codes(1, HEADS, HEADDIM, D_STATE).to(device)
    exact_state = codes.double() * scale.double()
    exact = reference.ssd_scan(**double(args), state=exact_state, out_dtype=torch.float64)
    assert (exact_state / scale).abs().max() > 140
    state = codes.clone()
    y = ssd_scan(**args, state=state, state_scale=scale, precision="ieee")
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)
    assert_codes(state, exact_state / scale.double(), slack=1e-4)
    check_int8_step(first_token(args), codes, scale)


def check_int8_step(args: dict[str, Any], codes: Tensor, scale: Tensor, **group: Tensor) -> None:
    wide = scale[group["state_group"].long()].view(HEADS, HEADDIM, -1) if group else scale
    exact_state = codes.double() * wide.double()
    exact = reference.ssd_step(**double(args), state=exact_state, out_dtype=torch.float64)
    plain_state = codes.clone()
    plain = reference.ssd_step(**args, state=plain_state, state_scale=wide)
    state = codes.clone()
    y = ssd_step(**args, state=state, state_scale=scale, **group)
    assert_like_float32(y, plain, exact)
    assert_codes(state, exact_state / wide.double(), slack=1e-4)
    assert (state != plain_state).float().mean() <= 1e-3


@pytest.mark.parametrize("columns", [1, D_STATE])
def test_state_groups(device: torch.device, columns: int) -> None:
    """A table of scales and the group of each channel, instead of a scale for each channel."""
    args = random_args(device, 1, 2)
    table = (torch.rand(3, columns) * 0.02 + 0.01).to(device)
    group = torch.randint(0, 3, (HEADS * HEADDIM,), dtype=torch.int32).to(device)
    codes = random_codes(1, HEADS, HEADDIM, D_STATE).to(device)
    check_int8_step(first_token(args), codes, table, state_group=group)
    state, spread = codes.clone(), codes.clone()
    ssd_scan(**args, state=state, state_scale=table, state_group=group)
    wide = table[group.long()].view(HEADS, HEADDIM, columns)
    ssd_scan(**args, state=spread, state_scale=wide)
    assert torch.equal(state, spread)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_step_of_several_sequences_a_program(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    """Programs of several sequences, the last of which has fewer, give what programs of one give: the bits of
    the state, and y, whose sum the compiler may add up in another order, to rounding."""
    args = first_token(random_args(device, 5, 1))
    states = [random_state(device, 5).to(dtype)] * 2
    options: dict[str, Any] = {}
    if dtype == torch.int8:
        states = [random_codes(5, HEADS, HEADDIM, D_STATE).to(device)] * 2
        options["state_scale"] = (torch.rand(3, D_STATE) * 0.02 + 0.01).to(device)
        options["state_group"] = torch.randint(0, 3, (HEADS * HEADDIM,), dtype=torch.int32).to(device)
    states = [state.clone() for state in states]
    ys = []
    for each, state in zip((1, rows), states, strict=True):
        launch = StepLaunch(channels=8, rows=each, stages=each, num_warps=1)
        monkeypatch.setattr(module, "step_launch", lambda *sizes, launch=launch: launch)
        ys.append(ssd_step(**args, state=state, **options))
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(ys[1], ys[0], rtol=0, atol=2**-20 * float(ys[0].abs().max()))
    assert not torch.equal(states[0][-1], states[0][-2])


@pytest.mark.parametrize("step", [False, True])
def test_float16_state_saturates(device: torch.device, step: bool) -> None:
    args = random_args(device, 1, 1)
    args["x"][..., :5] = 2e5
    args["x"][..., 5:9] = -2e5
    start = random_state(device, 1).half()
    exact = start.double()
    reference.ssd_scan(**double(args), state=exact)
    assert exact.abs().max() > 65504
    if step:
        ssd_step(**first_token(args), state=start)
    else:
        ssd_scan(**args, state=start, precision="ieee")
    assert start.dtype == torch.float16
    limited = exact.clamp(-65504, 65504)
    assert ((start.double() - limited).abs() <= 5.1e-4 * limited.abs() + 1e-6).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("per_channel", [None, "", "x dt B C"])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_step(device: torch.device, batch: int, per_channel: str | None, ngroups: int) -> None:
    args = random_args(device, batch, 1, ngroups)
    args = first_token(args if per_channel is None else with_codes(args, per_channel))
    start = random_state(device, batch)
    plain_state, exact_state, state = start.clone(), start.double(), start.clone()
    plain = reference.ssd_step(**args, state=plain_state)
    exact = reference.ssd_step(**double(args), state=exact_state, out_dtype=torch.float64)
    assert_like_float32(ssd_step(**args, state=state), plain, exact)
    assert_like_float32(state, plain_state, exact_state)


@pytest.mark.parametrize("D", [None, "channel"])
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.05, 0.3)])
def test_step_options(device: torch.device, D: str | None, dt_limit: tuple[float, float]) -> None:
    args = first_token(random_args(device, 2, 1))
    args["D"] = None if D is None else torch.randn(HEADS * HEADDIM, device=device)
    args["dt_bias"] = args["dt_bias"] if D else None
    args["dt_limit"] = dt_limit
    start = random_state(device, 2)
    plain = reference.ssd_step(**args, state=start.clone())
    exact = reference.ssd_step(**double(args), state=start.double(), out_dtype=torch.float64)
    assert_like_float32(ssd_step(**args, state=start), plain, exact)


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def check_half(args: dict[str, Any], start: Tensor | None, **options: Any) -> None:
    """What ``Precision`` and the docstring promise; rounding the result to float16 costs 2.1e-4 by itself."""
    exact_state = None if start is None else start.double()
    exact = reference.ssd_scan(**double(args), state=exact_state, out_dtype=torch.float64, **options)
    state = None if start is None else start.clone()
    y = ssd_scan(**args, state=state, precision="half", **options)
    assert root_mean_square(y - exact) <= 4e-4 * root_mean_square(exact)
    if state is not None:
        assert root_mean_square(state - exact_state) <= 4e-4 * root_mean_square(exact_state)


@pytest.mark.parametrize("kind", ["float16", "codes", "codes with scales by channel"])
def test_half_precision(device: torch.device, kind: str) -> None:
    args = random_args(device, 1, 18)
    if kind == "float16":
        args = {name: v.half() if name in INPUTS else v for name, v in args.items()}
    else:
        args = with_codes(args, "x B C" if "channel" in kind else "", "x dt B C")
    mask = torch.ones(1, 18, dtype=torch.bool, device=device)
    mask[0, :17] = False  # all of the first chunk
    check_half(args, random_state(device, 1), mask=mask)
    y = ssd_scan(**args, out_dtype=torch.float16)
    assert y.dtype == torch.float16
    assert torch.equal(y, ssd_scan(**args, precision="half").half())


@pytest.mark.parametrize(
    ("sizes", "dt"),
    [
        ({"x": 1e4, "B": 500.0, "C": 500.0}, 0.0),
        ({"x": 2e-3, "B": 2e-3, "C": 2e-3}, -9.0),
        ({"B": 0.0}, 0.0),
        ({"x": 1e4, "B": 2e-3}, 40.0),
    ],
    ids=["large", "small", "zero", "strong decay"],
)
def test_half_precision_has_the_range_of_float32(
    device: torch.device, sizes: dict[str, float], dt: float
) -> None:
    """Products and states that float16 does not hold, and ones that would be subnormal."""
    args = random_args(device, 1, 20)
    args = {name: (v * sizes.get(name, 1.0)).half() if name in "xBC" else v for name, v in args.items()}
    args["dt_bias"] += dt
    check_half({**args, "D": None}, random_state(device, 1) * (1e6 if sizes.get("x") == 1e4 else 1.0))


@pytest.mark.parametrize("code", [127, 1])
def test_half_precision_with_states_at_their_bound_and_far_below(device: torch.device, code: int) -> None:
    """States that hardly decay, of codes that are all as large as they can be, and all as small: what kept
    states are scaled by comes from a bound, which is 2^14 too large for the small ones."""
    args = with_codes(random_args(device, 1, 70), "", "x B C")
    args["x"].codes.fill_(code)
    args["B"].codes.fill_(code)
    args["A"] = torch.full_like(args["A"], -1e-4)
    check_half({**args, "D": None}, random_state(device, 1) * 0)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "expected"),
    [
        (torch.float16, torch.float16, "half"),
        (torch.int8, torch.bfloat16, "half"),
        (torch.float16, torch.float32, "split"),
        (torch.bfloat16, torch.bfloat16, "split"),
        (torch.float32, torch.float16, "split"),
    ],
)
def test_float16_multiplies_what_it_holds(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, expected: str
) -> None:
    arguments = {name: torch.zeros(1, dtype=dtype, device=device) for name in ("x", "B", "C")}
    assert module._precision(arguments, out_dtype) == expected


def test_strided_inputs(device: torch.device) -> None:
    """As the model gives them: slices of the projections' outputs; a mask and a state out of larger ones."""
    args = random_args(device, 2, 4)
    sizes = [HEADS * HEADDIM, HEADS, 2 * D_STATE, 2 * D_STATE]
    wide = torch.randn(4, 2, sum(sizes), device=device).transpose(0, 1)
    args.update(zip(INPUTS, wide.split(sizes, dim=-1), strict=True))
    mask = (torch.rand(4, 4, device=device) > 0.3).t()[::2]
    check_scan(args, None, mask=mask)
    states = torch.randn(4, HEADS, HEADDIM, D_STATE, device=device)
    before, kept = states[::2].clone(), states[1::2].clone()
    y = ssd_scan(**args, state=states[::2], mask=mask)
    assert torch.equal(y, ssd_scan(**args, state=before, mask=mask))
    assert torch.equal(states[::2], before)
    assert torch.equal(states[1::2], kept)
    y = ssd_step(**first_token(args), state=states[::2])
    assert torch.equal(y, ssd_step(**first_token(args), state=before))
    assert torch.equal(states[::2], before)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_nothing_to_do(device: torch.device, batch: int, length: int) -> None:
    args, state = random_args(device, batch, length), random_state(device, batch)
    before = state.clone()
    assert ssd_scan(**args, state=state).shape == (batch, length, HEADS * HEADDIM)
    assert torch.equal(state, before)


def test_prompt_then_steps(device: torch.device) -> None:
    """A scan of all tokens is a scan of some and steps through the others."""
    args = random_args(device, 1, 18)
    whole = random_state(device, 1)
    state = whole.clone()
    expected = ssd_scan(**args, state=whole, precision="ieee")
    ssd_scan(**{**args, **{name: args[name][:, :15] for name in INPUTS}}, state=state, precision="ieee")
    for t in range(15, 18):
        now = {name: args[name][:, t] for name in INPUTS}
        y = ssd_step(**{**args, **now}, state=state)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-5)


def refused(name: str, args: dict[str, Any], state: Tensor, **options: Any) -> bool:
    with pytest.raises(ValueError, match=rf"^(the scale of )?{name} (is|has)"):
        ssd_scan(**args, state=state, **options)
    with pytest.raises(ValueError, match=rf"^(the scale of )?{name} (is|has)"):
        ssd_step(**first_token(args), state=state, **options)
    return True


def test_what_the_kernels_do_not_read_is_refused_by_name(device: torch.device) -> None:
    args, state = random_args(device, 2, 3), random_state(device, 2)
    before = state.clone()
    for name in INPUTS:
        assert refused(name, {**args, name: args[name].double()}, state)
        spread = torch.stack([args[name]] * 2, dim=-1)[..., 0]
        assert refused(name, {**args, name: spread}, state)
        assert refused(name, {**args, name: args[name].clone().requires_grad_()}, state)
        wrong = Quantized(args[name].to(torch.int8), torch.ones(3, device=device))
        assert refused(name, {**args, name: wrong}, state)
    for name in ("A", "D", "dt_bias"):
        assert refused(name, {**args, name: args[name].double()}, state)
        assert refused(name, {**args, name: torch.stack([args[name]] * 2, dim=-1)[..., 0]}, state)
    assert refused("state", args, state.to(torch.int8))
    assert refused("state", args, state, state_scale=torch.ones(1, 1, 1, device=device))
    assert refused("state", args, state.transpose(2, 3).contiguous().transpose(2, 3))
    table, group = torch.ones(2, 1, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    assert refused("state_group", args, state.to(torch.int8), state_scale=table, state_group=group)
    assert torch.equal(state, before)


@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("nheads", [24, 80])
@pytest.mark.parametrize("length", [1, 64, 2048])
def test_launches_fill_the_gpu(monkeypatch: pytest.MonkeyPatch, batch: int, nheads: int, length: int) -> None:
    monkeypatch.undo()
    scan = scan_launch(batch, length, nheads, 64, 128, 1, half=True)
    assert scan.chunk % scan.rows == 0
    assert (scan.chunk, scan.channels) == (128 if batch * length > 1024 else 64, 64)
    programs = batch * -(-length // scan.chunk) * (scan.chunk // scan.rows) * -(-nheads // scan.heads)
    assert programs >= 96 or scan.heads == 1
    step = module.step_launch(batch, nheads, 64, 128)
    assert isinstance(step, StepLaunch)
    assert batch * nheads * 64 // step.channels >= 132
    codes = module.step_launch(batch, nheads, 64, 128, codes=True)
    assert step.rows == 1 <= codes.rows <= batch
    assert codes.rows == 1 or batch * nheads * 64 // (codes.channels * codes.rows) >= 2 * 132
    assert step.channels * 128 <= 4096
