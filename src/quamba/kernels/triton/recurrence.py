"""What the kernels of both recurrences share: number formats of inputs and state, softplus, exact decays."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.triton.quantize import check_dtype, check_last_stride, check_scale
from quamba.kernels.triton.words import NATIVE

# Programs that keep every multiprocessor of an H100 busy once.
PROCESSORS = 132

# How the scale of an input is given (a constexpr of the kernels).
FLOAT, ONE_SCALE, CHANNEL_SCALES = 0, 1, 2

LOG2E = tl.constexpr(1.4426950408889634)
# Adding it to a float32 below 2^22 leaves the nearest integer (ties to even) in the low mantissa bits.
ROUNDER = tl.constexpr(12582912.0)
FP16_MAX = tl.constexpr(65504.0)
# Four int8, made unsigned by adding 128, as the last bytes of the float32 2^23 + byte,
_BYTES_TO_FLOATS = tl.constexpr(
    "{ .reg .b32 u, k; xor.b32 u, $4, 0x80808080; mov.b32 k, 0x4B000000;\n"
    "prmt.b32 $0, u, k, 0x7440; prmt.b32 $1, u, k, 0x7441;\n"
    "prmt.b32 $2, u, k, 0x7442; prmt.b32 $3, u, k, 0x7443; }"
)
# or of the float16 1024 + byte, from which 1152 is taken.
_BYTES_TO_HALVES = tl.constexpr(
    "{ .reg .b32 u, k, one; xor.b32 u, $2, 0x80808080; mov.b32 k, 0x64646464; mov.b32 one, 0x64806480;\n"
    "prmt.b32 $0, u, k, 0x4140; prmt.b32 $1, u, k, 0x4342; sub.rn.f16x2 $0, $0, one;"
    " sub.rn.f16x2 $1, $1, one; }"
)
# A token that decays by more than this (in powers of two) leaves nothing that float32 can hold.
LARGEST_DECAY = tl.constexpr(-120.0)


def operand(name: str, x: Activation) -> tuple[Tensor, Tensor | None, int]:
    """Data, scale and how it is given. ValueError for what the kernels do not read."""
    if not isinstance(x, Quantized):
        check_dtype(name, x)
        check_last_stride(name, x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} has a gradient to come; only the reference kernels are differentiable.")
        return x, None, FLOAT
    codes, scale = x
    check_last_stride(name, codes)
    by_channel = check_scale(f"the scale of {name}", scale, codes.shape[-1])
    return codes, scale, CHANNEL_SCALES if by_channel else ONE_SCALE


def check_parameters(**parameters: Tensor | None) -> None:
    """A, D and dt_bias, which the kernels read in their own order."""
    for name, t in parameters.items():
        if t is not None:
            check_dtype(name, t)
            if not t.is_contiguous():
                raise ValueError(f"{name} has strides {t.stride()}; it must be contiguous.")


def state_arguments(state: Tensor | None, scale: Tensor | None, group: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments about the state (B, channels in one or two dimensions, N).

    Without group, scale broadcasts to state[0]; it is read by its strides, so expanding it costs nothing.
    With group, (channels,) int32, it is a table (K, N) or (K, 1): one row a group.
    """
    if state is None:
        return _state_arguments(None, None, None, (0, 0, 0))
    check_dtype("state", state)
    if (state.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"state is {state.dtype} and state_scale is {'' if scale is None else 'not '}None.")
    if len(state) and not state[0].is_contiguous():
        raise ValueError(f"state has strides {state.stride()}; that of each sequence must be contiguous.")
    if scale is None:
        return _state_arguments(state, None, None, (0, 0, 0))
    if group is None:
        strides = scale.expand(state.shape[1:]).stride()
        return _state_arguments(state, scale, None, (0, *strides)[-3:])
    check_parameters(state_group=group)
    channels = math.prod(state.shape[1:-1])
    if group.dtype not in (torch.int32, torch.int64) or tuple(group.shape) != (channels,):
        raise ValueError(f"state_group is {list(group.shape)} {group.dtype}; expected int32 [{channels}].")
    row, column = scale.expand(-1, state.shape[-1]).stride()
    return _state_arguments(state, scale, group, (0, row, column))


def _state_arguments(
    state: Tensor | None, scale: Tensor | None, group: Tensor | None, strides: tuple[int, ...]
) -> dict[str, Any]:
    head, channel, column = strides
    return {
        "state": state,
        "state_b": 0 if state is None else state.stride(0),
        "state_scale": scale,
        "state_group": group,
        "scale_h": head,
        "scale_c": channel,
        "scale_n": column,
        "SCALE_BY_CHANNEL": channel != 0,
        "SCALE_BY_COLUMN": column != 0,
    }


@triton.jit
def softplus(v: tl.tensor) -> tl.tensor:
    """log(1 + exp(v)) to a few units in the last place, also where it is small; v itself from about 17 on.

    max(v, 0) + log1p(t) with t = exp(-|v|), and log1p(t) = 2 atanh(t / (2 + t)) by its series: the argument
    is at most 1/3, and the first term left out is below 2^-28 of the sum.
    """
    t = tl.exp2(-tl.abs(v) * LOG2E)
    s = t / (2.0 + t)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return tl.maximum(v, 0.0) + 2.0 * (s + s * q * series)


@triton.jit
def limited_softplus(v: tl.tensor, low: tl.tensor, high: tl.tensor, LIMITED: tl.constexpr) -> tl.tensor:
    delta = softplus(v)
    return tl.minimum(tl.maximum(delta, low), high) if LIMITED else delta


@triton.jit
def read_scalar(
    data: tl.tensor, at: tl.tensor, scale: tl.tensor, channel: tl.tensor, MODE: tl.constexpr
) -> tl.tensor:
    """One real value: float32 of data[at], times its scale."""
    value = tl.load(data + at).to(tl.float32)
    if MODE == 1:
        value *= tl.load(scale)
    elif MODE == 2:
        value *= tl.load(scale + channel)
    return value


@triton.jit
def read_vector(
    data: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    MODE: tl.constexpr,
) -> tl.tensor:
    """Real values data[channel], whose per-channel scales start at ``first``; 0 outside."""
    value = tl.load(data + channel, mask=inside, other=0).to(tl.float32)
    if MODE == 1:
        value *= tl.load(scale)
    elif MODE == 2:
        value *= tl.load(scale + first + channel, mask=inside, other=0.0)
    return value


@triton.jit
def read_scale(scale: tl.tensor, channel: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """The scale of one channel; 1 for floats."""
    step = 1.0
    if MODE == 1:
        step = tl.load(scale).to(tl.float32)
    elif MODE == 2:
        step = tl.load(scale + channel).to(tl.float32)
    return step


@triton.jit
def read_scales(scale: tl.tensor, at: tl.tensor, inside: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """The scales of some channels as a float32 block; ones for floats."""
    if MODE == 1:
        scales = tl.zeros(at.shape, tl.float32) + tl.load(scale)
    elif MODE == 2:
        scales = tl.load(scale + at, mask=inside, other=0.0)
    else:
        scales = tl.full(at.shape, 1.0, tl.float32)
    return scales


@triton.jit
def read_state_scale(
    scale: tl.tensor,
    group: tl.tensor,
    head_at: tl.tensor,
    first: tl.tensor,
    channel: tl.tensor,
    column: tl.tensor,
    scale_c: tl.tensor,
    scale_n: tl.tensor,
    BY_CHANNEL: tl.constexpr,
    BY_COLUMN: tl.constexpr,
) -> tl.tensor:
    """The scale of the state at (channel, column), no larger than it varies: it broadcasts to the state.

    channel and column are blocks of indices within the state that broadcast against each other; ``first`` is
    the number of channels before them in the groups' table.
    """
    at = scale + head_at
    if group is not None:
        at += tl.load(group + first + channel) * scale_c
    elif BY_CHANNEL:
        at += channel * scale_c
    if BY_COLUMN:
        at += column * scale_n
    return tl.load(at).to(tl.float32)


@triton.jit
def as_floats(v: tl.tensor) -> tl.tensor:
    """float32 of floats or int8 codes.

    A GPU converts an int8 in the time of eight other instructions. Here each byte becomes the end of a float,
    from which a constant is taken.
    """
    if NATIVE and v.dtype == tl.int8:
        biased = tl.inline_asm_elementwise(
            _BYTES_TO_FLOATS, "=r,=r,=r,=r,r", [v], dtype=tl.float32, is_pure=True, pack=4
        )
        real = biased - 8388736.0  # 2^23 + 128
    else:
        real = v.to(tl.float32)
    return real


@triton.jit
def as_halves(v: tl.tensor) -> tl.tensor:
    """float16 of floats or int8 codes; see ``as_floats``."""
    if NATIVE and v.dtype == tl.int8:
        real = tl.inline_asm_elementwise(
            _BYTES_TO_HALVES, "=&r,=&r,r", [v], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        real = v.to(tl.float16)
    return real


@triton.jit
def write_state(state: tl.tensor, value: tl.tensor, per_step: tl.tensor, inside: tl.tensor) -> None:
    """Codes of value * per_step (1 / scale), saturated; or a cast that saturates.

    Limits of 0 and 1 cost nothing on NVIDIA GPUs, others would be a quarter of a step's instructions. Codes
    are the nearest integers to 3e-5 of a step. They are computed with 128 added, which an exclusive or takes
    off: where a byte of a register is stored that a float operation has just written, the assembler (ptxas
    12.8) converts the float instead, and every code was -1.
    """
    if state.dtype.element_ty == tl.int8:
        unit = tl.minimum(tl.maximum(value * (per_step * (1.0 / 255.0)) + 128.0 / 255.0, 0.0), 1.0)
        biased = (unit * 255.0 + ROUNDER).to(tl.int32, bitcast=True)
        tl.store(state, (biased ^ 128).to(tl.int8), mask=inside)
    elif state.dtype.element_ty == tl.float16:
        limited = tl.where(value > FP16_MAX, FP16_MAX, tl.where(value < -FP16_MAX, -FP16_MAX, value))
        tl.store(state, limited.to(tl.float16), mask=inside)
    else:
        tl.store(state, value.to(state.dtype.element_ty), mask=inside)
