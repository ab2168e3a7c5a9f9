"""Residual addition and normalisation, and Mamba2's gated norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.quantize import as_rows, check_dtype, check_scale, to_codes, whole_row_tile

_MAX_COLUMNS = 32768


@triton.jit
def _add_norm_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    new_residual: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    X_SCALES: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    let_next_start(EARLY)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    present = column < columns
    inside = (row < rows) & present
    factor = 1.0
    if weight is not None:
        factor = tl.load(weight + column, mask=present, other=0).to(tl.float32)
    if out_scale is not None:
        # One division, not one an element: each takes longer than all else that is done to it.
        inverse = tl.div_rn(1.0, tl.load(out_scale).to(tl.float32))
    wait_for_inputs(EARLY)
    v = tl.load(x + row * x_stride + column, mask=inside, other=0)
    if x_scale is not None:
        v = v.to(tl.float32)
        if X_SCALES:
            v *= tl.load(x_scale + column, mask=present, other=0).to(tl.float32)
        else:
            v *= tl.load(x_scale).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + row * residual_stride + column, mask=inside, other=0)
        v = (v.to(before.dtype).to(tl.float32) + before.to(tl.float32)).to(before.dtype)
    if new_residual is not None:
        v = v.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row * columns + column, v, mask=inside)
    v = v.to(tl.float32)
    if CENTER:
        mean = tl.sum(v, axis=1) / columns
        v = tl.where(present, v - mean[:, None], 0.0)
    power = tl.sum(v * v, axis=1) / columns + eps
    v *= tl.div_rn(1.0, tl.sqrt_rn(power))[:, None]
    v *= factor
    if bias is not None:
        v += tl.load(bias + column, mask=present, other=0).to(tl.float32)
    if out_scale is not None:
        v *= inverse
        tl.store(y + row * columns + column, to_codes(v, False, False), mask=inside)
    else:
        tl.store(y + row * columns + column, v.to(y.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``reference.norm.add_norm`` for rows of up to 32768 floats; sums in float32."""
    sum_dtype = x.dtype if residual is None else residual.dtype
    dtype = residual_dtype or sum_dtype
    new_residual = x
    if residual is not None or dtype != x.dtype:
        new_residual = torch.empty(x.shape, dtype=dtype, device=x.device)
    y = _norm(x, residual, weight, bias, new_residual, eps, center, out_scale, out_dtype)
    return y, new_residual


def rms_norm(
    x: Activation, *, eps: float, out_scale: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``reference.norm.rms_norm``; int8 codes are read as they are."""
    return _norm(x, None, None, None, None, eps, False, out_scale, out_dtype)


def _norm(
    x: Activation,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    new_residual: Tensor | None,
    eps: float,
    center: bool,
    out_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The normalised rows; the sum goes to new_residual unless that is None or x itself."""
    values, x_scale = (x.codes, x.scale) if isinstance(x, Quantized) else (x, None)
    y = torch.empty(
        values.shape, dtype=torch.int8 if out_scale is not None else out_dtype, device=values.device
    )
    if values.numel() == 0:
        return y
    flat = as_rows("x", values)
    rows, columns = flat.shape
    _check_columns(columns)
    check_dtype("out_dtype", y)
    if out_scale is not None:
        check_one_scale(out_scale)
    added = None if residual is None else as_rows("residual", residual)
    if new_residual is not None:
        check_dtype("residual_dtype", new_residual)
    tile = whole_row_tile(rows, columns)
    _add_norm_kernel[(triton.cdiv(rows, tile.rows),)](
        flat,
        x_scale,
        added,
        _vector("weight", weight),
        _vector("bias", bias),
        y,
        out_scale,
        None if new_residual is x else new_residual,
        rows,
        columns,
        flat.stride(0),
        0 if added is None else added.stride(0),
        eps,
        X_SCALES=x_scale is not None and check_scale("the scale of x", x_scale, columns),
        CENTER=center,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        **dependent_launch(values.device),
    )
    return y


@triton.jit
def read_gate(
    z: tl.tensor,
    z_scale: tl.tensor,
    column: tl.tensor,
    present: tl.tensor,
    inside: tl.tensor,
    Z_SCALES: tl.constexpr,
) -> tl.tensor:
    """silu(z), float32; arguments as those of ``gate_and_norm``.

    This is most of the arithmetic of a gated norm, and conversions of int8 and the range checks of ``exp``
    and of a division would double it. So codes become the low bits of a float, and 1 / v is the square of
    v^(-1/2).
    """
    gate = tl.load(z, mask=inside, other=0)
    if gate.dtype == tl.int8:
        gate = (gate.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        gate = gate.to(tl.float32)
    if z_scale is not None:
        if Z_SCALES:
            gate *= tl.load(z_scale + column, mask=present, other=0).to(tl.float32)
        else:
            gate *= tl.load(z_scale).to(tl.float32)
    root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
    return gate * root * root


@triton.jit
def gate_and_norm(
    y: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    weight: tl.tensor,
    column: tl.tensor,
    present: tl.tensor,
    inside: tl.tensor,
    group_size: tl.tensor,
    eps: tl.tensor,
    Z_SCALES: tl.constexpr,
    NORM_FIRST: tl.constexpr,
) -> tl.tensor:
    """The gated norm of a tile of whole groups, float32.

    y, z             pointers to each element; column its channel, a row vector; present: below the last
    z_scale, weight  pointers to the first channel, or None
    """
    v = tl.load(y, mask=inside, other=0).to(tl.float32)
    gate = read_gate(z, z_scale, column, present, inside, Z_SCALES)
    if not NORM_FIRST:
        v *= gate
    power = tl.sum(v * v, axis=1) / group_size + eps
    v *= tl.div_rn(1.0, tl.sqrt_rn(power))[:, None]
    if weight is not None:
        v *= tl.load(weight + column, mask=present, other=0).to(tl.float32)
    if NORM_FIRST:
        v *= gate
    return v


@triton.jit
def _gated_norm_kernel(
    y: tl.tensor,
    z: tl.tensor,
    z_scale: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    group_size: tl.tensor,
    y_stride: tl.tensor,
    z_stride: tl.tensor,
    eps: tl.tensor,
    Z_SCALES: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    let_next_start(EARLY)
    groups = columns // group_size
    program = tl.program_id(0).to(tl.int64)
    row = (program // groups * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    offset = tl.arange(0, BLOCK_COLUMNS)[None, :]
    column = program % groups * group_size + offset
    present = offset < group_size
    inside = (row < rows) & present
    wait_for_inputs(EARLY)
    v = gate_and_norm(
        y + row * y_stride + column,
        z + row * z_stride + column,
        z_scale,
        weight,
        column,
        present,
        inside,
        group_size,
        eps,
        Z_SCALES,
        NORM_FIRST,
    )
    tl.store(out + row * columns + column, v.to(out.dtype.element_ty), mask=inside)


def gated_rms_norm(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``reference.norm.gated_rms_norm`` for groups of up to 32768 channels; sums in float32."""
    out = torch.empty(y.shape, dtype=out_dtype, device=y.device)
    check_dtype("out_dtype", out)
    if y.numel() == 0:
        return out
    flat = as_rows("y", y)
    gate, z_scale = (z.codes, z.scale) if isinstance(z, Quantized) else (z, None)
    gate = as_rows("z", gate)
    rows, columns = flat.shape
    check_groups(columns, group_size)
    _check_columns(group_size)
    tile = whole_row_tile(rows, group_size)
    _gated_norm_kernel[(triton.cdiv(rows, tile.rows) * (columns // group_size),)](
        flat,
        gate,
        z_scale,
        _vector("weight", weight),
        out,
        rows,
        columns,
        group_size,
        flat.stride(0),
        gate.stride(0),
        eps,
        Z_SCALES=z_scale is not None and check_scale("the scale of z", z_scale, columns),
        NORM_FIRST=norm_before_gate,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        **dependent_launch(y.device),
    )
    return out


def check_groups(columns: int, group_size: int) -> None:
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {columns} channels of y.")


def check_one_scale(scale: Tensor) -> None:
    if scale.numel() != 1:
        raise ValueError(f"out_scale has shape {list(scale.shape)}, expected ().")


def _check_columns(columns: int) -> None:
    if columns > _MAX_COLUMNS:
        raise ValueError(f"A norm over {columns} channels, expected at most {_MAX_COLUMNS}.")


def _vector(name: str, x: Tensor | None) -> Tensor | None:
    """A weight or bias, whose elements must be neighbours."""
    if x is not None:
        as_rows(name, x)
    return x
