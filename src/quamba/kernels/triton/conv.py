"""Causal depthwise convolution with SiLU, for prompts and single tokens alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import Tile, check_dtype, check_last_stride, check_scale, silu, to_codes

_MAX_WIDTH = 4


@launch_choice("causal_conv1d.tile")
def conv_tile(length: int, channels: int) -> Tile:
    """Rows are tokens, which a program takes one after another, so that it reads and unpacks each once."""
    if length == 1:
        return Tile(1, min(128, triton.next_power_of_2(channels)), 1)
    columns = min(256, triton.next_power_of_2(channels))
    return Tile(min(32, triton.next_power_of_2(length)), columns, max(1, columns // 128))


@triton.jit
def _input(
    x: tl.tensor,
    mask: tl.tensor,
    token: tl.tensor,
    length: tl.tensor,
    x_stride: tl.tensor,
    mask_stride: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
) -> tl.tensor:
    """One token's inputs; zeros where it is masked or outside the sequence."""
    inside = (token >= 0) & (token < length)
    place = token.to(tl.int64)
    if mask is not None:
        inside = inside & (tl.load(mask + place * mask_stride, mask=inside, other=0) != 0)
    return tl.load(x + place * x_stride + channel, mask=real & inside, other=0)


@triton.jit
def _before(
    x: tl.tensor,
    state: tl.tensor,
    mask: tl.tensor,
    token: tl.tensor,
    length: tl.tensor,
    x_stride: tl.tensor,
    state_stride: tl.tensor,
    mask_stride: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """As ``_input``, but tokens before the first are in the state."""
    value = _input(x, mask, token, length, x_stride, mask_stride, channel, real).to(dtype)
    if state is not None:  # one of the two is zero
        row = token + (WIDTH - 1)
        stored = real & (token < 0) & (row >= 0)
        value += tl.load(state + row.to(tl.int64) * state_stride + channel, mask=stored, other=0).to(dtype)
    return value


@triton.jit
def _factor(
    weight: tl.tensor,
    step: tl.tensor,
    tap: tl.constexpr,
    weight_stride: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    dtype: tl.constexpr,
) -> tl.tensor:
    """The weights of one tap, times step if the sum is of floats; zeros for the taps of wider kernels."""
    if tap < 0:
        return tl.zeros(channel.shape, dtype)
    value = tl.load(weight + channel.to(tl.int64) * weight_stride + tap, mask=real, other=0).to(dtype)
    if dtype == tl.float32 and step is not None:
        value *= step
    return value


@triton.jit
def _conv_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    state: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    length_blocks: tl.tensor,
    channel_blocks: tl.tensor,
    x_batch_stride: tl.tensor,
    x_stride: tl.tensor,
    state_batch_stride: tl.tensor,
    state_stride: tl.tensor,
    mask_batch_stride: tl.tensor,
    mask_stride: tl.tensor,
    weight_stride: tl.tensor,
    weight_scale_stride: tl.tensor,
    WIDTH: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    X_SCALES: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    INTEGER: tl.constexpr = (x.dtype.element_ty == tl.int8) and (weight.dtype.element_ty == tl.int8)
    dtype: tl.constexpr = tl.int32 if INTEGER else tl.float32
    program = tl.program_id(0)
    block = program // channel_blocks % length_blocks
    batch = (program // channel_blocks // length_blocks).to(tl.int64)
    channel = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    real = channel < channels
    x += batch * x_batch_stride
    y += batch * length * channels
    if mask is not None:
        mask += batch * mask_batch_stride
    if state is not None:
        state += batch * state_batch_stride
    # What multiplies the sums: scales of weights (in the factors if the sums are of floats) and inputs.
    scale = tl.full([BLOCK_CHANNELS], 1.0, tl.float32)
    step = None
    if weight_scale is not None:
        step = tl.load(weight_scale + channel * weight_scale_stride, mask=real, other=0).to(tl.float32)
        if INTEGER:
            scale = step
    if x_scale is not None:
        if X_SCALES:
            scale *= tl.load(x_scale + channel, mask=real, other=0).to(tl.float32)
        else:
            scale *= tl.load(x_scale).to(tl.float32)
    shift = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, mask=real, other=0).to(tl.float32)
    inverse = tl.full([BLOCK_CHANNELS], 1.0, tl.float32)
    if out_scale is not None:  # one division a channel: SiLU is not exact to the last bit either
        if OUT_SCALES:
            inverse = tl.div_rn(inverse, tl.load(out_scale + channel, mask=real, other=1).to(tl.float32))
        else:
            inverse = tl.div_rn(inverse, tl.load(out_scale).to(tl.float32) + tl.zeros_like(inverse))
    factor_0 = _factor(weight, step, WIDTH - 4, weight_stride, channel, real, dtype)
    factor_1 = _factor(weight, step, WIDTH - 3, weight_stride, channel, real, dtype)
    factor_2 = _factor(weight, step, WIDTH - 2, weight_stride, channel, real, dtype)
    factor_3 = _factor(weight, step, WIDTH - 1, weight_stride, channel, real, dtype)
    first = block * BLOCK_LENGTH
    strides = (x_stride, state_stride, mask_stride)
    back_3 = _before(x, state, mask, first - 3, length, *strides, channel, real, WIDTH, dtype)
    back_2 = _before(x, state, mask, first - 2, length, *strides, channel, real, WIDTH, dtype)
    back_1 = _before(x, state, mask, first - 1, length, *strides, channel, real, WIDTH, dtype)
    for i in tl.range(0, BLOCK_LENGTH, loop_unroll_factor=min(BLOCK_LENGTH, 8)):
        token = first + i
        now = _input(x, mask, token, length, x_stride, mask_stride, channel, real).to(dtype)
        total = back_3 * factor_0 + back_2 * factor_1 + back_1 * factor_2 + now * factor_3
        result = silu(total.to(tl.float32) * scale + shift)
        if mask is not None:
            kept = tl.load(mask + token.to(tl.int64) * mask_stride, mask=token < length, other=0) != 0
            result = tl.where(kept, result, 0.0)
        place = y + token.to(tl.int64) * channels + channel
        if out_scale is not None:
            codes = to_codes(result * inverse, HALF_AWAY, False)
            tl.store(place, codes, mask=real & (token < length))
        else:
            tl.store(place, result.to(y.dtype.element_ty), mask=real & (token < length))
        back_3 = back_2
        back_2 = back_1
        back_1 = now
    # Only the first block of a sequence reads the state, and it is the one that writes it.
    if state is not None:  # noqa: SIM102 (a constant, and what only the device knows)
        if block == 0:
            _write_state(x, state, mask, length, *strides, channel, real, WIDTH, STATE_ROWS)


@triton.jit
def _write_state(
    x: tl.tensor,
    state: tl.tensor,
    mask: tl.tensor,
    length: tl.tensor,
    x_stride: tl.tensor,
    state_stride: tl.tensor,
    mask_stride: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    WIDTH: tl.constexpr,
    STATE_ROWS: tl.constexpr,
) -> None:
    """The last WIDTH - 1 rows of (state, x) become the state."""
    row = tl.arange(0, STATE_ROWS)
    stored = row < WIDTH - 1
    place = length - (WIDTH - 1) + row
    inside = stored & (place >= 0)
    if mask is not None:
        inside &= tl.load(mask + place.to(tl.int64) * mask_stride, mask=inside, other=0) != 0
    value = tl.load(
        x + place.to(tl.int64)[:, None] * x_stride + channel[None, :],
        mask=inside[:, None] & real[None, :],
        other=0,
    )
    before = tl.load(
        state + (row + length).to(tl.int64)[:, None] * state_stride + channel[None, :],
        mask=(stored & (place < 0))[:, None] & real[None, :],
        other=0,
    )
    value = tl.where((place >= 0)[:, None], value, before)
    tl.debug_barrier()  # other threads may still be reading what this one overwrites
    tl.store(
        state + row.to(tl.int64)[:, None] * state_stride + channel[None, :],
        value,
        mask=stored[:, None] & real[None, :],
    )


def causal_conv1d(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
) -> Tensor:
    """``reference.conv.causal_conv1d`` of up to 4 taps, in one launch; sums in int32 or float32."""
    values, x_scale = (x.codes, x.scale) if isinstance(x, Quantized) else (x, None)
    batch, length, channels = values.shape
    taps, weight_scale = _taps(weight)
    width = taps.shape[1]
    _check(values, bias, state, mask, width)
    y = torch.empty(
        values.shape, dtype=torch.int8 if out_scale is not None else out_dtype, device=values.device
    )
    check_dtype("out_dtype", y)
    if y.numel() == 0:
        return y
    if width == 1:
        state = None
    flags = None if mask is None else mask.view(torch.uint8)
    tile = conv_tile(length, channels)
    length_blocks, channel_blocks = triton.cdiv(length, tile.rows), triton.cdiv(channels, tile.columns)
    _conv_kernel[(batch * length_blocks * channel_blocks,)](
        values,
        x_scale,
        taps,
        weight_scale,
        bias,
        state,
        flags,
        y,
        out_scale,
        length,
        channels,
        length_blocks,
        channel_blocks,
        values.stride(0),
        values.stride(1),
        0 if state is None else state.stride(0),
        0 if state is None else state.stride(1),
        0 if flags is None else flags.stride(0),
        0 if flags is None else flags.stride(1),
        taps.stride(0),
        0 if weight_scale is None or weight_scale.shape[0] == 1 else weight_scale.stride(0),
        WIDTH=width,
        STATE_ROWS=triton.next_power_of_2(max(width - 1, 1)),
        X_SCALES=x_scale is not None and check_scale("the scale of x", x_scale, channels),
        OUT_SCALES=out_scale is not None and check_scale("out_scale", out_scale, channels),
        HALF_AWAY=rounding == "half_away",
        BLOCK_LENGTH=tile.rows,
        BLOCK_CHANNELS=tile.columns,
        num_warps=tile.num_warps,
    )
    return y


def _taps(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes (C, W) and scales ([1, 1] or [C, 1]), or the float weight and None."""
    if not isinstance(weight, QuantizedWeight):
        check_dtype("weight", weight)
        check_last_stride("weight", weight)
        return weight, None
    if weight.channel_scale is not None or weight.scale.shape[1] != 1:
        raise ValueError(
            f"weight is of granularity '{weight.format.granularity}', expected scales per tensor or channel."
        )
    return weight.codes(), weight.scale


def _check(x: Tensor, bias: Tensor | None, state: Tensor | None, mask: Tensor | None, width: int) -> None:
    check_dtype("x", x)
    check_last_stride("x", x)
    if width > _MAX_WIDTH:
        raise ValueError(f"weight has {width} taps, expected at most {_MAX_WIDTH}.")
    if bias is not None:
        check_dtype("bias", bias)
        check_last_stride("bias", bias)
    if state is not None:
        check_last_stride("state", state)
        if state.dtype != x.dtype:
            raise ValueError(f"state is {state.dtype}, expected the dtype of x, {x.dtype}.")
        if tuple(state.shape) != (x.shape[0], width - 1, x.shape[2]):
            expected = [x.shape[0], width - 1, x.shape[2]]
            raise ValueError(f"state has shape {list(state.shape)}, expected {expected}.")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected torch.bool.")
