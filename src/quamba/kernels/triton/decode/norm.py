"""RMSNorm of the residual stream, with quantization, for a few rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quamba.kernels.triton.decode.vectors import Vector, place, wide_codes
from quamba.kernels.triton.dependency import dependent_launch, let_next_start, wait_for_inputs
from quamba.kernels.triton.quantize import to_codes


@triton.jit
def _norm_kernel(
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    wide_scale: tl.tensor,
    eps: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    let_next_start(EARLY)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if out_scale is not None:  # one division: the norm is not exact to the last bit either
        factor *= tl.div_rn(1.0, tl.load(out_scale).to(tl.float32))
    wait_for_inputs(EARLY)
    x = tl.load(residual + row + column, mask=inside, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + eps) * factor
    if out_scale is not None:
        tl.store(out + row + place(column, COLUMNS, SPLIT), to_codes(y, False, False), mask=inside)
    elif wide_scale is not None:
        high, low, scale = wide_codes(tl.reshape(y, [BLOCK // 32, 32]))
        at = out + 2 * row + place(column, COLUMNS, SPLIT)
        tl.store(at, tl.reshape(high, [BLOCK]), mask=inside)
        tl.store(at + COLUMNS, tl.reshape(low, [BLOCK]), mask=inside)
        block = tl.arange(0, BLOCK // 32)
        tl.store(wide_scale + row // 32 + block, scale, mask=block < COLUMNS // 32)
    else:
        tl.store(out + row + column, y.to(out.dtype.element_ty), mask=inside)


def norm(residual: Tensor, weight: Tensor | None, out_scale: Tensor | None, out: Vector, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight of each row x of residual (B, C), or its codes of out_scale.

    residual  (B, C) float, contiguous; as all tensors here
    out       (B, C), codes where there is an out_scale (), else floats or wide codes
    """
    batch, columns = residual.shape
    block = max(32, triton.next_power_of_2(columns))
    _norm_kernel[(batch,)](
        residual,
        weight,
        out.values,
        out_scale,
        out.wide_scale,
        eps,
        COLUMNS=columns,
        BLOCK=block,
        SPLIT=out.split,
        num_warps=max(1, min(4, block // 256)),  # more of them wait longer for each other
        **dependent_launch(residual.device),
    )
