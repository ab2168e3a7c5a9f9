"""Causal depthwise convolution with SiLU, for prompts and single tokens alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, Rounding
from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton import conv_words
from quamba.kernels.triton.conv_words import read_tokens
from quamba.kernels.triton.dependency import (
    ORDINARY_LAUNCH,
    dependent_launch,
    let_next_start,
    wait_for_inputs,
)
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import check_dtype, check_last_stride, check_scale, to_codes
from quamba.kernels.triton.recurrence import LOG2E
from quamba.kernels.triton.words import reciprocal

_MAX_WIDTH = 4


@dataclass(frozen=True)
class ConvTile:
    """What a program works on: ``rows`` tokens, all of a sequence or at least 3, of ``columns`` channels.

    chunk  tokens that are asked for together, one such chunk ahead; divides rows
    """

    rows: int
    columns: int
    chunk: int
    num_warps: int


@launch_choice("causal_conv1d.tile")
def conv_tile(length: int, channels: int) -> ConvTile:
    """A program takes its tokens one after another, so that it reads and unpacks each once."""
    if length == 1:
        return ConvTile(1, min(128, triton.next_power_of_2(channels)), 1, 1)
    rows, columns = min(32, triton.next_power_of_2(length)), min(256, triton.next_power_of_2(channels))
    return ConvTile(rows, columns, min(8, rows), max(1, columns // 128))


@triton.jit
def _counted(value: tl.tensor, kept: tl.tuple, i: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Input i as a number, zero where it is masked. A product takes fewer instructions than a choice."""
    value = value.to(dtype)
    if len(kept) > 0:
        value *= tl.where(kept[i] != 0, 1, 0).to(dtype)
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


@triton.jit(do_not_specialize=["length_blocks", "x_batch_stride", "mask_batch_stride"])
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
    length_blocks: tl.tensor,
    x_batch_stride: tl.tensor,
    state_batch_stride: tl.tensor,
    state_stride: tl.tensor,
    mask_batch_stride: tl.tensor,
    mask_stride: tl.tensor,
    weight_stride: tl.tensor,
    weight_scale_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    X_SCALES: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program has BLOCK_CHANNELS channels of CHUNKS * CHUNK tokens of a sequence: at least 3 or all."""
    let_next_start(EARLY)
    wait_for_inputs(EARLY)  # a bias of int8, too, has been made float just before
    INTEGER: tl.constexpr = (x.dtype.element_ty == tl.int8) and (weight.dtype.element_ty == tl.int8)
    MASKED: tl.constexpr = mask is not None
    dtype: tl.constexpr = tl.int32 if INTEGER else tl.float32
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    place = tl.program_id(0) // channel_blocks
    batch = (place // length_blocks).to(tl.int64)
    first = place % length_blocks * (CHUNK * CHUNKS)
    channel = tl.program_id(0) % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if CHANNELS % BLOCK_CHANNELS == 0:
        real = tl.full([BLOCK_CHANNELS], True, tl.int1)
    else:
        real = channel < CHANNELS
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
    x += batch * x_batch_stride
    at = x + first.to(tl.int64) * X_STRIDE + channel
    flags = at
    if MASKED:
        mask += batch * mask_batch_stride
        flags = mask + first.to(tl.int64) * mask_stride
    y += (batch * length + first) * CHANNELS + channel
    if state is not None:
        state += batch * state_batch_stride

    left = length - first
    now, kept = read_tokens(at, flags, mask_stride, left, True, real, 0, CHUNK, X_STRIDE, WHOLE, MASKED)
    if ONE_TOKEN:
        back_3 = tl.zeros([BLOCK_CHANNELS], dtype)
        back_2, back_1 = back_3, back_3
    else:
        back, kept_back = read_tokens(
            at, flags, mask_stride, 0, first > 0, real, -3, 3, X_STRIDE, True, MASKED
        )
        back_3 = _counted(back[0], kept_back, 0, dtype)
        back_2 = _counted(back[1], kept_back, 1, dtype)
        back_1 = _counted(back[2], kept_back, 2, dtype)
    if state is not None:  # one of the two is zero
        stored = real & (first == 0)
        back_3 += _stored(state, state_stride, WIDTH - 4, channel, stored, dtype)
        back_2 += _stored(state, state_stride, WIDTH - 3, channel, stored, dtype)
        back_1 += _stored(state, state_stride, WIDTH - 2, channel, stored, dtype)
    for chunk in tl.range(CHUNKS):
        then, kept_then = now, kept
        if CHUNKS > 1:
            at += CHUNK * X_STRIDE
            if MASKED:
                flags += CHUNK * mask_stride
            more = chunk + 1 < CHUNKS
            then, kept_then = read_tokens(
                at, flags, mask_stride, left - CHUNK, more, real, 0, CHUNK, X_STRIDE, WHOLE, MASKED
            )
        for i in tl.static_range(CHUNK):
            value = _counted(now[i], kept, i, dtype)
            if INTEGER or x_scale is not None:
                total = back_3 * factor_0 + back_2 * factor_1 + back_1 * factor_2 + value * factor_3
                total = total.to(tl.float32) * scale + shift
            else:
                total = shift + back_3 * factor_0 + back_2 * factor_1 + back_1 * factor_2 + value * factor_3
            one = 1.0
            if MASKED:
                one = tl.where(kept[i] != 0, 1.0, float("inf"))  # which makes the result zero
            result = total * reciprocal(one + tl.exp2(total * -LOG2E))
            if out_scale is not None:
                result = to_codes(result * inverse, HALF_AWAY, False)
            inside = real if WHOLE else real & (i < left)
            tl.store(y + i * CHANNELS, result.to(y.dtype.element_ty), mask=inside)
            back_3 = back_2
            back_2 = back_1
            back_1 = value
        left -= CHUNK
        y += CHUNK * CHANNELS
        now, kept = then, kept_then
    # Only the first block of a sequence reads the state, and it is the one that writes it.
    if state is not None:
        if ONE_TOKEN:
            _write_rows(state, state_stride, channel, real, (back_3, back_2, back_1), WIDTH)
        elif first == 0:
            _write_state(x, state, mask, length, X_STRIDE, state_stride, mask_stride, channel, real, WIDTH)


@triton.jit
def _stored(
    state: tl.tensor,
    state_stride: tl.tensor,
    ROW: tl.constexpr,
    channel: tl.tensor,
    inside: tl.tensor,
    dtype: tl.constexpr,
) -> tl.tensor:
    """A row of the state; zeros for those of wider kernels."""
    if ROW < 0:
        return tl.zeros(channel.shape, dtype)
    return tl.load(state + ROW * state_stride + channel, mask=inside, other=0).to(dtype)


@triton.jit
def _write_rows(
    state: tl.tensor,
    state_stride: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    inputs: tl.tuple,
    WIDTH: tl.constexpr,
) -> None:
    """The last WIDTH - 1 of three inputs become the state: in the format of the sums they are exact."""
    tl.debug_barrier()  # other threads may still be reading what this one overwrites
    for row in tl.static_range(WIDTH - 1):
        value = inputs[4 - WIDTH + row].to(state.dtype.element_ty)
        tl.store(state + row * state_stride + channel, value, mask=real)


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
) -> None:
    """The last WIDTH - 1 rows of (state, x) become the state."""
    row = tl.arange(0, 4)
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
    x_scales = x_scale is not None and check_scale("the scale of x", x_scale, channels)
    out_scales = out_scale is not None and check_scale("out_scale", out_scale, channels)
    half_away = rounding == "half_away"
    just_made = isinstance(weight, QuantizedWeight) and taps is not weight.data  # unpacked
    launch = ORDINARY_LAUNCH if just_made else dependent_launch(values.device)
    if conv_words.fits(values, taps, weight_scale, state):
        conv_words.convolve(
            values, x_scale, taps, weight_scale, bias, state, flags, y, out_scale, half_away, launch
        )
        return y
    tile = conv_tile(length, channels)
    assert length <= tile.rows or tile.rows >= _MAX_WIDTH - 1
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
        length_blocks,
        values.stride(0),
        0 if state is None else state.stride(0),
        0 if state is None else state.stride(1),
        0 if flags is None else flags.stride(0),
        0 if flags is None else flags.stride(1),
        taps.stride(0),
        0 if weight_scale is None or weight_scale.shape[0] == 1 else weight_scale.stride(0),
        CHANNELS=channels,
        X_STRIDE=values.stride(1),
        WIDTH=width,
        X_SCALES=x_scales,
        OUT_SCALES=out_scales,
        HALF_AWAY=half_away,
        ONE_TOKEN=length == 1,
        WHOLE=length % tile.rows == 0,
        BLOCK_CHANNELS=tile.columns,
        CHUNK=tile.chunk,
        CHUNKS=tile.rows // tile.chunk,
        num_warps=tile.num_warps,
        **launch,
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
