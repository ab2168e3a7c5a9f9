"""A projection of a few rows with what follows it: the convolution's step, the residual sum, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.weight import QuantizedWeight
from quamba.kernels.triton.codes import codes_and_scales
from quamba.kernels.triton.decode.normed import normed_wide_words, normed_words, read_factors
from quamba.kernels.triton.decode.rows import (
    read_group_scales,
    read_rows,
    read_wide_words,
    read_words,
    sums_of_codes,
    sums_of_floats,
    sums_of_halves,
    sums_of_wide_codes,
)
from quamba.kernels.triton.decode.vectors import Normed, Vector
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import silu, to_codes

# What x and the weights are (a constexpr of the kernel).
CODES, HALVES, FLOATS, WIDE = 0, 1, 2, 3
_KINDS = ("int8", "float16", "float", "wide")
#: Words of weights in a program that norms x itself.
_NORMED_WORDS = 1536


@dataclass(frozen=True)
class RowLaunch:
    """Weight rows a program, elements (words or floats) of a row at a time, warps."""

    rows: int
    chunk: int
    warps: int


class RowKey(NamedTuple):
    """What tables know a projection by."""

    x: str
    weights: str
    features: int
    elements: int
    rows: int


def row_key(
    tokens: int, features: int, elements: int, kind: int, bits: int, groups: int, normed: bool
) -> RowKey:
    weights = "float" if kind == FLOATS else f"int{bits} {'group' if groups > 1 else 'row'}"
    x = f"normed {_KINDS[kind]}" if normed else _KINDS[kind]
    return RowKey(x, weights, features, elements, tokens)


def row_candidates(
    tokens: int, features: int, elements: int, kind: int, bits: int, groups: int, normed: bool
) -> list[RowLaunch]:
    """10 to 128 registers a lane for the weights; other chunks for those that usually win."""
    usual = 512 if kind == FLOATS else 128
    held = elements // 2 if kind == FLOATS else elements
    shapes = [(rows, usual, warps) for warps in (1, 2, 4) for rows in (1, 2, 4, 8, 16)]
    shapes = [(r, c, w) for r, c, w in shapes if 10 <= r * held / (32 * w) <= 128]
    shapes += [(rows, chunk, 1) for chunk in (usual // 2, usual * 2) for rows in (2, 4)]
    most = triton.next_power_of_2(elements)
    return list({RowLaunch(rows, min(chunk, most), warps): None for rows, chunk, warps in shapes})


@launch_choice("decode.project", key=row_key, candidates=row_candidates)
def row_launch(
    tokens: int, features: int, elements: int, kind: int, bits: int, groups: int, normed: bool
) -> RowLaunch:
    """From timings of steps on an H200: as many rows as leave all chunks of them in the registers of a warp.
    Rows share what is done for the vector, and few programs start sooner; but several a multiprocessor.

    elements  of a row: words of codes, or floats
    kind      and bits: those of the ``Matrix``
    normed    every program norms x itself, so that they should be few
    """
    floats = kind == FLOATS
    usual = 512 if floats else 128 if elements < 2048 else 256
    held = elements // 2 if floats else elements  # 32-bit registers of a row
    most = 2560 if floats or elements > 1024 else 4096
    rows = 16
    while rows > 1 and (rows * held > most or features < 640 * rows):
        rows //= 2
    while normed and 2 * rows * held <= _NORMED_WORDS:
        rows *= 2
    chunk = min(usual, triton.next_power_of_2(elements))
    return RowLaunch(rows, chunk, warps=max(1, min(4, rows * held // 4096)))


@dataclass(frozen=True)
class Matrix:
    """A weight as the kernels take it.

    kind      of x and weights: CODES int8 and int; WIDE wide codes and int; HALVES float16 and int4;
              FLOATS both floats
    data      int32 words or floats (N, elements)
    scale     (N, groups), (1, 1), or None for floats
    """

    data: Tensor
    scale: Tensor | None
    kind: int
    bits: int
    features: int
    inputs: int

    @property
    def elements(self) -> int:
        return self.inputs if self.kind == FLOATS else self.inputs * self.bits // 32

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight, x: Vector | Normed) -> Matrix | None:
        """For such x; None for what these kernels do not multiply."""
        features, inputs = weight.shape
        if not isinstance(weight, QuantizedWeight):
            fits = x.is_float and weight.is_contiguous()
            return cls(weight, None, FLOATS, 16, features, inputs) if fits else None
        data, scale, bits = codes_and_scales(weight)
        groups = scale.shape[1]
        whole = inputs % (128 if groups > 1 else 32) == 0 and (groups == 1 or inputs // groups == 128)
        if not whole or not data.is_contiguous():
            return None
        if isinstance(x, Vector) and x.is_float and (bits == 8 or x.values.dtype != torch.float16):
            return None
        kind = HALVES if x.is_float else WIDE if x.is_wide else CODES
        return cls(data.view(torch.int32), scale, kind, bits, features, inputs)


@triton.jit
def _scale_of(scale: tl.tensor, n: tl.tensor, inside: tl.tensor, BY_CHANNEL: tl.constexpr) -> tl.tensor:
    """float32 block of one scale a row; one for all without BY_CHANNEL."""
    if BY_CHANNEL:
        step = tl.load(scale + n, mask=inside, other=1).to(tl.float32)
    else:
        step = tl.load(scale).to(tl.float32) + tl.zeros(n.shape, tl.float32)
    return step


@triton.jit
def _project_kernel(
    x: tl.tensor,
    w: tl.tensor,
    scale: tl.tensor,
    x_scale: tl.tensor,
    wide_scale: tl.tensor,
    norm_weight: tl.tensor,
    norm_scale: tl.tensor,
    norm_eps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    residual: tl.tensor,
    taps: tl.tensor,
    taps_scale: tl.tensor,
    taps_bias: tl.tensor,
    window: tl.tensor,
    conv_scale: tl.tensor,
    x_row: tl.tensor,
    features: tl.tensor,
    conv_first: tl.tensor,
    conv_last: tl.tensor,
    window_batch: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_ROW_SCALE: tl.constexpr,
    OUT_SCALES: tl.constexpr,
    CONV_SCALES: tl.constexpr,
    ONE_TAPS_SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """NORMED: x is the residual stream, whose norm is what the weights are multiplied by."""
    let_next_start(EARLY)
    first_row = tl.program_id(0) * ROWS
    n = first_row + tl.arange(0, ROWS)
    inside = n < features
    # Before the wait: all that does not depend on this step.
    weights = read_rows(w + first_row.to(tl.int64) * ROW, tl.arange(0, ROWS), inside, ROW, CHUNK)
    scales = ()
    row_scale = tl.full([ROWS], 0.0625 if BITS == 4 and KIND != 1 else 1.0, tl.float32)
    if GROUPS > 1:
        scales = read_group_scales(scale, n, inside, ROW, CHUNK, GROUPS)
    elif scale is not None:
        row_scale *= tl.load(scale + (n * 0 if ONE_ROW_SCALE else n), mask=inside, other=0).to(tl.float32)
    if x_scale is not None:
        row_scale *= tl.load(x_scale).to(tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + n, mask=inside, other=0).to(tl.float32)
    step = tl.full([ROWS], 1.0, tl.float32)
    if out_scale is not None:
        step = _scale_of(out_scale, n, inside, OUT_SCALES)
    factors = ()
    if NORMED:
        factors = read_factors(norm_weight, norm_scale, ROW, CHUNK, BITS)
    windows, products = (), ()
    if window is not None:
        c = n - conv_first
        in_conv = (n >= conv_first) & (n < conv_last)
        channels = conv_last - conv_first
        integer: tl.constexpr = (out.dtype.element_ty == tl.int8) and (taps.dtype.element_ty == tl.int8)
        dtype: tl.constexpr = tl.int32 if integer else tl.float32
        for i in tl.static_range(WIDTH):
            products = products + (tl.load(taps + c * WIDTH + i, mask=in_conv, other=0).to(dtype),)
        for i in tl.static_range(TOKENS * (WIDTH - 1)):
            at = window + (i // (WIDTH - 1)) * window_batch + (i % (WIDTH - 1)) * channels + c
            windows = windows + (tl.load(at, mask=in_conv, other=0),)
        tap_scale = step
        if taps_scale is not None:
            own = c * 0 if ONE_TAPS_SCALE else c
            tap_scale *= tl.load(taps_scale + own, mask=in_conv, other=0).to(tl.float32)
        tap_shift = tl.zeros([ROWS], tl.float32)
        if taps_bias is not None:
            tap_shift = tl.load(taps_bias + c, mask=in_conv, other=0).to(tl.float32)
        inverse = tl.full([ROWS], 1.0, tl.float32)
        if conv_scale is not None:
            inverse = tl.div_rn(inverse, _scale_of(conv_scale, c, in_conv, CONV_SCALES))
    wait_for_inputs(EARLY)

    for m in tl.static_range(TOKENS):
        if residual is not None:  # early, beside x
            old = tl.load(residual + m * features + n, mask=inside, other=0)
        x_at = x + m * x_row
        if KIND == 0:
            if NORMED:
                words = normed_words(x_at, factors, norm_eps, ROW, CHUNK, BITS)
            else:
                words = read_words(x_at, ROW, CHUNK, BITS, SPLIT)
            sums = sums_of_codes(words, weights, scales, ROW, CHUNK, GROUPS, BITS)
        elif KIND == 1:
            sums = sums_of_halves(x_at, weights, scales, ROWS, ROW, CHUNK, GROUPS)
        elif KIND == 3:
            if NORMED:
                high, low, steps = normed_wide_words(x_at, factors, norm_eps, ROW, CHUNK, BITS)
            else:
                steps_at = wide_scale + m * (ROW // BITS)
                high, low, steps = read_wide_words(x_at, steps_at, ROW, CHUNK, BITS, SPLIT)
            sums = sums_of_wide_codes(high, low, steps, weights, scales, ROW, CHUNK, GROUPS, BITS)
        else:
            sums = sums_of_floats(x_at, weights, ROWS, ROW, CHUNK)
        y = sums * row_scale + shift
        if residual is not None:
            # As large as the projection alone would have given it.
            added = old + y.to(out.dtype.element_ty).to(old.dtype)
            tl.store(residual + m * features + n, added, mask=inside)
        else:
            if out_scale is not None:
                value = to_codes(tl.div_rn(y, step), False, False)
            else:
                value = y.to(out.dtype.element_ty)
            if window is not None:  # noqa: SIM102, known when compiled; the other only when run
                if (first_row + ROWS > conv_first) & (first_row < conv_last):
                    at = window + m * window_batch + c
                    total = value.to(dtype) * products[WIDTH - 1]
                    for i in tl.static_range(WIDTH - 1):
                        before = windows[m * (WIDTH - 1) + i]
                        total += before.to(dtype) * products[i]
                        if i > 0:
                            tl.store(at + (i - 1) * channels, before, mask=in_conv)
                    if WIDTH > 1:
                        tl.store(at + (WIDTH - 2) * channels, value, mask=in_conv)
                    result = silu(total.to(tl.float32) * tap_scale + tap_shift)
                    if conv_scale is not None:
                        convolved = to_codes(result * inverse, HALF_AWAY, False)
                    else:
                        convolved = result.to(out.dtype.element_ty)
                    value = tl.where(in_conv, convolved, value)
            tl.store(out + m * features + n, value, mask=inside)


@dataclass(frozen=True)
class ConvStep:
    """The convolution of some of a projection's channels (``kernels/reference/conv.py``).

    first     of the channels among the projection's outputs
    window    (B, width - 1, channels), as the outputs
    taps      (channels, width) int8 or float;  taps_scale  (1, 1), (channels, 1) or None
    out_scale () or (channels,), or None where the outputs are floats
    """

    first: int
    window: Tensor
    taps: Tensor
    taps_scale: Tensor | None
    bias: Tensor | None
    out_scale: Tensor | None
    half_away: bool = False


def project(
    x: Vector | Normed,
    matrix: Matrix,
    out: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    conv: ConvStep | None = None,
    residual: Tensor | None = None,
) -> None:
    """out[b] = W x[b] + bias, as ``kernels/reference/linear.py`` has it, for B of 1 to 4; one launch.

    x         (B, K) of codes, floats or wide codes, or a residual to be normed
    out       (B, N) int8 where there is an out_scale () or (N,), else float
    x_scale   () or None where the weight's columns contain it
    conv      its channels of out are then those of the convolution, whose window moves on by one
    residual  (B, N) float: out is only added to it, and not written
    """
    if isinstance(x, Normed):
        values, norm, split = x.residual, (None, x.weight, x.scale, x.eps), False
    else:
        values, norm, split = x.values, (x.wide_scale, None, None, 0.0), x.split
    batch = values.shape[0]
    scale = matrix.scale
    groups = 1 if scale is None else scale.shape[1]
    sizes = batch, matrix.features, matrix.elements
    launch = row_launch(*sizes, matrix.kind, matrix.bits, groups, normed=isinstance(x, Normed))
    _project_kernel[(triton.cdiv(matrix.features, launch.rows),)](
        values,
        matrix.data,
        scale,
        x_scale,
        *norm,
        bias,
        out,
        out_scale,
        residual,
        **_conv_arguments(conv),
        features=matrix.features,
        KIND=matrix.kind,
        BITS=matrix.bits,
        ROW=matrix.elements,
        GROUPS=groups,
        x_row=values.stride(0),
        ONE_ROW_SCALE=scale is not None and scale.shape[0] == 1,
        OUT_SCALES=out_scale is not None and out_scale.ndim == 1,
        TOKENS=batch,
        NORMED=isinstance(x, Normed),
        SPLIT=split,
        ROWS=launch.rows,
        CHUNK=launch.chunk,
        num_warps=launch.warps,
        **dependent_launch(values.device),
    )


def _conv_arguments(conv: ConvStep | None) -> dict[str, Any]:
    if conv is None:
        tensors = dict.fromkeys(("taps", "taps_scale", "taps_bias", "window", "conv_scale"))
        sizes = {"conv_first": 0, "conv_last": 0, "window_batch": 0}
        return (
            tensors | sizes | {"CONV_SCALES": False, "ONE_TAPS_SCALE": False, "WIDTH": 1, "HALF_AWAY": False}
        )
    channels, width = conv.taps.shape
    return {
        "taps": conv.taps,
        "taps_scale": conv.taps_scale,
        "taps_bias": conv.bias,
        "window": conv.window,
        "conv_scale": conv.out_scale,
        "conv_first": conv.first,
        "conv_last": conv.first + channels,
        "window_batch": conv.window.stride(0),
        "CONV_SCALES": conv.out_scale is not None and conv.out_scale.ndim == 1,
        "ONE_TAPS_SCALE": conv.taps_scale is not None and conv.taps_scale.shape[0] == 1,
        "WIDTH": width,
        "HALF_AWAY": conv.half_away,
    }
