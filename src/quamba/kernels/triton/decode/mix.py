"""Between scan and projection: the factors of the gated norm, the rotation, the quantization."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.hadamard import hadamard_factors, paley_matrix, sylvester_matrix
from quamba.kernels.triton.decode.vectors import Vector, place, wide_codes
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.quantize import to_codes

_LARGEST_BLOCK = 64


@dataclass(frozen=True)
class MixLaunch:
    """Columns of the blocks a program, warps."""

    columns: int
    warps: int


def mix_candidates(batch: int, blocks: int, size: int, rotate: bool, wide: bool) -> list[MixLaunch]:
    """Wide codes have a scale for 32 neighbours; matrix units take 16 columns at least."""
    sizes = (32,) if wide else (16, 32, 64) if rotate else (32, 64)
    counts = (2, 4, 8) if rotate else (1, 2, 4)
    return [MixLaunch(columns, warps) for columns in sizes if size % columns == 0 for warps in counts]


@launch_choice("decode.mix", candidates=mix_candidates)
def mix_launch(batch: int, blocks: int, size: int, rotate: bool, wide: bool) -> MixLaunch:
    if not rotate:
        return MixLaunch(32, 1)
    return MixLaunch(32 if wide else 16, 8 if blocks > 64 else 4)


def block_size(channels: int, ngroups: int = 1) -> int | None:
    """Channels of a block: a row is a matrix X of such rows, rotated on both sides. None: no size fits.

    A group of the norm is whole blocks.
    """
    _, bits = hadamard_factors(channels)
    size = min(_LARGEST_BLOCK, 1 << bits)
    while channels // ngroups % size:
        size //= 2
    return size if size >= 32 and channels // size <= 256 else None


@functools.lru_cache(maxsize=16)
def block_signs(channels: int, size: int, device: torch.device) -> Tensor:
    """M of T_channels = (M (x) S_size) / sqrt(channels), float32, with zeros up to powers of two."""
    m, bits = hadamard_factors(channels)
    matrix = torch.kron(paley_matrix(m), sylvester_matrix(bits - (size.bit_length() - 1)))
    order = len(matrix)
    width = max(16, triton.next_power_of_2(order))
    with torch.inference_mode(False):
        padded = torch.zeros(width, width)
        padded[:order, :order] = matrix
        return padded.to(device)


@triton.jit
def _two_part_dot(signs: tl.tensor, x: tl.tensor, SIGNS_FIRST: tl.constexpr) -> tl.tensor:
    """The product of signs, exact in TF32, with x in two parts, which TF32 holds to 2^-22."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    if SIGNS_FIRST:
        total = tl.dot(signs, x - high, input_precision="tf32")
        total = tl.dot(signs, high, total, input_precision="tf32")
    else:
        total = tl.dot(x - high, signs, input_precision="tf32")
        total = tl.dot(high, signs, total, input_precision="tf32")
    return total


@triton.jit
def _sylvester(i: tl.tensor, j: tl.tensor) -> tl.tensor:
    """float32 (-1)^popcount(i & j), for indices below 256."""
    both = i & j
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(tl.float32)


@triton.jit
def _mix_kernel(
    x: tl.tensor,
    squares: tl.tensor,
    signs: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    wide_scale: tl.tensor,
    eps: tl.tensor,
    norm: tl.tensor,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (columns of the blocks, rows of M, sequence)."""
    let_next_start(EARLY)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    factor = norm
    if out_scale is not None:
        factor = tl.div_rn(norm, tl.load(out_scale).to(tl.float32))
    if signs is not None:
        k, j = tl.arange(0, PADDED), tl.arange(0, SIZE)
        M = tl.load(signs + row[:, None] * PADDED + k[None, :])
        S = _sylvester(j[:, None], column[None, :])
    else:
        k, j = row, column
    wait_for_inputs(EARLY)
    at = x + (b * BLOCKS + k[:, None]) * SIZE + j[None, :]
    value = tl.load(at, mask=(k < BLOCKS)[:, None], other=0)
    if squares is not None:
        each = tl.arange(0, triton.next_power_of_2(PARTS // GROUPS))
        if GROUPS == 1:
            total = tl.sum(tl.load(squares + b * PARTS + each, mask=each < PARTS, other=0), axis=0)
            factor *= tl.rsqrt(total / (BLOCKS * SIZE) + eps)
        else:  # what is next to each other is of one group of the norm
            group = tl.minimum(k // (BLOCKS // GROUPS), GROUPS - 1)
            near = squares + b * PARTS + group[:, None] * (PARTS // GROUPS) + each[None, :]
            total = tl.sum(tl.load(near, mask=(each < PARTS // GROUPS)[None, :], other=0), axis=1)
            value *= tl.rsqrt(total / (BLOCKS * SIZE // GROUPS) + eps)[:, None]
    if signs is not None:
        value = _two_part_dot(M, _two_part_dot(S, value, False), True)
    value *= factor
    CHANNELS: tl.constexpr = BLOCKS * SIZE
    to = b * CHANNELS + place(row[:, None] * SIZE + column[None, :], CHANNELS, SPLIT)
    inside = (row < BLOCKS)[:, None]
    if out_scale is not None:
        tl.store(out + to, to_codes(value, HALF_AWAY, WRAP), mask=inside)
    elif wide_scale is not None:  # one block of wide codes a row
        high, low, scale = wide_codes(value)
        to += b * CHANNELS
        tl.store(out + to, high, mask=inside)
        tl.store(out + CHANNELS + to, low, mask=inside)
        tl.store(wide_scale + ((b * BLOCKS + row) * SIZE) // 32 + tl.program_id(0), scale, mask=row < BLOCKS)
    else:
        tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)


def mix(
    x: Tensor,
    out: Vector,
    *,
    size: int,
    squares: Tensor | None = None,
    eps: float = 0.0,
    ngroups: int = 1,
    rotate: bool = False,
    out_scale: Tensor | None = None,
    half_away: bool = False,
    wrap: bool = False,
) -> None:
    """out[b] = T_C (r x[b]), r the factors of the norm; or its codes.

    x        (B, C) float32
    out      (B, C), codes where there is an out_scale (), else floats or wide codes
    size     channels of a block (``block_size``); else any multiple of 32 that divides C / ngroups
    squares  (B, parts): sums of squares of parts of x; r = 1 / sqrt(mean over a group + eps). None: r = 1
    """
    batch, channels = x.shape
    blocks = channels // size
    launch = mix_launch(batch, blocks, size, rotate, out.wide_scale is not None)
    _mix_kernel[(size // launch.columns, triton.cdiv(blocks, 16), batch)](
        x,
        squares,
        block_signs(channels, size, x.device) if rotate else None,
        out.values,
        out_scale,
        out.wide_scale,
        eps,
        channels**-0.5 if rotate else 1.0,
        BLOCKS=blocks,
        SIZE=size,
        GROUPS=ngroups,
        PARTS=1 if squares is None else squares.shape[1],
        PADDED=max(16, triton.next_power_of_2(blocks)),
        ROWS=16,
        COLUMNS=launch.columns,
        HALF_AWAY=half_away,
        WRAP=wrap,
        SPLIT=out.split,
        num_warps=launch.warps,
        **dependent_launch(x.device),
    )
