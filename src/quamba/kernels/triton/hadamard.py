"""The Hadamard rotation of the last dimension, alone, with quantization, and after the gated norm.

Rows of the usual lengths go to matrix units (``rotate_tiles.py``). Other lengths, and rows so few that
tiles would leave most SMs idle, go to the kernel here. A row of n = slow * fast elements is a matrix X
[slow, fast], fast a power of two, and the rotation is M X S / sqrt(n), M [slow, slow] of +-1. The columns of
a few rows of M X are summed while X is read (from the caches, all times but the first); the products with S
are butterflies in registers, where Triton changes the layout every few bits. M is M_m of
``formats.hadamard`` or its Kronecker product with a Sylvester matrix: with one or few rows the larger M
spreads a row over more SMs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Overflow, Quantized, Rounding
from quamba.formats.hadamard import hadamard_factors, paley_matrix, sylvester_matrix
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.norm import check_groups, check_one_scale, gated_rms_norm
from quamba.kernels.triton.quantize import as_rows, check_dtype, check_last_stride, check_scale, to_codes
from quamba.kernels.triton.rotate_tiles import COLUMN, rotate_tiles, tiles_for

_ROWS_FOR_TILES = 5
_FEW_PROGRAMS = 256  # About two for each SM: below, it pays to read a row from several SMs.
_MAX_FAST_BITS = 14  # 2^14 floats are 32 registers in each of 512 threads.
_MAX_TILE = 1 << 15


@dataclass(frozen=True)
class Split:
    """How rows are cut into programs.

    slow, fast_bits  n = slow * 2^fast_bits
    slow_block       rows of M X that one program makes: 1, 2, 4 or 8
    rows             rows of the tensor in one program; above 1 only where slow is 1
    """

    slow: int
    fast_bits: int
    slow_block: int
    rows: int
    num_warps: int


@launch_choice("hadamard.split")
def split_for(rows: int, n: int) -> Split:
    """One program a row (or, with an M_m, one for 8 rows of M X), or many programs a row if rows are few."""
    m, bits = hadamard_factors(n)
    spare = max(0, bits - _MAX_FAST_BITS)
    few = max(spare, min(4, bits - 7)) if m == 1 else spare
    slow, fast_bits = m << few, bits - few
    tile = triton.next_power_of_2(slow) << fast_bits
    if slow > 1 and n >= 512 and tile <= _MAX_TILE and rows * slow <= _FEW_PROGRAMS:
        return Split(slow, fast_bits, 1, 1, max(1, min(16, tile // 512)))
    slow, fast_bits = m << spare, bits - spare
    if slow == 1:
        together = max(1, min(2048 >> bits, triton.next_power_of_2(triton.cdiv(rows, 512))))
        return Split(1, bits, 1, together, max(1, min(16, (together << bits) // 256)))
    block = max(2, min(8, _MAX_TILE >> fast_bits))
    return Split(slow, fast_bits, block, 1, max(1, min(16, (block << fast_bits) // 1024)))


@functools.lru_cache(maxsize=64)
def _signs(n: int, slow: int, transpose: bool, device: torch.device) -> Tensor | None:
    """M^T on the device, float32 [slow, slow and zeros up to a multiple of 8]; None for [[1]]."""
    if slow == 1:
        return None
    m, _ = hadamard_factors(n)
    with torch.inference_mode(False):
        matrix = torch.kron(paley_matrix(m), sylvester_matrix((slow // m).bit_length() - 1))
        matrix = matrix if transpose else matrix.T
        padded = torch.zeros(slow, (slow + 7) // 8 * 8)
        padded[:, :slow] = matrix
        return padded.to(device)


@triton.jit
def butterflies(v: tl.tensor, ROWS: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """v [ROWS, 2^BITS] times S.

    Each pass adds and subtracts neighbours and puts the sums before the differences. The index bit that was
    the lowest becomes the highest, so that all passes are alike and the last restores the order.
    """
    for _ in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(v, [ROWS, 2 ** (BITS - 1), 2]))
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, 2**BITS])
    return v


@triton.jit
def _rotate_slow(
    x: tl.tensor,
    signs: tl.tensor,
    first: tl.tensor,
    SLOW: tl.constexpr,
    SLOW_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Rows first, ..., first + BLOCK - 1 of M X, X [SLOW, 2^BITS] at x; signs as ``_signs`` makes them."""
    fast = tl.arange(0, 2**BITS)
    width: tl.constexpr = (SLOW + 7) // 8 * 8
    if BLOCK == 1:  # the whole row is asked for at once: what counts is to wait for memory once
        j = tl.arange(0, SLOW_PADDED)
        value = tl.load(x + j[:, None] * (2**BITS) + fast[None, :], mask=(j < SLOW)[:, None], other=0)
        sign = tl.load(signs + j * width + first, mask=j < SLOW, other=0)
        total = tl.sum(value.to(tl.float32) * sign[:, None], axis=0)[None, :]
    else:
        total = tl.zeros([BLOCK, 2**BITS], tl.float32)
        for j in tl.range(0, SLOW, loop_unroll_factor=4):
            value = tl.load(x + j * (2**BITS) + fast).to(tl.float32)
            sign = tl.load(signs + j * width + first + tl.arange(0, BLOCK))
            total += sign[:, None] * value[None, :]
    return total


@triton.jit
def _store(
    v: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    inside: tl.tensor,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
) -> None:
    """Codes of out_scale, or floats."""
    if out_scale is not None:
        # A division an element would cost as much as the rotation; the sums are not exact to the last bit.
        inverse = tl.div_rn(1.0, tl.load(out_scale).to(tl.float32))
        tl.store(y, to_codes(v * inverse, HALF_AWAY, WRAP), mask=inside)
    else:
        tl.store(y, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _hadamard_kernel(
    x: tl.tensor,
    signs: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    norm: tl.tensor,
    SLOW: tl.constexpr,
    SLOW_PADDED: tl.constexpr,
    SLOW_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    let_next_start(EARLY)
    wait_for_inputs(EARLY)
    program = tl.program_id(0).to(tl.int64)
    fast = tl.arange(0, 2**BITS)[None, :]
    if SLOW == 1:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None]
        inside = row < rows
        v = tl.load(x + row * x_stride + fast, mask=inside, other=0).to(tl.float32)
        v = butterflies(v, ROWS, BITS)
        place = row * (2**BITS) + fast
    else:
        blocks: tl.constexpr = (SLOW + SLOW_BLOCK - 1) // SLOW_BLOCK
        row = program // blocks
        first = (program % blocks).to(tl.int32) * SLOW_BLOCK
        slow = first + tl.arange(0, SLOW_BLOCK)
        inside = (slow < SLOW)[:, None]
        v = _rotate_slow(x + row * x_stride, signs, first, SLOW, SLOW_PADDED, SLOW_BLOCK, BITS)
        v = butterflies(v, SLOW_BLOCK, BITS)
        place = row * (SLOW * 2**BITS) + slow[:, None] * (2**BITS) + fast
    _store(v * norm, y + place, out_scale, inside, HALF_AWAY, WRAP)


def hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """``reference.hadamard.hadamard`` of float16, bfloat16 or float32; sums in float32."""
    _check_input(x)
    return _rotate(x, None, torch.empty(x.shape, dtype=x.dtype, device=x.device), transpose, False, False)


def hadamard_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> Tensor:
    """``reference.hadamard.hadamard_quantize`` in one launch, with nothing between the two in memory."""
    _check_input(x)
    check_one_scale(scale)
    y = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return _rotate(x, scale, y, False, rounding == "half_away", overflow == "wrap")


def _rotate(
    x: Tensor, scale: Tensor | None, y: Tensor, transpose: bool, half_away: bool, wrap: bool
) -> Tensor:
    n = x.shape[-1]
    if x.numel() == 0:
        hadamard_factors(n)
        return y
    flat = as_rows("x", x)
    tiles = tiles_for(flat.shape[0], n) if flat.shape[0] >= _ROWS_FOR_TILES else None
    if tiles is not None:
        return rotate_tiles(
            flat,
            y,
            scale,
            tiles,
            transpose=transpose,
            half_away=half_away,
            wrap=wrap,
            narrow=x.dtype == torch.float16,
        )
    split = split_for(flat.shape[0], n)
    programs = triton.cdiv(flat.shape[0], split.rows) * triton.cdiv(split.slow, split.slow_block)
    _hadamard_kernel[(programs,)](
        flat,
        _signs(n, split.slow, transpose, x.device),
        y,
        scale,
        flat.shape[0],
        flat.stride(0),
        n**-0.5,
        SLOW=split.slow,
        SLOW_PADDED=triton.next_power_of_2(split.slow),
        SLOW_BLOCK=split.slow_block,
        BITS=split.fast_bits,
        ROWS=split.rows,
        HALF_AWAY=half_away,
        WRAP=wrap,
        num_warps=split.num_warps,
        **dependent_launch(x.device),
    )
    return y


def gated_norm_hadamard(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> Tensor:
    """``reference.hadamard.gated_norm_hadamard``; one launch where n and group_size are multiples of 128.

    Between the norm and the rotation are float16 for an out_dtype of float16, else float32.
    """
    _check_input(y)
    n = y.shape[-1]
    check_groups(n, group_size)
    flat = as_rows("y", y)
    tiles = tiles_for(flat.shape[0], n, gated=True)
    if tiles is None or group_size % COLUMN:
        normed = gated_rms_norm(
            y,
            z,
            weight,
            eps=eps,
            group_size=group_size,
            norm_before_gate=norm_before_gate,
            out_dtype=out_dtype,
        )
        if out_scale is None:
            return hadamard(normed)
        return hadamard_quantize(normed, out_scale, rounding=rounding, overflow=overflow)
    out = torch.empty(y.shape, dtype=out_dtype if out_scale is None else torch.int8, device=y.device)
    check_dtype("out_dtype", out)
    if out_scale is not None:
        check_one_scale(out_scale)
    gate, z_scale = (z.codes, z.scale) if isinstance(z, Quantized) else (z, None)
    if z_scale is not None:
        check_scale("the scale of z", z_scale, n)
    if weight is not None:
        check_dtype("weight", weight)
        check_last_stride("weight", weight)
    return rotate_tiles(
        flat,
        out,
        out_scale,
        tiles,
        half_away=rounding == "half_away",
        wrap=overflow == "wrap",
        gate=as_rows("z", gate),
        z_scale=z_scale,
        weight=weight,
        group_size=group_size,
        norm_first=norm_before_gate,
        eps=eps,
        narrow=out_dtype == torch.float16,
    )


def _check_input(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"hadamard takes a float tensor, got {x.dtype}.")
    check_dtype("x", x)
