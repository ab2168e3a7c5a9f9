"""Inputs for the solver's loops over columns, and what the loops mean: one row at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns and rows: one of each, few, ragged, more than the kernels' tiles.
SHAPES = [(1, 1), (1, 40), (7, 16), (24, 1), (64, 33), (130, 17)]


def block(
    columns: int, rows: int, *, one_step: bool = False, qmax: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """wanted, target [columns, rows], a symmetric matrix of strong diagonal, and steps.

    Codes reach beyond both ends, and all columns depend on those before them.
    """
    generator = torch.Generator().manual_seed(columns * 1000 + rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed = draw(columns, columns)
    matrix = mixed @ mixed.T / columns + torch.eye(columns, dtype=torch.float64)
    steps = (0.5 + draw(columns, 1 if one_step else rows).abs()) * 3 / qmax
    return tuple(t.to(dtype) for t in (2 * draw(columns, rows), 2 * draw(columns, rows), matrix, steps))


def rounded(
    wanted: Tensor, target: Tensor, feedback: Tensor, steps: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The codes of ``round_columns``, and the quotients that were rounded: float64 [columns, rows]."""
    return _loop(wanted, target, feedback, steps, qmin, qmax, descend=False)


def descended(
    slope: Tensor, codes: Tensor, curvature: Tensor, steps: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The codes of ``descend_columns``, and the real numbers that were rounded."""
    return _loop(slope, codes, curvature, steps, qmin, qmax, descend=True)


def _loop(
    wanted: Tensor, target: Tensor, matrix: Tensor, steps: Tensor, qmin: int, qmax: int, *, descend: bool
) -> tuple[Tensor, Tensor]:
    columns, rows = wanted.shape
    steps = steps.expand(columns, rows).double().tolist()
    values, targets, weights = (t.double().tolist() for t in (wanted, target, matrix))
    codes = torch.zeros(columns, rows, dtype=torch.float64)
    exact = torch.zeros_like(codes)
    for row in range(rows):
        passed: list[float] = []
        for i in range(columns):
            value = values[i][row] + sum(w * e for w, e in zip(weights[i][:i], passed, strict=True))
            step, before = steps[i][row], targets[i][row]
            real = before + value / (weights[i][i] * step) if descend else value / step
            code = min(max(round(real), qmin), qmax)  # Python rounds ties to even
            passed.append((before - code) * step if descend else before - code * step)
            exact[i, row], codes[i, row] = real, code
    return codes, exact
