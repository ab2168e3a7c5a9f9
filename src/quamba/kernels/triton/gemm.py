"""Products of 5 and more rows with quantized weights, on tensor cores.

The weight is the left operand, so a thread has few features and their scales, and codes packed in registers
become operands there (``planes.py``). A tile adds up a *step* of inputs at a time: at most ``inputs`` of one
group of scales. Where tiles are fewer than multiprocessors, the steps of a tile are shared out: to the warps
of a program (``slices``) or to programs that leave their sums to a second kernel (``splits``); they are
added in a fixed order either way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice, row_bucket
from quamba.kernels.triton.planes import weight_planes, x_planes
from quamba.kernels.triton.recurrence import PROCESSORS
from quamba.kernels.triton.words import round_code

#: Added to an integer of up to 2^22 as an integer, the bits of the float32 12582912 + integer.
_FLOAT_BITS = tl.constexpr(0x4B400000)
#: Rows from which the planes of x are made once, before the product, rather than by every tile.
_PLANAR_ROWS = 256

#: What is scaled: the sum of a row, sums of groups, or codes before the sum ("levels").
Scales = Literal["row", "group", "levels"]


@dataclass(frozen=True)
class Operand:
    """A weight [N, K] as its kernels read it.

    data         int8 [N, K] or packed int4, uint8 [N, K // 2]
    bits         8 or 4
    group_scale  float16 or float32 [N, groups], multiplied to the sums of a group; or None
    levels       float16 [N, groups]: what the tensor cores get is round(levels * code); or None
    row_scale    float32 or float16 [N, 1] or [1, 1], multiplied to the sum of a row; or None
    """

    data: Tensor
    bits: int
    group_scale: Tensor | None = None
    levels: Tensor | None = None
    row_scale: Tensor | None = None

    @property
    def groups(self) -> int:
        scale = self.group_scale if self.group_scale is not None else self.levels
        return 1 if scale is None else scale.shape[1]

    @property
    def scales(self) -> Scales:
        return "levels" if self.levels is not None else "group" if self.group_scale is not None else "row"

    def product(self, rows: Tensor) -> Product:
        tokens, inputs = rows.shape
        half, group = rows.dtype == torch.float16, inputs // self.groups
        return Product(tokens, self.data.shape[0], inputs, self.bits, half, self.scales, group)

    def rows(self, start: int, stop: int) -> Operand:
        """The operand of these features."""

        def cut(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[start:stop]

        return Operand(
            self.data[start:stop], self.bits, cut(self.group_scale), cut(self.levels), cut(self.row_scale)
        )


@dataclass(frozen=True)
class Target:
    """What becomes of the sums: ``out`` (tokens, features), any strides of rows, and its numbers."""

    out: Tensor
    x_scale: Tensor | None = None
    bias: Tensor | None = None
    out_scale: Tensor | None = None

    def columns(self, start: int, stop: int) -> Target:
        def cut(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.ndim == 0 else t[start:stop]

        return Target(self.out[:, start:stop], self.x_scale, cut(self.bias), cut(self.out_scale))


@dataclass(frozen=True)
class TileLaunch:
    """Output features, tokens and inputs of a tile; parts of the sum by warps or programs; warps and stages
    of the pipeline; feature tiles whose programs follow each other for the sake of the cache."""

    features: int
    tokens: int
    inputs: int = 128
    slices: int = 1
    splits: int = 1
    warps: int = 4
    stages: int = 4
    order: int = 8


class Product(NamedTuple):
    """What a launch is chosen for.

    tokens   rows of x
    bits     of the weights
    half     x is float16, else int8
    group    inputs that share a scale; with "row", all
    """

    tokens: int
    features: int
    inputs: int
    bits: int
    half: bool
    scales: Scales
    group: int


class ProductKey(NamedTuple):
    """What tables know it by."""

    x: str
    weights: str
    features: int
    inputs: int
    rows: int


def product_key(product: Product) -> ProductKey:
    weights = f"int{product.bits} {product.scales}"
    if product.scales != "row":
        weights += f" {product.group}"
    rows = product.tokens if product.tokens <= 4 else row_bucket(product.tokens)
    x = "float16" if product.half else "int8"
    return ProductKey(x, weights, product.features, product.inputs, rows)


def tile_candidates(product: Product) -> list[TileLaunch]:
    """Tiles that were the best of some product, and some of their neighbours."""
    tokens, inputs = product.tokens, product.inputs
    if tokens <= 64:
        width = max(16, triton.next_power_of_2(tokens))
        return [*_sliced(width), *_shared_out(width, product)]
    shapes = [(64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3)]
    shapes += [(128, 64, 8, 4), (64, 64, 4, 4), (128, 128, 8, 3), (128, 128, 8, 4)]
    found = []
    for rows, columns, warps, stages in shapes:
        tiles = triton.cdiv(product.features, rows) * triton.cdiv(tokens, columns)
        for splits in sorted({1, _splits(triton.cdiv(PROCESSORS, tiles), 8, inputs)}):
            found.append(TileLaunch(rows, columns, splits=splits, warps=warps, stages=stages))
    return found


def _sliced(width: int) -> list[TileLaunch]:
    if width > 16:
        return []
    shapes = [(32, 4, 4, 3), (32, 4, 4, 4), (16, 4, 4, 4), (16, 8, 8, 3), (64, 2, 4, 3)]
    return [TileLaunch(rows, 16, slices=s, warps=w, stages=n) for rows, s, w, n in shapes]


def _shared_out(width: int, product: Product) -> list[TileLaunch]:
    """By programs, as far as there are too few of them, but not so many that their sums take the time."""
    found = []
    shapes = [(32, 2, 5), (64, 4, 4), (64, 4, 6), (64, 2, 4)]
    if width > 16:
        shapes = [(32, 2, 4), (32, 4, 4), (64, 2, 4), (64, 4, 4), (128, 4, 3), (128, 8, 3)]
    for rows, warps, stages in shapes:
        tiles = triton.cdiv(product.features, rows)
        for splits in (1, 2, 3, 4, 8):
            many = tiles * splits > 6 * PROCESSORS or product.inputs < 512 * splits
            if splits == 1 or (not many and tiles * splits > PROCESSORS // 2):
                found.append(TileLaunch(rows, width, splits=splits, warps=warps, stages=stages))
    return found


@launch_choice("linear.tiles", key=product_key, candidates=tile_candidates)
def tile_launch(product: Product) -> TileLaunch:
    """From timings on an H200 (docs/notes/gpu-kernels.md)."""
    tokens, features, inputs, bits = product[:4]
    if tokens <= 16:
        return _few_rows(features, inputs)
    if tokens <= 64:
        return _some_rows(product)
    if product.half:
        launch = TileLaunch(128, 64, warps=4 if tokens <= 128 else 8, stages=3)
    elif bits == 4 or product.scales == "group":
        launch = TileLaunch(64, 128, stages=3)
    elif triton.cdiv(features, 128) * triton.cdiv(tokens, 128) < PROCESSORS:
        launch = TileLaunch(64, 128)
    else:
        launch = TileLaunch(128, 128, warps=8, stages=3)
    tiles = triton.cdiv(features, launch.features) * triton.cdiv(tokens, launch.tokens)
    return replace(launch, splits=_splits(PROCESSORS // tiles, 4, inputs))


def _few_rows(features: int, inputs: int) -> TileLaunch:
    """Up to 16: bytes of the weight in flight are what counts; the sums of few tiles are shared out."""
    tiles = triton.cdiv(features, 64)
    if tiles < 16 or 200 <= tiles < 330:
        return TileLaunch(32, 16, slices=4, stages=3)
    return TileLaunch(64, 16, splits=_splits(330 // tiles, 8, inputs), warps=2)


def _some_rows(product: Product) -> TileLaunch:
    """Up to 64. Unpacking a code for float16 takes longer than for int8, and wide tiles do it less often."""
    tokens, features, inputs, bits = product[:4]
    width, tiles = triton.next_power_of_2(tokens), triton.cdiv(features, 64)
    if product.half or (bits == 4 and tiles >= 330):
        splits = _splits(triton.cdiv(330, triton.cdiv(features, 128)), 4, inputs)
        return TileLaunch(128, width, splits=splits, warps=8)
    if bits == 4 and tiles * _splits(500 // tiles, 8, inputs) < PROCESSORS:
        return TileLaunch(32, width, splits=_splits(250 // tiles, 8, inputs))
    if bits == 4:
        return TileLaunch(64, width, splits=_splits(500 // tiles, 8, inputs), warps=2)
    return TileLaunch(64, width, splits=_splits(200 // tiles, 4, inputs))


def _splits(wanted: int, most: int, inputs: int) -> int:
    """At least 512 inputs each."""
    return max(1, min(wanted, most, inputs // 512))


def planes_of(bits: int, is_float: bool) -> int:
    """Codes that a loaded element holds: tensor cores take 32 bits of a row, four int8 or two float16."""
    return (16 if is_float else 8) // bits


def fits(operand: Operand, is_float: bool) -> bool:
    """Whether groups and rows are whole elements."""
    inputs = operand.data.shape[1] * 8 // operand.bits
    return inputs // operand.groups % planes_of(operand.bits, is_float) == 0


def multiply(rows: Tensor, operand: Operand, target: Target, launch: TileLaunch | None = None) -> None:
    """Fill ``target.out`` from rows (tokens, inputs), int8 or float16. ``fits`` must hold.

    The elements of a row are next to each other, and rows begin at multiples of eight bytes.
    """
    tokens, inputs = rows.shape
    features, groups = operand.data.shape[0], operand.groups
    is_float = rows.dtype == torch.float16
    if tokens == 0 or features == 0:
        return
    planes = planes_of(operand.bits, is_float)
    width = inputs // groups
    if launch is None:
        launch = tile_launch(operand.product(rows))
    step = min(launch.inputs, triton.next_power_of_2(width))
    block = max(16 if is_float else 32, step // planes)
    parts = triton.cdiv(width, block * planes)
    planar = planes == 2 and not is_float and tokens >= _PLANAR_ROWS and launch.slices == 1
    row_scale, group_scale = operand.row_scale, operand.group_scale
    per_split = triton.cdiv(groups * parts, launch.splits)
    splits = triton.cdiv(groups * parts, per_split)
    sums = target.out
    if splits > 1:
        whole = group_scale is None and not is_float
        sums = torch.empty(
            splits, tokens, features, dtype=torch.int32 if whole else torch.float32, device=rows.device
        )
    shared = {
        "x_scale": target.x_scale,
        "bias": target.bias,
        "out_scale": target.out_scale,
        "tokens": tokens,
        "features": features,
        "ONE_ROW_SCALE": row_scale is not None and row_scale.shape[0] == 1,
        "CHANNEL_OUT_SCALE": target.out_scale is not None and target.out_scale.ndim == 1,
        "FACTOR": 0.0625 if operand.bits == 4 and operand.levels is None and not is_float else 1.0,
    }
    if planar:
        rows = in_planes(rows)
    arguments = {
        "x": rows,
        "w": operand.data,
        "group_scale": group_scale if group_scale is not None else operand.levels,
        "row_scale": row_scale,
        "out": sums,
        "out_stride": sums.stride(-2),
        "steps": per_split,
        "X_PITCH": rows.stride(0) // (1 if planar else planes),
        "INPUTS": inputs,
        "GROUPS": groups,
        "BITS": operand.bits,
        "TWO_LEVEL": operand.levels is not None,
        "FLOAT": is_float,
        "PLANES": planes,
        "FEATURES": launch.features,
        "TOKENS": launch.tokens,
        "BLOCK": block,
        "PARTS": parts,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        **dependent_launch(rows.device),
    }
    tiles = triton.cdiv(features, launch.features) * triton.cdiv(tokens, launch.tokens)
    if launch.slices > 1:
        _slices[(tiles,)](**arguments, **shared, SLICES=launch.slices)
        return
    _tiles[(tiles, splits)](**arguments, **shared, PLANAR=planar, SPLIT=splits > 1, ORDER=launch.order)
    if splits > 1:
        _add_splits[(triton.cdiv(features, 256), tokens)](
            sums, row_scale, target.out, target.out.stride(0), **shared,
            SPLITS=splits, BLOCK=256, num_warps=2, **dependent_launch(rows.device),
        )  # fmt: skip


def in_planes(rows: Tensor, step: int | None = None) -> Tensor:
    """Of every ``step`` inputs of a row of int8 (a divisor of their number; None: all) the even ones, then
    the odd ones."""
    tokens, inputs = rows.shape
    out = torch.empty(tokens, inputs, dtype=rows.dtype, device=rows.device)
    count = tokens * inputs // 2
    _split_pairs[(triton.cdiv(count, 4096),)](
        rows, out, count, PITCH=rows.stride(0) // 2, ROW=inputs // 2, HALF=(step or inputs) // 2, BLOCK=4096,
        num_warps=8, **dependent_launch(rows.device),
    )  # fmt: skip
    return out


@triton.jit
def finish(
    sums, n, valid, row_scale, x_scale, bias, out_scale, ONE_ROW_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, FACTOR: tl.constexpr = 1.0,
):  # fmt: skip
    """float32 sums * row_scale * x_scale + bias, or where the output has a scale its codes.

    sums       as n broadcast, its features
    row_scale  (features,), one, or None
    FACTOR     a power of two that is still missing in the sums

    Codes have all scales in one factor a feature, and are off where that crosses a tie; with scales that are
    powers of two they are exact.
    """
    y = sums.to(tl.float32)
    if out_scale is None:
        if row_scale is not None:
            y = y * _of_row(row_scale, n, valid, ONE_ROW_SCALE)
        if x_scale is not None:
            y = y * (tl.load(x_scale) * FACTOR)
        elif FACTOR != 1.0:
            y = y * FACTOR
        if bias is not None:
            y = y + tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
    else:
        inverse = tl.div_rn(1.0, _of_row(out_scale, n, valid, not CHANNEL_OUT_SCALE))
        factor = inverse * FACTOR
        if x_scale is not None:
            factor *= tl.load(x_scale)
        if row_scale is not None:
            factor *= _of_row(row_scale, n, valid, ONE_ROW_SCALE)
        y = y * factor
        if bias is not None:
            y = y + tl.load(bias + n, mask=valid, other=0.0).to(tl.float32) * inverse
        y = round_code(y)  # one return: the compiler reads what follows a return, too
    return y


@triton.jit
def _of_row(scale, n, valid, ONE: tl.constexpr):
    """float32 scales of features n; the only one where there is ONE."""
    return tl.load(scale + (n * 0 if ONE else n), mask=valid, other=1.0).to(tl.float32)


@triton.jit
def _summed(a, b, total, FLOAT: tl.constexpr):
    """total plus the products of all planes: a (features, k), b (tokens, k), of three dimensions behind the
    slices."""
    for p in tl.static_range(len(a)):
        right = tl.permute(b[p], (0, 2, 1)) if len(b[p].shape) == 3 else tl.trans(b[p])
        if FLOAT:
            total = tl.dot(a[p], right, total, out_dtype=tl.float32)
        else:
            total = tl.dot(a[p], right, total, out_dtype=tl.int32)
    return total


@triton.jit
def _as_float(sums):
    """Exact float32 of sums of one step; those of int8 codes by two additions, not by a slow conversion."""
    if sums.dtype == tl.int32:
        value = (sums + _FLOAT_BITS).to(tl.float32, bitcast=True) - 12582912.0
    else:
        value = sums
    return value


@triton.jit
def _elements(w, x, FLOAT: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, PLANAR: tl.constexpr):
    """The pointers, to elements of PLANES codes."""
    if FLOAT:
        w = w.to(tl.pointer_type(tl.int16), bitcast=True)
        x = x.to(tl.pointer_type(tl.int64 if PLANES == 4 else tl.int32), bitcast=True)
    elif PLANES == 2 and not PLANAR:
        x = x.to(tl.pointer_type(tl.int16), bitcast=True)
    return w, x


@triton.jit
def _tiles(
    x, w, group_scale, row_scale, x_scale, bias, out_scale, out, out_stride, tokens, features, steps,
    X_PITCH: tl.constexpr, INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ONE_ROW_SCALE: tl.constexpr, CHANNEL_OUT_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, FLOAT: tl.constexpr, PLANES: tl.constexpr, PLANAR: tl.constexpr,
    FEATURES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SPLIT: tl.constexpr, ORDER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of out, or with SPLIT its sums over ``steps`` steps. A step is BLOCK elements of a group.

    X_PITCH  elements from a row of x to the next
    PLANAR   x holds the even inputs of a row, then the odd ones
    """
    let_next_start(EARLY)
    PITCH: tl.constexpr = INPUTS // PLANES
    GROUP: tl.constexpr = PITCH // GROUPS
    WHOLE: tl.constexpr = GROUP % BLOCK == 0  # no step is shorter than a block
    GROUPED: tl.constexpr = group_scale is not None and not TWO_LEVEL
    # Features change fastest inside ORDER tiles of them, then tokens: tiles at work share what they read.
    across, down = tl.cdiv(features, FEATURES), tl.cdiv(tokens, TOKENS)
    first_tile = tl.program_id(0) // (ORDER * down) * ORDER
    wide = tl.minimum(across - first_tile, ORDER)
    inner = tl.program_id(0) % (ORDER * down)
    n0, m0 = (first_tile + inner % wide) * FEATURES, inner // wide * TOKENS
    n, m = tl.arange(0, FEATURES), tl.arange(0, TOKENS)
    in_n, in_m = n < features - n0, m < tokens - m0
    # Rows beyond the edge read the last one: loads of whole blocks need no masks.
    n_read, m_read = tl.minimum(n, features - n0 - 1), tl.minimum(m, tokens - m0 - 1)
    k = tl.arange(0, BLOCK)
    w, x = _elements(w, x, FLOAT, BITS, PLANES, PLANAR)
    w_at = w + n0.to(tl.int64) * PITCH + (n_read[:, None] * PITCH + k[None, :])
    x_at = x + m0.to(tl.int64) * X_PITCH + (m_read[:, None] * X_PITCH + k[None, :])
    total = tl.zeros([FEATURES, TOKENS], tl.float32 if FLOAT or GROUPED else tl.int32)
    start = tl.program_id(1) * steps
    stop = tl.minimum(start + steps, GROUPS * PARTS)
    wait_for_inputs(EARLY)  # weights, too, may have been made just before
    scale_at = group_scale
    if group_scale is not None:
        scale_at = group_scale + (n0.to(tl.int64) * GROUPS + n_read * GROUPS)
        following = tl.load(scale_at + start // PARTS)
    for s in range(start, stop):
        if WHOLE:
            at = s * BLOCK
            word, x_word = tl.load(w_at + at), tl.load(x_at + at)
        else:
            at = s // PARTS * GROUP + s % PARTS * BLOCK
            inside = (k < GROUP - s % PARTS * BLOCK)[None, :]
            word, x_word = tl.load(w_at + at, inside, other=0), tl.load(x_at + at, inside, other=0)
        level = word
        if group_scale is not None:  # the scale of the next step is under way while this one is multiplied
            scale = following
            following = tl.load(scale_at + tl.minimum((s + 1) // PARTS, GROUPS - 1))
            if TWO_LEVEL:
                level = scale[:, None].broadcast_to(FEATURES, BLOCK)
        a = weight_planes(word, level, BITS, FLOAT, TWO_LEVEL)
        if PLANAR:
            if WHOLE:
                b = (x_word, tl.load(x_at + PITCH + at))
            else:
                b = (x_word, tl.load(x_at + PITCH + at, inside, other=0))
        else:
            b = x_planes(x_word, FLOAT, PLANES)
        if GROUPED:
            sums = _summed(a, b, tl.zeros([FEATURES, TOKENS], tl.float32 if FLOAT else tl.int32), FLOAT)
            total += _as_float(sums) * scale.to(tl.float32)[:, None]
        else:
            total = _summed(a, b, total, FLOAT)
    out += tl.program_id(1).to(tl.int64) * tokens * features + (m0.to(tl.int64) * out_stride + n0)
    if not SPLIT:
        total = finish(
            total, (n0 + n)[:, None], in_n[:, None], row_scale, x_scale, bias, out_scale,
            ONE_ROW_SCALE, CHANNEL_OUT_SCALE, FACTOR,
        )  # fmt: skip
    total = tl.trans(total.to(out.dtype.element_ty))
    tl.store(out + (m[:, None] * out_stride + n[None, :]), total, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _slices(
    x, w, group_scale, row_scale, x_scale, bias, out_scale, out, out_stride, tokens, features, steps,
    X_PITCH: tl.constexpr, INPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    TWO_LEVEL: tl.constexpr, ONE_ROW_SCALE: tl.constexpr, CHANNEL_OUT_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, FLOAT: tl.constexpr, PLANES: tl.constexpr, FEATURES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """As ``_tiles``, each step a batch of SLICES steps, which warps multiply side by side."""
    let_next_start(EARLY)
    PITCH: tl.constexpr = INPUTS // PLANES
    GROUP: tl.constexpr = PITCH // GROUPS
    WHOLE: tl.constexpr = GROUP % BLOCK == 0 and GROUPS * PARTS % SLICES == 0
    GROUPED: tl.constexpr = group_scale is not None and not TWO_LEVEL
    down = tl.cdiv(tokens, TOKENS)
    n0, m0 = tl.program_id(0) // down * FEATURES, tl.program_id(0) % down * TOKENS
    n, m, k, i = tl.arange(0, FEATURES), tl.arange(0, TOKENS), tl.arange(0, BLOCK), tl.arange(0, SLICES)
    in_n, in_m = n < features - n0, m < tokens - m0
    n_read, m_read = tl.minimum(n, features - n0 - 1), tl.minimum(m, tokens - m0 - 1)
    w, x = _elements(w, x, FLOAT, BITS, PLANES, False)
    w_at = w + n0.to(tl.int64) * PITCH + (n_read[None, :, None] * PITCH + k[None, None, :])
    x_at = x + m0.to(tl.int64) * X_PITCH + (m_read[None, :, None] * X_PITCH + k[None, None, :])
    total = tl.zeros([SLICES, FEATURES, TOKENS], tl.float32 if FLOAT or GROUPED else tl.int32)
    wait_for_inputs(EARLY)  # weights, too, may have been made just before
    scale_at = group_scale
    if group_scale is not None:
        scale_at = group_scale + (n0.to(tl.int64) * GROUPS + n_read[None, :] * GROUPS)
        following = tl.load(scale_at + tl.minimum(i // PARTS, GROUPS - 1)[:, None])
    for first in range(0, steps, SLICES):
        s = first + i
        if WHOLE:
            at = (s * BLOCK)[:, None, None]
            word, x_word = tl.load(w_at + at), tl.load(x_at + at)
        else:
            at = (s // PARTS * GROUP + s % PARTS * BLOCK)[:, None, None]
            inside = (s < steps)[:, None, None] & (
                k[None, None, :] < (GROUP - s % PARTS * BLOCK)[:, None, None]
            )
            word, x_word = tl.load(w_at + at, inside, other=0), tl.load(x_at + at, inside, other=0)
        level = word
        if group_scale is not None:
            scale = following
            following = tl.load(scale_at + tl.minimum((s + SLICES) // PARTS, GROUPS - 1)[:, None])
            if TWO_LEVEL:
                level = scale[:, :, None].broadcast_to(SLICES, FEATURES, BLOCK)
        a = weight_planes(word, level, BITS, FLOAT, TWO_LEVEL)
        b = x_planes(x_word, FLOAT, PLANES)
        if GROUPED:
            sums = tl.zeros([SLICES, FEATURES, TOKENS], tl.float32 if FLOAT else tl.int32)
            total += _as_float(_summed(a, b, sums, FLOAT)) * scale.to(tl.float32)[:, :, None]
        else:
            total = _summed(a, b, total, FLOAT)
    y = finish(
        tl.sum(total, axis=0), (n0 + n)[:, None], in_n[:, None], row_scale, x_scale, bias, out_scale,
        ONE_ROW_SCALE, CHANNEL_OUT_SCALE, FACTOR,
    )  # fmt: skip
    y = tl.trans(y.to(out.dtype.element_ty))
    out += m0.to(tl.int64) * out_stride + n0
    tl.store(out + (m[:, None] * out_stride + n[None, :]), y, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def _add_splits(
    sums, row_scale, out, out_stride, x_scale, bias, out_scale, tokens, features,
    ONE_ROW_SCALE: tl.constexpr, CHANNEL_OUT_SCALE: tl.constexpr, FACTOR: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out from sums [SPLITS, tokens, features], added in their order."""
    let_next_start(EARLY)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    valid = n < features
    wait_for_inputs(EARLY)
    at = sums + m * features + n
    total = tl.load(at, mask=valid, other=0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(at + (m * 0 + tokens) * features * s, mask=valid, other=0)
    y = finish(total, n, valid, row_scale, x_scale, bias, out_scale, ONE_ROW_SCALE, CHANNEL_OUT_SCALE, FACTOR)
    tl.store(out + m * out_stride + n, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _split_pairs(
    x, out, count, PITCH: tl.constexpr, ROW: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """PITCH, ROW, HALF: pairs from a row to the next, of a row, of a step."""
    let_next_start(EARLY)
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pairs = x.to(tl.pointer_type(tl.int16), bitcast=True)
    wait_for_inputs(EARLY)
    pair = tl.load(pairs + (j if PITCH == ROW else j // ROW * PITCH + j % ROW), mask=j < count, other=0)
    even, odd = x_planes(pair, False, 2)
    at = out + j // HALF * (2 * HALF) + j % HALF
    tl.store(at, even, mask=j < count)
    tl.store(at + HALF, odd, mask=j < count)
