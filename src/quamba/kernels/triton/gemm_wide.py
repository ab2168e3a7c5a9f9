"""Products of hundreds of rows of int8 with quantized weights. ``gemm.py`` has the others.

Tiles are read by descriptors, for which newer GPUs have an engine: addresses take no registers, and edges no
masks. Sums of a group must become floats before the next group's, and while a warp does that it has nothing
for the tensor cores; what counts is how many warps a multiprocessor has room for. So a step is one product of
a whole group, and the tokens of a tile are multiplied in parts, which share the registers of their integers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.gemm import Operand, Product, Target, finish, in_planes, product_key
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.planes import weight_planes
from quamba.kernels.triton.recurrence import PROCESSORS

#: Rows from which it is worth it.
WIDE_ROWS = 256
#: Tiles of 64 features and 128 tokens from which programs are many enough.
WIDE_TILES = PROCESSORS
#: Inputs of a step of int4, which a group must be a multiple of.
_INT4_STEP = 128


@dataclass(frozen=True)
class WideLaunch:
    """How a product is shared out.

    features, tokens  of a tile
    part              of its tokens, multiplied at once
    inputs            of a step; of int4 always 128
    warps, stages     of the pipeline
    registers         of a thread at most, 0: any number
    order             feature tiles whose programs follow each other for the sake of the cache
    """

    features: int
    tokens: int
    part: int
    inputs: int = 128
    warps: int = 4
    stages: int = 3
    registers: int = 0
    order: int = 8


def wide_candidates(product: Product) -> list[WideLaunch]:
    """Tiles that were the best of some product."""
    if product.bits == 4:
        return [
            WideLaunch(64, 128, 64),
            WideLaunch(64, 128, 64, stages=4),
            WideLaunch(64, 64, 64, stages=4),
            WideLaunch(128, 128, 64, warps=8, registers=128),
            WideLaunch(128, 128, 64, warps=8, stages=4, registers=128),
        ]
    return [
        WideLaunch(64, 128, 128, stages=4),
        WideLaunch(128, 128, 128, inputs=64, stages=4),
        WideLaunch(128, 128, 128, warps=8),
    ]


@launch_choice("linear.wide", key=product_key, candidates=wide_candidates)
def wide_launch(product: Product) -> WideLaunch:
    """From timings on an H200 (docs/notes/gpu-kernels.md)."""
    tokens, features, inputs = product.tokens, product.features, product.inputs
    if product.bits == 4:
        tiles = wide_tiles(tokens, features)
        if tiles < 240:
            return WideLaunch(64, 64, 64, stages=4)
        if tiles > 7 * PROCESSORS and inputs > 4096:
            return WideLaunch(128, 128, 64, warps=8, stages=4, registers=128)
        return WideLaunch(64, 128, 64)
    tiles = triton.cdiv(features, 128) * triton.cdiv(tokens, 128)
    if tiles < PROCESSORS or inputs < 1024:  # where sums are short, many small tiles hide how they end
        return WideLaunch(64, 128, 128, stages=4)
    if features > inputs and 2 * PROCESSORS < tiles <= 3 * PROCESSORS:  # all at once, if three fit
        return WideLaunch(128, 128, 128, inputs=64, stages=4)
    return WideLaunch(128, 128, 128, warps=8)


def wide_tiles(tokens: int, features: int) -> int:
    """Tiles of a product, of 64 features and 128 tokens."""
    return triton.cdiv(features, 64) * triton.cdiv(tokens, 128)


def wide_fits(rows: Tensor, operand: Operand) -> bool:
    """Whether descriptors can read both (rows of whole 16 bytes), steps are whole, and tiles fill a GPU
    without sharing out their sums; rows are int8."""
    tokens, inputs = rows.shape
    if tokens < WIDE_ROWS or operand.levels is not None or not _has_engine(rows.device):
        return False
    if wide_tiles(tokens, operand.data.shape[0]) < WIDE_TILES:
        return False
    if operand.bits == 8 and operand.group_scale is not None:
        return False
    pitches = rows.stride(0), operand.data.stride(0)
    aligned = all(pitch % 16 == 0 for pitch in pitches) and operand.data.data_ptr() % 16 == 0
    return aligned and (operand.bits == 8 or inputs // operand.groups % _INT4_STEP == 0)


@functools.lru_cache(maxsize=16)
def _has_engine(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def multiply_wide(rows: Tensor, operand: Operand, target: Target, launch: WideLaunch | None = None) -> None:
    """Fill ``target.out`` from rows (tokens, inputs) int8, any number. Else ``wide_fits`` must hold."""
    tokens, inputs = rows.shape
    features, row_scale = operand.data.shape[0], operand.row_scale
    if launch is None:
        launch = wide_launch(operand.product(rows))
    step = launch.inputs
    if operand.bits == 4:
        step = _INT4_STEP
        rows = in_planes(rows, step)
    limit = {"maxnreg": launch.registers} if launch.registers else {}
    tiles = triton.cdiv(features, launch.features) * triton.cdiv(tokens, launch.tokens)
    _wide[(tiles,)](
        _descriptor(rows, launch.part, step),
        _descriptor(operand.data, launch.features, step * operand.bits // 8),
        operand.group_scale, row_scale, target.x_scale, target.bias, target.out_scale, target.out,
        target.out.stride(0), tokens, features,
        INPUTS=inputs, GROUPS=operand.groups, BITS=operand.bits,
        ONE_ROW_SCALE=row_scale is not None and row_scale.shape[0] == 1,
        CHANNEL_OUT_SCALE=target.out_scale is not None and target.out_scale.ndim == 1,
        FACTOR=0.0625 if operand.bits == 4 else 1.0,
        FEATURES=launch.features, TOKENS=launch.tokens, PART=launch.part, STEP=step, ORDER=launch.order,
        num_warps=launch.warps, num_stages=launch.stages, **limit, **dependent_launch(rows.device),
    )  # fmt: skip


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


@triton.jit
def _wide(
    x, w, group_scale, row_scale, x_scale, bias, out_scale, out, out_stride, tokens, features,
    INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, FACTOR: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr,
    PART: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of out.

    x, w  descriptors of blocks (PART, STEP) and (FEATURES, bytes of STEP inputs); with BITS 4, x has the even
          inputs of a step, then the odd ones
    """
    let_next_start(EARLY)
    GROUPED: tl.constexpr = group_scale is not None
    STEPS: tl.constexpr = (INPUTS + STEP - 1) // STEP
    IN_GROUP: tl.constexpr = STEPS // GROUPS
    PARTS: tl.constexpr = TOKENS // PART
    # Features change fastest inside ORDER tiles of them, then tokens: tiles at work share what they read.
    across, down = tl.cdiv(features, FEATURES), tl.cdiv(tokens, TOKENS)
    first_tile = tl.program_id(0) // (ORDER * down) * ORDER
    wide = tl.minimum(across - first_tile, ORDER)
    inner = tl.program_id(0) % (ORDER * down)
    n0, m0 = (first_tile + inner % wide) * FEATURES, inner // wide * TOKENS
    n, m = n0 + tl.arange(0, FEATURES), tl.arange(0, PART)
    in_n = n < features
    totals = ()
    for _ in tl.static_range(PARTS):
        totals = totals + (tl.zeros([FEATURES, PART], tl.float32 if GROUPED else tl.int32),)
    wait_for_inputs(EARLY)  # weights, too, may have been made just before
    scale_at = group_scale
    if GROUPED:
        scale_at = group_scale + tl.minimum(n, features - 1).to(tl.int64) * GROUPS
        following = tl.load(scale_at)
    for s in range(STEPS):
        codes = w.load([n0, s * (STEP * BITS // 8)])
        if BITS == 4:
            # Both planes are one operand: two products would each be waited for.
            planes = weight_planes(codes, 0, BITS, False, False)
            codes = tl.reshape(tl.permute(tl.join(planes[0], planes[1]), (0, 2, 1)), [FEATURES, STEP])
        if GROUPED:  # the scale of the next step is under way while this one is multiplied
            scale = following.to(tl.float32)[:, None]
            following = tl.load(scale_at + tl.minimum((s + 1) // IN_GROUP, GROUPS - 1))
        added = ()
        for p in tl.static_range(PARTS):
            rows = tl.trans(x.load([m0 + p * PART, s * STEP]))
            if GROUPED:
                sums = tl.dot(codes, rows, tl.zeros([FEATURES, PART], tl.int32), out_dtype=tl.int32)
                added = added + (totals[p] + sums.to(tl.float32) * scale,)
            else:
                added = added + (tl.dot(codes, rows, totals[p], out_dtype=tl.int32),)
        totals = added
    for p in tl.static_range(PARTS):
        row = m0 + p * PART + m
        y = finish(
            totals[p], n[:, None], in_n[:, None], row_scale, x_scale, bias, out_scale,
            ONE_ROW_SCALE, CHANNEL_OUT_SCALE, FACTOR,
        )  # fmt: skip
        y = tl.trans(y.to(out.dtype.element_ty))
        at = out + row.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(at, y, mask=(row < tokens)[:, None] & in_n[None, :])
