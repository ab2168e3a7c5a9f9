"""The convolution of a prompt's int8 codes with four int8 taps a channel, on words of four codes.

A thread has the four channels of a word. Of the words of four tokens it makes four others, each with the
tokens of one channel, so that a sum of four products is one instruction (dp4a), and no code is ever unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.dependency import let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.recurrence import LOG2E, PROCESSORS, ROUNDER
from quamba.kernels.triton.words import dot4, even_bytes, odd_bytes, reciprocal, saturated_bytes

#: Of a channel; and tokens: fewer would leave a part of the old state.
_TAPS = 4
#: The bits of the float32 12582912 (``ROUNDER``): as long as it is below 2^22, adding an integer to them adds
#: it to the number.
_ROUNDER_BITS = tl.constexpr(0x4B400000)
#: A factor that takes ties away from zero, where what follows rounds half to even.
_A_HAIR_MORE = tl.constexpr(1.0000002384185791)


@dataclass(frozen=True)
class WordTile:
    """What a program works on.

    words   one for each thread, a multiple of 32
    chunk   tokens that are asked for together, one such chunk ahead; a multiple of 4
    chunks  that follow each other
    """

    words: int
    chunk: int
    chunks: int

    @property
    def tokens(self) -> int:
        return self.chunk * self.chunks


@launch_choice("causal_conv1d.words")
def word_tile(batch: int, length: int, channels: int) -> WordTile:
    """All it reads is asked for at once, until there are programs enough to hide that behind each other."""
    words = channels // 4
    block = next((size for size in (64, 128, 32) if words % size == 0), 64 if words > 32 else 32)
    chunk = min(16, max(4, triton.next_power_of_2(length)))
    warps = batch * triton.cdiv(length, chunk) * triton.cdiv(words, 32)
    return WordTile(block, chunk, 2 if warps > 96 * PROCESSORS else 1)


def fits(x: Tensor, taps: Tensor, scale: Tensor | None, state: Tensor | None) -> bool:
    """Whether the kernel takes these: x (B, L, C), taps (C, W), scale [1, 1], [C, 1] or None, state as
    ``causal_conv1d`` has it."""
    if x.dtype != torch.int8 or taps.dtype != torch.int8 or x.shape[1] < _TAPS or x.shape[2] % 4:
        return False
    if taps.shape[1] != _TAPS or not taps.is_contiguous() or taps.data_ptr() % 4:
        return False
    if scale is not None and scale.shape[0] > 1 and scale.stride(0) != 1:
        return False
    return _in_words(x) and (state is None or _in_words(state))


def _in_words(t: Tensor) -> bool:
    return t.data_ptr() % 4 == 0 and t.stride(0) % 4 == 0 and t.stride(1) % 4 == 0


@triton.jit
def read_tokens(
    x: tl.tensor,
    mask: tl.tensor,
    mask_stride: tl.tensor,
    left: tl.tensor,
    inside: tl.tensor,
    real: tl.tensor,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """What is read of COUNT tokens, FIRST after those at x and mask, and their masks, if there is one.

    Tokens from ``left`` on are not there (with WHOLE all are), and without ``inside`` none is: zeros. Masked
    ones are not yet zero: that would have to wait for the mask.
    """
    values = ()
    kept = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        there = inside if WHOLE else inside & (i < left)
        values = values + (tl.load(x + i * X_STRIDE, mask=real & there, other=0),)
        if MASKED:
            kept = kept + (tl.load(mask + i * mask_stride, mask=there, other=0),)
    return values, kept


@triton.jit
def _fours(p: tl.tensor, word: tl.tensor, real: tl.tensor, other: tl.tensor) -> tl.tuple:
    """Of the four channels of each word what p has of them, one after the other."""
    v = tl.load(p + (word[:, None] * 4 + tl.arange(0, 4)[None, :]), mask=real[:, None], other=other)
    even, odd = tl.split(tl.reshape(v, [word.shape[0], 2, 2]))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _four_floats(
    p: tl.tensor, word: tl.tensor, real: tl.tensor, other: tl.constexpr, EACH: tl.constexpr
) -> tl.tuple:
    """As ``_fours``, float32; of one number (not EACH) four times that, and of None (p) the other."""
    if p is None:
        v0 = tl.full(word.shape, other, tl.float32)
        v1, v2, v3 = v0, v0, v0
    elif EACH:
        v0, v1, v2, v3 = _fours(p, word, real, other)
        v0, v1, v2, v3 = v0.to(tl.float32), v1.to(tl.float32), v2.to(tl.float32), v3.to(tl.float32)
    else:
        v0 = tl.load(p).to(tl.float32) + tl.zeros(word.shape, tl.float32)
        v1, v2, v3 = v0, v0, v0
    return v0, v1, v2, v3


@triton.jit
def _factors(
    x_scale: tl.tensor,
    taps_scale: tl.tensor,
    bias: tl.tensor,
    out_scale: tl.tensor,
    word: tl.tensor,
    real: tl.tensor,
    X_SCALES: tl.constexpr,
    TAPS_SCALES: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    HALF_AWAY: tl.constexpr,
) -> tl.tuple:
    """For each channel of a word (up, up_shift, step, shift): the result for a sum of products is
    (sum * step + shift) / (1 + 2^(sum * up + up_shift)), in steps of out_scale if there is one."""
    steps = _four_floats(taps_scale, word, real, 1.0, TAPS_SCALES)
    x_steps = _four_floats(x_scale, word, real, 1.0, X_SCALES)
    shifts = _four_floats(bias, word, real, 0.0, True)
    out_steps = _four_floats(out_scale, word, real, 1.0, OUT_SCALES)
    factors = ()
    for j in tl.static_range(4):
        step, shift = steps[j] * x_steps[j], shifts[j]
        up, up_shift = step * -LOG2E, shift * -LOG2E
        if out_scale is not None:
            near = reciprocal(out_steps[j])
            inverse = tl.fma(near, tl.fma(-out_steps[j], near, 1.0), near)  # exact if that is a float
            if HALF_AWAY:
                inverse *= _A_HAIR_MORE
            step, shift = step * inverse, shift * inverse
        factors = factors + ((up, up_shift, step, shift),)
    return factors


@triton.jit
def _by_channel(tokens: tl.tuple) -> tl.tuple:
    """Words of four tokens to words of four channels: byte j of word i to byte i of word j."""
    a, b, c, d = tokens
    even_ab, even_cd, odd_ab, odd_cd = even_bytes(a, b), even_bytes(c, d), odd_bytes(a, b), odd_bytes(c, d)
    return (
        even_bytes(even_ab, even_cd),
        even_bytes(odd_ab, odd_cd),
        odd_bytes(even_ab, even_cd),
        odd_bytes(odd_ab, odd_cd),
    )


@triton.jit
def _zeroed(words: tl.tuple, kept: tl.tuple, FIRST: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """The words, and zeros for tokens that do not count."""
    zeroed = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        word = words[i]
        if len(kept) > 0:
            word = tl.where(kept[i] != 0, word, 0)
        zeroed = zeroed + (word,)
    return zeroed


@triton.jit
def _write(
    y: tl.tensor,
    back: tl.tuple,
    these: tl.tuple,
    taps: tl.tuple,
    factors: tl.tuple,
    one: tl.tensor,
    inside: tl.tensor,
    PLACE: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """The results of token PLACE of four.

    y      pointers to words of codes, or to the first of four floats
    back   words of the four tokens before, by channel; these: of the four
    one    1, or infinity, which makes all results zero
    """
    results = ()
    for j in tl.static_range(4):
        window = these[j]
        if PLACE < 3:
            window = (window << (24 - 8 * PLACE)) | (
                (back[j].to(tl.uint32, bitcast=True) >> (8 * PLACE + 8)).to(tl.int32, bitcast=True)
            )
        bits = dot4(window, taps[j], tl.full(window.shape, _ROUNDER_BITS, tl.int32))
        total = bits.to(tl.float32, bitcast=True) - ROUNDER
        up, up_shift, step, shift = factors[j]
        gate = reciprocal(one + tl.exp2(total * up + up_shift))
        results = results + ((total * step + shift) * gate,)
    if CODES:
        value = saturated_bytes(results[0], results[1], results[2], results[3])
    else:
        value = tl.join(tl.join(results[0], results[2]), tl.join(results[1], results[3]))
        value = tl.reshape(value, [inside.shape[0], 4])
        y = y[:, None] + tl.arange(0, 4)[None, :]
        inside = inside[:, None]
    tl.store(y, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "length_blocks", "x_batch_stride", "mask_batch_stride"])
def _word_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    taps: tl.tensor,
    taps_scale: tl.tensor,
    bias: tl.tensor,
    state: tl.tensor,
    mask: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    length: tl.tensor,
    length_blocks: tl.tensor,
    x_batch_stride: tl.tensor,
    state_batch_stride: tl.tensor,
    mask_batch_stride: tl.tensor,
    mask_stride: tl.tensor,
    WORDS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    X_SCALES: tl.constexpr,
    TAPS_SCALES: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program has BLOCK of the WORDS of a token and CHUNKS * CHUNK tokens of a sequence.

    X_STRIDE, STATE_STRIDE  in words
    WHOLE                   no program has tokens behind the last
    """
    let_next_start(EARLY)
    wait_for_inputs(EARLY)  # a bias of int8, too, has been made float just before
    MASKED: tl.constexpr = mask is not None
    blocks: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    place = tl.program_id(0) // blocks
    batch = (place // length_blocks).to(tl.int64)
    first = place % length_blocks * (CHUNK * CHUNKS)
    word = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = tl.full([BLOCK], True, tl.int1) if WORDS % BLOCK == 0 else word < WORDS
    factors = _factors(
        x_scale, taps_scale, bias, out_scale, word, real, X_SCALES, TAPS_SCALES, OUT_SCALES, HALF_AWAY
    )
    taps = _fours(taps.to(tl.pointer_type(tl.int32), bitcast=True), word, real, 0)
    x = (x + batch * x_batch_stride).to(tl.pointer_type(tl.int32), bitcast=True) + word
    at = x + first.to(tl.int64) * X_STRIDE
    flags = at
    if MASKED:
        mask += batch * mask_batch_stride
        flags = mask + first.to(tl.int64) * mask_stride
    y += (batch * length + first) * (4 * WORDS)
    if out_scale is not None:
        y = y.to(tl.pointer_type(tl.int32), bitcast=True) + word
    else:
        y += word * 4
    each: tl.constexpr = WORDS if out_scale is not None else 4 * WORDS

    left = length - first
    now, kept = read_tokens(at, flags, mask_stride, left, True, real, 0, CHUNK, X_STRIDE, WHOLE, MASKED)
    before, kept_before = read_tokens(
        at, flags, mask_stride, 0, first > 0, real, -3, 3, X_STRIDE, True, MASKED
    )
    b0, b1, b2 = _zeroed(before, kept_before, 0, 3)
    # Only the first program of a sequence reads the state, and it is the one that writes it.
    if state is not None:  # noqa: SIM102 (a constant, and what only the device knows)
        if first == 0:
            slot = (state + batch * state_batch_stride).to(tl.pointer_type(tl.int32), bitcast=True) + word
            b0 = tl.load(slot, mask=real, other=0)
            b1 = tl.load(slot + STATE_STRIDE, mask=real, other=0)
            b2 = tl.load(slot + 2 * STATE_STRIDE, mask=real, other=0)
            end = length.to(tl.int64)
            mask_end = mask + end * mask_stride if MASKED else x
            last, kept_last = read_tokens(
                x + end * X_STRIDE, mask_end, mask_stride, 0, True, real, -3, 3, X_STRIDE, True, MASKED
            )
            last = _zeroed(last, kept_last, 0, 3)
            for i in tl.static_range(3):
                tl.store(slot + i * STATE_STRIDE, last[i], mask=real)
    back = _by_channel((b0, b0, b1, b2))  # the first of four is not looked at
    for chunk in tl.range(CHUNKS):
        then, kept_then = now, kept
        if CHUNKS > 1:
            if MASKED:
                flags += CHUNK * mask_stride
            at += CHUNK * X_STRIDE
            more = chunk + 1 < CHUNKS
            then, kept_then = read_tokens(
                at, flags, mask_stride, left - CHUNK, more, real, 0, CHUNK, X_STRIDE, WHOLE, MASKED
            )
        for i in tl.static_range(CHUNK):
            if i % 4 == 0:
                these = _by_channel(_zeroed(now, kept, i, 4))
            one = 1.0
            if MASKED:
                one = tl.where(kept[i] != 0, 1.0, float("inf"))
            inside = real if WHOLE else real & (i < left)
            _write(y + i * each, back, these, taps, factors, one, inside, i % 4, out_scale is not None)
            if i % 4 == 3:
                back = these
        left -= CHUNK
        y += CHUNK * each
        now, kept = then, kept_then


def convolve(
    x: Tensor,
    x_scale: Tensor | None,
    taps: Tensor,
    taps_scale: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    flags: Tensor | None,
    y: Tensor,
    out_scale: Tensor | None,
    half_away: bool,
    launch: dict[str, Any],
) -> None:
    """Fill y, and move the state on: ``causal_conv1d`` of codes x (B, L, C), with the mask as uint8.

    launch  as ``dependent_launch`` gives it
    """
    batch, length, channels = x.shape
    tile = word_tile(batch, length, channels)
    length_blocks = triton.cdiv(length, tile.tokens)
    _word_kernel[(batch * length_blocks * triton.cdiv(channels // 4, tile.words),)](
        x,
        x_scale,
        taps,
        taps_scale,
        bias,
        state,
        flags,
        y,
        out_scale,
        length,
        length_blocks,
        x.stride(0),
        0 if state is None else state.stride(0),
        0 if flags is None else flags.stride(0),
        0 if flags is None else flags.stride(1),
        WORDS=channels // 4,
        X_STRIDE=x.stride(1) // 4,
        STATE_STRIDE=0 if state is None else state.stride(1) // 4,
        X_SCALES=x_scale is not None and x_scale.numel() > 1,
        TAPS_SCALES=taps_scale is not None and taps_scale.shape[0] > 1,
        OUT_SCALES=out_scale is not None and out_scale.numel() > 1,
        HALF_AWAY=half_away,
        WHOLE=length % tile.tokens == 0,
        BLOCK=tile.words,
        CHUNK=tile.chunk,
        CHUNKS=tile.chunks,
        num_warps=tile.words // 32,
        **launch,
    )
