"""What each launch of a fused step should give, put together from the reference ops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, as_float
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.conv import causal_conv1d
from quamba.kernels.reference.hadamard import hadamard
from quamba.kernels.reference.linear import linear
from quamba.kernels.reference.norm import add_norm
from quamba.kernels.reference.quantize import quantize
from quamba.kernels.reference.selective_scan import selective_scan_step
from quamba.kernels.reference.ssd import ssd_step

if TYPE_CHECKING:
    from quamba.kernels.triton.decode.project import ConvStep, Matrix
    from quamba.kernels.triton.decode.scan import TimeSteps
    from quamba.kernels.triton.decode.ssd import Part
    from quamba.kernels.triton.decode.vectors import Normed, Vector

#: How to read a result after the launch, and what it should be.
Wanted: TypeAlias = tuple[Callable[[], Tensor], Tensor]


def arguments_of(launch: functools.partial[None]) -> dict[str, Any]:
    bound = inspect.signature(launch.func).bind(*launch.args, **launch.keywords)
    bound.apply_defaults()
    return bound.arguments


def results_of(launch: functools.partial[None]) -> list[Tensor]:
    """The buffers that a launch writes whole: what is in them before does not matter."""
    given = arguments_of(launch)
    out = given["out"]
    buffers = [out] if isinstance(out, Tensor) else [out.values, out.wide_scale]
    return [t for t in [*buffers, given.get("squares") if "state" in given else None] if t is not None]


def wanted_of(launch: functools.partial[None]) -> list[Wanted]:
    """Computed now, from what the launch would read now; the launch itself is not run."""
    wanted: list[Wanted] = _REFERENCES[launch.func.__name__](**arguments_of(launch))
    return wanted


def _project(
    x: Vector | Normed,
    matrix: Matrix,
    out: Tensor,
    x_scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    conv: ConvStep | None,
    residual: Tensor | None,
) -> list[Wanted]:
    weight = _weight(matrix)
    y = linear(_activation(x, x_scale), weight, bias, out_scale=out_scale, out_dtype=torch.float32)
    if residual is not None:
        return [(lambda: residual, residual + y.to(out.dtype).to(residual.dtype))]
    y = y if out_scale is not None else y.to(out.dtype)
    if conv is None:
        return [(lambda: out, y)]
    window = conv.window.clone()
    columns = slice(conv.first, conv.first + conv.taps.shape[0])
    entering = y[:, None, columns]
    scale = out_scale if out_scale is None or not out_scale.ndim else out_scale[columns]
    y[:, columns] = causal_conv1d(
        entering if scale is None else Quantized(entering, scale),
        _taps(conv),
        conv.bias,
        state=window,
        out_scale=conv.out_scale,
        out_dtype=out.dtype,
        rounding="half_away" if conv.half_away else "half_even",
    )[:, 0]
    return [(lambda: out, y), (lambda: conv.window, window)]


def _mix(
    x: Tensor,
    out: Vector,
    size: int,
    squares: Tensor | None,
    eps: float,
    ngroups: int,
    rotate: bool,
    out_scale: Tensor | None,
    half_away: bool,
    wrap: bool,
) -> list[Wanted]:
    y, width = x, x.shape[1] // ngroups
    if squares is not None:
        mean = squares.unflatten(1, (ngroups, -1)).sum(-1) / width
        y = y * torch.rsqrt(mean + eps).repeat_interleave(width, dim=1)
    y = hadamard(y) if rotate else y
    if out_scale is not None:
        y = quantize(
            y,
            out_scale,
            rounding="half_away" if half_away else "half_even",
            overflow="wrap" if wrap else "saturate",
        )
        return [(lambda: _natural(out), y)]
    if out.wide_scale is not None:
        return [(lambda: _values(out), y)]
    return [(lambda: out.values, y.to(out.values.dtype))]


def _ssd_gate(
    projected: Tensor,
    parts: dict[str, Part],
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    out: Tensor,
    squares: Tensor,
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float],
    state_scale: Tensor | None,
    state_group: Tensor | None,
    norm_before_gate: bool,
) -> list[Wanted]:
    nheads, d_bc = A.shape[0], ngroups * state.shape[-1]
    sizes = {"x": out.shape[1], "B": d_bc, "C": d_bc, "z": out.shape[1], "dt": nheads}
    x, B, C, z, dt = (_part(projected, parts[name], size) for name, size in sizes.items())
    after = state.clone()
    sized: dict[str, Any] = {"headdim": headdim, "ngroups": ngroups, "dt_limit": tuple(dt_limit)}
    scales: dict[str, Any] = {"state_scale": state_scale, "state_group": state_group}
    y = ssd_step(x, dt, A, B, C, D, dt_bias, state=after, **sized, **scales)
    gated = y * F.silu(as_float(z))
    power = (y if norm_before_gate else gated).square().unflatten(1, (nheads, -1)).sum(-1)
    y = gated if weight is None else gated * weight
    return [
        (lambda: out, y),
        (lambda: squares.unflatten(1, (nheads, -1)).sum(-1), power),
        (lambda: state, after),
    ]


def _scan_gate(
    projected: Tensor,
    selected: Tensor,
    parts: dict[str, Part],
    time_steps: TimeSteps,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    out: Tensor,
    state_scale: Tensor | None,
    state_group: Tensor | None,
) -> list[Wanted]:
    channels, d_state = A.shape
    u, z = (_part(projected, parts[name], channels) for name in ("u", "z"))
    B, C = (_part(selected, parts[name], d_state) for name in ("B", "C"))
    weight: Tensor | QuantizedWeight = time_steps.weight
    if time_steps.scale is not None:
        weight = _quantized(time_steps.weight, time_steps.scale, 8)
    rank = _part(selected, parts["rank"], time_steps.weight.shape[1], folded=True)
    if isinstance(rank, Quantized) and not isinstance(weight, QuantizedWeight):
        rank = as_float(rank)
    steps = linear(rank, weight, out_scale=time_steps.out_scale)
    dt: Activation = steps.half().float() if time_steps.half else steps
    if time_steps.out_scale is not None:
        dt = Quantized(steps, time_steps.out_scale)
    after = state.clone()
    scales: dict[str, Any] = {"state_scale": state_scale, "state_group": state_group}
    y = selective_scan_step(u, dt, A, B, C, D, z, dt_bias, state=after, **scales)
    return [(lambda: out, y), (lambda: state, after)]


_REFERENCES: dict[str, Callable[..., list[Wanted]]] = {
    "project": _project,
    "mix": _mix,
    "ssd_gate": _ssd_gate,
    "scan_gate": _scan_gate,
}
#: Launches that can be checked here; the others of a step have nothing to choose.
KNOWN = tuple(_REFERENCES)


def _weight(matrix: Matrix) -> Tensor | QuantizedWeight:
    if matrix.scale is None:
        return matrix.data.float()
    data = matrix.data.view(torch.int8 if matrix.bits == 8 else torch.uint8)
    return _quantized(data, matrix.scale, matrix.bits)


def _quantized(data: Tensor, scale: Tensor, bits: int) -> QuantizedWeight:
    """From codes as stored and scales of one level."""
    inputs = data.shape[1] * 8 // bits
    wide: Any = {"bits": bits, "scale_bits": 8 * scale.element_size()}
    if scale.shape[1] > 1:
        format = WeightFormat(granularity="group", group_size=inputs // scale.shape[1], **wide)
    else:
        format = WeightFormat(granularity="tensor" if scale.shape[0] == 1 < len(data) else "channel", **wide)
    return QuantizedWeight(data, scale, format)


def _taps(conv: ConvStep) -> Tensor | QuantizedWeight:
    return conv.taps if conv.taps_scale is None else _quantized(conv.taps, conv.taps_scale, 8)


def _activation(x: Vector | Normed, scale: Tensor | None) -> Activation:
    """Codes without a scale have weights that contain it."""
    from quamba.kernels.triton.decode.vectors import Normed

    if isinstance(x, Normed):
        y, _ = add_norm(x.residual.float(), None, x.weight, eps=x.eps, out_scale=x.scale)
        return y if x.scale is None else Quantized(y, torch.ones_like(x.scale) if scale is None else scale)
    if x.wide_scale is None and x.values.dtype == torch.int8:
        return Quantized(_natural(x), torch.ones((), device=x.values.device) if scale is None else scale)
    return _values(x)


def _values(x: Vector) -> Tensor:
    """float32 (B, C), of floats or wide codes."""
    if x.wide_scale is None:
        return x.values.float()
    high, low = _natural(x).float().unbind(1)
    return (256 * high + low) * x.wide_scale.repeat_interleave(32, dim=1)


def _natural(x: Vector) -> Tensor:
    """Its values in the order of the channels."""
    if not x.split:
        return x.values
    half = x.values.shape[-1] // 2
    return torch.stack([x.values[..., :half], x.values[..., half:]], dim=-1).flatten(-2)


def _part(values: Tensor, part: Part, size: int, folded: bool = False) -> Activation:
    """Some columns; folded: codes may have no scale, since the weight behind contains it."""
    columns = values[:, part.first : part.first + size]
    if part.scale is not None:
        return Quantized(columns, part.scale)
    if folded and columns.dtype == torch.int8:
        return Quantized(columns, torch.ones((), device=columns.device))
    return columns.float()
