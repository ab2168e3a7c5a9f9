"""The weight solver's loops over columns: what is left of it once all large products are taken out.

Matrices are transposed, [B, N]: B columns of a weight whose N rows have nothing to do with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_columns(
    wanted: Tensor, target: Tensor, feedback: Tensor, steps: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """code_i = clamp(round(w_i / step_i)),
    w_i = wanted_i + sum_{j<i} feedback_ij e_j,  e_j = target_j - code_j step_j

    wanted    [B, N] float32 or float64
    target    [B, N] in the dtype of wanted, like all that follows
    feedback  [B, B], of which only what is below the diagonal is read
    steps     [B, N] or [B, 1], > 0
    returns   the codes, whole numbers in [qmin, qmax], ties rounded to even, and e: [B, N] both
    """
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for i in range(len(wanted)):
        value = wanted[i] + feedback[i, :i] @ errors[:i]
        code = torch.round(value / steps[i]).clamp_(qmin, qmax)
        errors[i] = target[i] - code * steps[i]
        codes[i] = code
    return codes, errors


def descend_columns(
    slope: Tensor, codes: Tensor, curvature: Tensor, steps: Tensor, *, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """new_i = clamp(round(code_i + g_i / (curvature_ii step_i))),
    g_i = slope_i + sum_{j<i} curvature_ij moved_j,  moved_j = (code_j - new_j) step_j

    slope      [B, N] float32 or float64
    codes      [B, N] in the dtype of slope, like all that follows
    curvature  [B, B], of which what is above the diagonal is not read; the diagonal is > 0
    steps      [B, N] or [B, 1], > 0
    returns    the new codes, whole numbers in [qmin, qmax], ties rounded to even, and moved: [B, N] both
    """
    found, moved = torch.empty_like(slope), torch.empty_like(slope)
    diagonal = curvature.diagonal()
    for i in range(len(slope)):
        here = slope[i] + curvature[i, :i] @ moved[:i]
        code = torch.round(codes[i] + here / (diagonal[i] * steps[i])).clamp_(qmin, qmax)
        moved[i] = (codes[i] - code) * steps[i]
        found[i] = code
    return found, moved
