"""The Hadamard rotation on matrix units, alone or behind the gated norm, with or without quantization.

A row of n = slow * 128 channels is a matrix X [slow, 128] and its rotation M X S / sqrt(n), M [slow, slow] of
+-1, S = S_128. A program turns the matrices of a few rows, transposed and side by side, X^T [128, slots].
As S_128 = [[S_64, S_64], [S_64, -S_64]], the products with S_64 of both halves of X^T give, as sum and
difference, both halves of S X^T; each is then multiplied by M^T of every row at once, a matrix with M^T on
its diagonal.

Operands are float16. Products with +-1 are exact and sums are float32, so nothing is lost where X is float16.
What lies between the two products, and an X of other types, goes in as two float16, which keep 22 bits of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.hadamard import hadamard_factors, paley_matrix, sylvester_matrix
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.launches import launch_choice
from quamba.kernels.triton.norm import read_gate
from quamba.kernels.triton.recurrence import PROCESSORS

#: Channels that are neighbours in a column of X^T; groups of the norm are whole columns.
COLUMN = 128
_HALF = tl.constexpr(COLUMN // 2)
_MOST_SLOTS = 64
#: What S is multiplied by, so that no sum of float16 is too large for one.
_SHRINK = 1 / COLUMN
_LOW_UNIT = tl.constexpr(2048.0)  # The low one of two float16 is in units of 1 / 2048.


@dataclass(frozen=True)
class Tiles:
    """How rows are cut into programs.

    slots          columns of X^T in a tile, a power of two
    rows           of the tensor in a tile: rows * slow <= slots
    parts          programs a tile: 2 for one half of S X^T each
    programs       each walks over tiles
    num_stages     tiles that are loaded ahead, and one
    at_once        a program has one tile, and registers to ask at once for all it reads
    max_registers  of a thread
    """

    slots: int
    rows: int
    parts: int
    programs: int
    num_warps: int
    num_stages: int
    at_once: bool
    max_registers: int


@launch_choice("hadamard.tiles")
def tiles_for(rows: int, n: int, gated: bool = False) -> Tiles | None:
    """Few tiles: a program or two each. Many: two programs for each SM, which load ahead, or four where the
    gate, too, wants registers. None if n does not fit."""
    slow = n // COLUMN
    if rows == 0 or n % COLUMN or slow > _MOST_SLOTS:
        return None
    m, _ = hadamard_factors(n)
    if slow % m:
        return None
    slots, most = max(16, triton.next_power_of_2(slow)), 4 * PROCESSORS
    while slots < _MOST_SLOTS and triton.cdiv(rows, slots // slow) > most:
        slots *= 2
    tiles = triton.cdiv(rows, slots // slow)
    parts = 2 if 2 * tiles <= PROCESSORS else 1
    few = tiles * parts <= 2 * PROCESSORS
    if few:
        return Tiles(slots, slots // slow, parts, tiles * parts, 4, 1, True, 255)
    if gated:
        return Tiles(slots, slots // slow, 1, min(tiles, most), 4, 1, False, 128)
    return Tiles(slots, slots // slow, 1, min(tiles, 2 * PROCESSORS), 4, 3, False, 168)


@functools.lru_cache(maxsize=64)
def _matrices(n: int, tiles: Tiles, transpose: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """S_64, smaller by _SHRINK, and the matrix [slots, slots] of M^T; float16."""
    m, _ = hadamard_factors(n)
    slow = n // COLUMN
    with torch.inference_mode(False):
        matrix = torch.kron(paley_matrix(m), sylvester_matrix((slow // m).bit_length() - 1))
        blocks = torch.kron(torch.eye(tiles.rows), (matrix if transpose else matrix.T).contiguous())
        mixing = torch.zeros(tiles.slots, tiles.slots)
        mixing[: len(blocks), : len(blocks)] = blocks
        sylvester = sylvester_matrix(_HALF.value.bit_length() - 1) * _SHRINK
        return sylvester.to(device, torch.float16), mixing.to(device, torch.float16)


@triton.jit
def _two_halves(v: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """v = high + low / _LOW_UNIT, float16."""
    high = v.to(tl.float16)
    return high, ((v - high.to(tl.float32)) * _LOW_UNIT).to(tl.float16)


@triton.jit
def _add_alike(v: tl.tensor, kind: tl.tensor) -> tl.tensor:
    """For each slot the sum over all slots of its kind."""
    alike = kind[:, None] == kind[None, :]
    return tl.sum(tl.where(alike, v[:, None], 0.0), axis=0)


@triton.jit
def _largest_alike(v: tl.tensor, kind: tl.tensor) -> tl.tensor:
    alike = kind[:, None] == kind[None, :]
    return tl.max(tl.where(alike, v[:, None], 0.0), axis=0)


@triton.jit
def _read_gated(
    x: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    channel: tl.tensor,
    present: tl.tensor,
    inside: tl.tensor,
    Z_SCALES: tl.constexpr,
    NORM_FIRST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What is normalised, and the gate."""
    v = tl.load(x, mask=inside, other=0).to(tl.float32)
    gate = read_gate(z, z_scale, channel, present, inside, Z_SCALES)
    if not NORM_FIRST:
        v *= gate
    return v, gate


@triton.jit
def _weights(
    weight: tl.tensor, channel: tl.tensor, present: tl.tensor, other: tl.tensor, HAVE: tl.constexpr
) -> tl.tensor:
    """Those of the norm for each element; ``other`` where there are none or they are not to be had now."""
    w = other
    if weight is not None and HAVE:
        w = tl.load(weight + channel, mask=present, other=0).to(tl.float32)
    return w


@triton.jit
def _to_float16_range(v: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A power of two that takes numbers of absolute value v or less below 2^15, and its inverse."""
    exponent = v.to(tl.int32, bitcast=True) >> 23
    field = tl.minimum(268 - exponent, 253)
    return (field << 23).to(tl.float32, bitcast=True), ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _columns(v: tl.tensor, sylvester: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """S v / 128, float32."""
    if WIDE:
        high, low = _two_halves(v)
        product = tl.dot(sylvester, high, tl.dot((sylvester * (1.0 / _LOW_UNIT)).to(tl.float16), low))
    else:
        product = tl.dot(sylvester, v.to(tl.float16))
    return product


@triton.jit
def _codes(v: tl.tensor, factor: tl.tensor, WRAP: tl.constexpr) -> tl.tensor:
    """int8 of v * factor as ``to_codes`` gives it, half to even; two instructions where that has ten.

    Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    """
    if WRAP:
        value = tl.minimum(tl.maximum(v * factor, -2147483648.0), 2147483648.0)
        whole = (value * (1.0 / 256) + 12582912.0) - 12582912.0
        codes = (value - whole * 256.0 + 12582912.0).to(tl.int32, bitcast=True)
        codes = tl.where(value == 2147483648.0, -1, codes).to(tl.int8)
    else:
        value = tl.minimum(tl.maximum(v * factor + 12582912.0, 12582784.0), 12583039.0)
        codes = value.to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def _mix_and_store(
    v: tl.tensor,
    mixing: tl.tensor,
    low_mixing: tl.tensor,
    factor: tl.tensor,
    out: tl.tensor,
    inside: tl.tensor,
    CODES: tl.constexpr,
    WRAP: tl.constexpr,
) -> None:
    """v times the matrix times factor, as codes or floats."""
    high, low = _two_halves(v)
    v = tl.dot(high, mixing, tl.dot(low, low_mixing))
    if CODES:
        value = _codes(v, factor, WRAP)
    else:
        value = (v * factor).to(out.dtype.element_ty)
    tl.store(out, value, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _tile_kernel(
    x: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    weight: tl.tensor,
    sylvester: tl.tensor,
    mixing: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    rows: tl.tensor,
    steps: tl.tensor,
    x_stride: tl.tensor,
    z_stride: tl.tensor,
    eps: tl.tensor,
    norm: tl.tensor,
    Z_SCALES: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    SLOW: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDE: tl.constexpr,
    HALF_AWAY: tl.constexpr,
    WRAP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """z None: no gated norm. GROUP: columns of its groups. AT_ONCE: one step, without a loop."""
    let_next_start(EARLY)
    half: tl.constexpr = _HALF
    fast = tl.arange(0, half)[:, None]
    slots = tl.arange(0, SLOTS)
    slot = slots[None, :]
    sylvester = tl.load(sylvester + fast * half + tl.arange(0, half)[None, :])
    mixing = tl.load(mixing + slots[:, None] * SLOTS + slot)
    low_mixing = (mixing * (1.0 / _LOW_UNIT)).to(tl.float16)
    channel = slot % SLOW * (2 * half) + fast
    present = slot < ROWS * SLOW
    if out_scale is not None:
        # A division an element would cost as much as the rotation; the sums are not exact to the last bit.
        norm *= tl.div_rn(1.0, tl.load(out_scale).to(tl.float32))
        if HALF_AWAY:  # a hair more, and what rounds half to even rounds ties away from zero
            norm *= 1.0000002384185791
    part = tl.program_id(0) % PARTS
    first = (tl.program_id(0) // PARTS * ROWS + slot // SLOW).to(tl.int64)
    wait_for_inputs(EARLY)
    for step in tl.range(1 if AT_ONCE else steps, num_stages=STAGES):
        row = first + step * (tl.num_programs(0) // PARTS * ROWS)
        inside = present & (row < rows)
        upper = x + (row * x_stride + channel)
        factor = norm
        if z is None:
            a = tl.load(upper, mask=inside, other=0)
            b = tl.load(upper + half, mask=inside, other=0)
        else:
            gate = z + (row * z_stride + channel)
            a, gate_a = _read_gated(upper, gate, z_scale, channel, present, inside, Z_SCALES, NORM_FIRST)
            b, gate_b = _read_gated(
                upper + half, gate + half, z_scale, channel + half, present, inside, Z_SCALES, NORM_FIRST
            )
            weight_a = _weights(weight, channel, present, a, AT_ONCE)
            weight_b = _weights(weight, channel + half, present, b, AT_ONCE)
            power = tl.sum(a * a + b * b, axis=0)
            if ROWS * SLOW == GROUP:
                power = tl.sum(power, axis=0)
            else:
                power = _add_alike(power, slots // GROUP)[None, :]
            inverse = tl.div_rn(1.0, tl.sqrt_rn(power / (GROUP * 2 * half) + eps))
            a *= inverse
            b *= inverse
            if weight is not None:
                a *= _weights(weight, channel, present, weight_a, not AT_ONCE)
                b *= _weights(weight, channel + half, present, weight_b, not AT_ONCE)
            if NORM_FIRST:
                a *= gate_a
                b *= gate_b
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0)
            if ROWS == 1:
                scale, unit = _to_float16_range(tl.max(largest, axis=0))
            else:
                scale, unit = _to_float16_range(_largest_alike(largest, slots // SLOW)[None, :])
            a *= scale
            b *= scale
            factor = norm * unit
        a = _columns(a, sylvester, WIDE)
        b = _columns(b, sylvester, WIDE)
        to = out + (row * (SLOW * 2 * half) + channel)
        if PARTS == 1:
            _mix_and_store(a + b, mixing, low_mixing, factor, to, inside, out_scale is not None, WRAP)
            _mix_and_store(a - b, mixing, low_mixing, factor, to + half, inside, out_scale is not None, WRAP)
        else:
            v = a + b * (1 - 2 * part).to(tl.float32)
            to += part * half
            _mix_and_store(v, mixing, low_mixing, factor, to, inside, out_scale is not None, WRAP)


def rotate_tiles(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    tiles: Tiles,
    *,
    transpose: bool = False,
    half_away: bool = False,
    wrap: bool = False,
    gate: Tensor | None = None,
    z_scale: Tensor | None = None,
    weight: Tensor | None = None,
    group_size: int = COLUMN,
    norm_first: bool = False,
    eps: float = 0.0,
    narrow: bool = False,
) -> Tensor:
    """The rotation of x (rows, n) into out, codes of out_scale () or floats.

    gate    (rows, n), with z_scale None, () or (n,): x goes through the gated norm first
    narrow  what is rotated may be rounded to float16, as x is or the result of the norm should be
    """
    rows, n = x.shape
    sylvester, mixing = _matrices(n, tiles, transpose, x.device)
    _tile_kernel[(tiles.programs,)](
        x,
        gate,
        z_scale,
        weight,
        sylvester,
        mixing,
        out,
        out_scale,
        rows,
        triton.cdiv(triton.cdiv(rows, tiles.rows) * tiles.parts, tiles.programs),
        x.stride(0),
        0 if gate is None else gate.stride(0),
        eps,
        n**-0.5 / _SHRINK,
        Z_SCALES=z_scale is not None and z_scale.numel() > 1,
        NORM_FIRST=norm_first,
        GROUP=group_size // COLUMN,
        SLOW=n // COLUMN,
        SLOTS=tiles.slots,
        ROWS=tiles.rows,
        PARTS=tiles.parts,
        STAGES=tiles.num_stages,
        AT_ONCE=tiles.at_once,
        WIDE=not narrow,
        HALF_AWAY=half_away,
        WRAP=wrap,
        num_warps=tiles.num_warps,
        maxnreg=tiles.max_registers,
        **dependent_launch(x.device),
    )
    return out
