"""The Hadamard rotation of the last dimension, alone, with quantization, and after the gated norm.

A row of n = slow * fast elements is a matrix X [slow, fast], fast a power of two, and the rotation is
M X S / sqrt(n), M [slow, slow] of +-1. The columns of a few rows of M X are summed while X is read (from the
caches, all times but the first); the products with S are butterflies in registers, where Triton changes the
layout every few bits. M is M_m of ``formats.hadamard`` or its Kronecker product with a Sylvester matrix: with
one or few rows the larger M spreads a row over more SMs.
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
from quamba.kernels.triton.norm import check_groups, check_one_scale, gate_and_norm
from quamba.kernels.triton.quantize import as_rows, check_dtype, check_last_stride, check_scale, to_codes

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
) -> None:
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
    )
    return y


@triton.jit
def _gated_kernel(
    y: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    weight: tl.tensor,
    signs: tl.tensor,
    normed: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    y_stride: tl.tensor,
    z_stride: tl.tensor,
    eps: tl.tensor,
    norm: tl.tensor,
    Z_SCALES: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SLOW: tl.constexpr,
    SLOW_PADDED: tl.constexpr,
    SLOW_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (SLOW + SLOW_BLOCK - 1) // SLOW_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    first = (program % blocks).to(tl.int32) * SLOW_BLOCK
    slow = first + tl.arange(0, SLOW_BLOCK)
    y += row * y_stride
    z += row * z_stride
    offset = tl.arange(0, GROUP_BLOCK)[None, :]
    present = offset < GROUP_SIZE
    if SLOW == 1:  # then groups and their sizes are powers of two
        column = (tl.arange(0, GROUPS) * GROUP_SIZE)[:, None] + offset
        v = gate_and_norm(
            y + column,
            z + column,
            z_scale,
            weight,
            column,
            present,
            present,
            GROUP_SIZE,
            eps,
            Z_SCALES,
            NORM_FIRST,
        )
        v = tl.reshape(v, [1, 2**BITS])
    else:
        # Each program of a row writes the whole of it: the same numbers, read after its own barrier.
        normed += row * (SLOW * 2**BITS)
        for group in range(GROUPS):
            column = group * GROUP_SIZE + offset
            v = gate_and_norm(
                y + column,
                z + column,
                z_scale,
                weight,
                column,
                present,
                present,
                GROUP_SIZE,
                eps,
                Z_SCALES,
                NORM_FIRST,
            )
            tl.store(normed + column, v, mask=present)
        tl.debug_barrier()
        v = _rotate_slow(normed, signs, first, SLOW, SLOW_PADDED, SLOW_BLOCK, BITS)
    v = butterflies(v, SLOW_BLOCK, BITS) * norm
    place = row * (SLOW * 2**BITS) + slow[:, None] * (2**BITS) + tl.arange(0, 2**BITS)[None, :]
    _store(v, out + place, out_scale, (slow < SLOW)[:, None], HALF_AWAY, WRAP)


def gated_norm_hadamard_quantize(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    out_scale: Tensor,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> Tensor:
    """``quantize(hadamard(gated_rms_norm(y, z, weight)), out_scale)`` in one launch, float32 in between.

    y         (..., C) float, C up to 16384
    z         (..., C) float, or int8 with a scale () or (C,)
    returns   (..., C) int8 codes of out_scale (); meant for the few rows of decoding, any number is right
    """
    _check_input(y)
    check_one_scale(out_scale)
    n = y.shape[-1]
    if n > 1 << _MAX_FAST_BITS:
        raise ValueError(f"y has {n} channels, expected at most {1 << _MAX_FAST_BITS}.")
    check_groups(n, group_size)
    out = torch.empty(y.shape, dtype=torch.int8, device=y.device)
    if y.numel() == 0:
        hadamard_factors(n)
        return out
    flat = as_rows("y", y)
    gate, z_scale = (z.codes, z.scale) if isinstance(z, Quantized) else (z, None)
    gate = as_rows("z", gate)
    if weight is not None:
        check_dtype("weight", weight)
        check_last_stride("weight", weight)
    split = split_for(flat.shape[0], n)
    normed = None if split.slow == 1 else torch.empty(flat.shape, dtype=torch.float32, device=y.device)
    group_block = triton.next_power_of_2(group_size)
    _gated_kernel[(flat.shape[0] * triton.cdiv(split.slow, split.slow_block),)](
        flat,
        gate,
        z_scale,
        weight,
        _signs(n, split.slow, False, y.device),
        normed,
        out,
        out_scale,
        flat.stride(0),
        gate.stride(0),
        eps,
        n**-0.5,
        Z_SCALES=z_scale is not None and check_scale("the scale of z", z_scale, n),
        NORM_FIRST=norm_before_gate,
        GROUPS=n // group_size,
        GROUP_SIZE=group_size,
        GROUP_BLOCK=group_block,
        SLOW=split.slow,
        SLOW_PADDED=triton.next_power_of_2(split.slow),
        SLOW_BLOCK=split.slow_block,
        BITS=split.fast_bits,
        HALF_AWAY=rounding == "half_away",
        WRAP=overflow == "wrap",
        num_warps=max(split.num_warps, min(16, group_block // 256)),
    )
    return out


def _check_input(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"hadamard takes a float tensor, got {x.dtype}.")
    check_dtype("x", x)
