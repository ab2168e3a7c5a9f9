"""Weights rounded for the inputs they will see (GPTQ, Frantar et al. 2023), then refined.

For inputs x with second moments ``H = 2/n sum x x^T`` the solver looks for the quantized matrix Q of least
``tr((W - Q) H (W - Q)^T)``, the mean squared error of the layer's outputs. Every row of W is a problem of its
own, so all steps are vectorised over rows and loop over columns:

1. *Round with feedback.* Columns are rounded one by one; each takes over the errors of those before it. With
   ``H = V V^T``, V upper triangular, column i is rounded from ``w_i + sum_{j<i} (w_j - q_j) V_ji / V_ii``.
   This is GPTQ without its inverse of H.
2. *Refine*, a few rounds: the scales of a row in least squares, given its codes; then sweeps over the columns
   in which each code is set to its best value, given all others. No step raises the loss of a row.

What each choice of ``GptqConfig`` gains is in docs/notes/4-bit-weights.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quamba.errors import QuambaError, one_of
from quamba.formats.weight import QuantizedWeight, WeightFormat, apply_scale, row_unit
from quamba.kernels.reference.linear import int_matmul
from quamba.kernels.registry import choose_solver_kernels
from quamba.quantization.rtn import (
    absmax_scale,
    mse_scale,
    round_to_nearest,
    store_multiples,
    store_scale,
)

_REFIT_ROWS = 4096
# Tokens whose products of codes, at most 2^14 each, int32 can sum.
_EXACT_TOKENS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class GptqConfig:
    """How ``solve`` works; none of it changes what is stored or how fast it runs.

    damping      added to the diagonal of H, as a fraction of its mean
    block_size   columns between two large matrix products: speed only
    act_order    round columns of large H_kk first, with scales chosen beforehand from the original weights;
                 else in the order stored, a group's scales chosen when its first column is reached (of a
                 format with multiples, in which groups share a number, beforehand)
    scale        the first scales: "absmax" or "mse" (``rtn.mse_scale``, weighted by the diagonal of H)
    refinements  rounds of least-squares scales and coordinate descent; 0 is the published GPTQ
    sweeps       coordinate-descent passes over the columns in one round
    """

    damping: float = 0.1
    block_size: int = 128
    act_order: bool = True
    scale: Literal["absmax", "mse"] = "mse"
    refinements: int = 3
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise QuambaError(f"The damping of GPTQ is {self.damping!r}, expected a number >= 0 such as 0.1.")
        for name, least in (("block_size", 1), ("refinements", 0), ("sweeps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise QuambaError(
                    f"The {name} of GPTQ is {value!r}, expected an integer of at least {least}."
                )
        if self.scale not in ("absmax", "mse"):
            raise one_of("The scale choice of GPTQ", self.scale, ("absmax", "mse"))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: ``GptqConfig(**config.to_dict()) == config``."""
        return dataclasses.asdict(self)


# The algorithm as published and as the reference runs it (apart from the reference's fp16 lm_head).
PLAIN_GPTQ = GptqConfig(damping=0.01, act_order=False, scale="absmax", refinements=0)


@dataclass(frozen=True)
class SolveLosses:
    """``tr((W - Q) H (W - Q)^T) / tr(W H W^T)`` with H undamped; W is the target if ``cross`` was given.

    rtn   for Q rounded to nearest with ``absmax_scale``
    gptq  for the solution
    """

    rtn: float
    gptq: float

    @property
    def rtn_sqnr_db(self) -> float:
        return _sqnr_db(self.rtn)

    @property
    def gptq_sqnr_db(self) -> float:
        return _sqnr_db(self.gptq)


def accumulate_hessian(hessian: Tensor, x: Tensor, count: int) -> int:
    """Running mean ``H = 2/n sum_t x_t x_t^T``, updated in place; start with zeros and count 0.

    hessian  [K, K] float32 or float64
    x        [..., K] float, any number of tokens
    count    tokens already in hessian
    returns  the new count
    """
    return accumulate_cross(hessian, x, x, count)


def accumulate_cross(cross: Tensor, x: Tensor, x_hat: Tensor, count: int) -> int:
    """Running mean ``C = 2/n sum_t x_t xhat_t^T``, in place: x of the float model, xhat of the quantized one.

    Arguments and result as in ``accumulate_hessian``; x and x_hat hold the same tokens in the same order.
    """
    x, x_hat = (t.reshape(-1, t.shape[-1]).to(cross.dtype) for t in (x, x_hat))
    tokens = x.shape[0]
    if tokens == 0:
        return count
    with _full_precision_matmul():
        cross.mul_(count / (count + tokens)).addmm_(x.T, x_hat, alpha=2 / (count + tokens))
    return count + tokens


def accumulate_code_moments(hessian: Tensor, codes: Tensor, scale: Tensor, count: int) -> int:
    """``accumulate_hessian`` for ``x = scale * codes``; products are summed as integers, without rounding.

    codes  [..., K] int8
    scale  () float
    """
    codes = codes.reshape(-1, codes.shape[-1])
    for start in range(0, len(codes), _EXACT_TOKENS):
        columns = codes[start : start + _EXACT_TOKENS].T.contiguous()
        sums = int_matmul(columns, columns).to(hessian.dtype)
        total = count + columns.shape[1]
        hessian.mul_(count / total).add_(sums.mul_(scale.to(hessian.dtype).square()), alpha=2 / total)
        count = total
    return count


def solve(
    weight: Tensor,
    hessian: Tensor,
    format: WeightFormat,
    config: GptqConfig | None = None,
    *,
    cross: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[QuantizedWeight, SolveLosses]:
    """Codes and scales of small ``tr((W - Q) H (W - Q)^T)``.

    weight   [N, K] float; columns are computed in float64 if it is float64, else in float32
    hessian  [K, K] float, symmetric, positive semidefinite up to rounding; singular and zero are fine
    cross    [K, K] from ``accumulate_cross``, with hessian from x_hat: minimise ``|W x - Q xhat|^2`` instead,
             which undoes part of the error that x_hat brings from earlier layers
    scale    fixed scales, as ``absmax_scale`` gives them; by default they are chosen and refined
    returns  the weight, on the device of ``weight``, and its losses: with two levels of scales, those of the
             integers that come of them
    Deterministic. Raises QuambaError for non-finite inputs and shapes that the format does not fit.
    """
    pieces = [Problem(hessian, config, cross=cross, like=weight).solve(weight, format, scale)]
    return joined(pieces)


@dataclass(frozen=True)
class Solution:
    """What ``Problem.solve`` found for some rows.

    lost_rtn, lost  ``tr((W - Q) H (W - Q)^T)`` of rounding to nearest and of ``weight``
    whole           ``tr(W H W^T)``
    """

    weight: QuantizedWeight
    lost_rtn: float
    lost: float
    whole: float


class Problem:
    """The moments of a layer's inputs, factored once; weights of any of its rows are then solved.

    hessian, cross  as in ``solve``
    like            a tensor of the device and dtype that weights will have
    """

    def __init__(
        self, hessian: Tensor, config: GptqConfig | None = None, *, cross: Tensor | None = None, like: Tensor
    ) -> None:
        self._config = config = config or GptqConfig()
        _check_inputs(like.shape[1], hessian, cross)
        self._hessian = hessian.to(like.device)
        self._cross = None if cross is None else cross.to(like.device)
        with torch.no_grad(), _full_precision_matmul():
            self._damped, self._factor = _damped_factor(self._hessian, config.damping)
            self._order = _column_order(self._damped, config)
            self._ordered = self._factor
            if config.act_order:
                self._ordered = _upper_cholesky(self._damped[self._order][:, self._order])
            if cross is None:
                self._factor = self._ordered  # the other one is of no use then

    def solve(self, weight: Tensor, format: WeightFormat, scale: Tensor | None = None) -> Solution:
        """Arguments as in ``solve``; rows go apart unless the format lets them share scales."""
        config, order = self._config, self._order
        with torch.no_grad(), _full_precision_matmul():
            nearest = round_to_nearest(weight, format)
            target = weight.double() if weight.dtype == torch.float64 else weight.float()
            if self._cross is not None:
                target = _cross_target(target, self._hessian, self._cross, self._factor)
            fixed = scale is not None
            if not fixed and (config.act_order or format.multiples is not None):
                scale = _choose_scale(target, format, config, self._damped.diagonal())
            codes, scale = _round_with_feedback(target, self._ordered, format, config, order, scale)
            damped = self._damped.to(target.dtype)
            for _ in range(config.refinements):
                if not fixed:
                    scale = _refit_scale(target, damped, codes, scale, format)
                codes = _descend(target, damped, codes, scale, format, config)
            del damped
            solution = QuantizedWeight.from_codes(codes.T.contiguous().to(torch.int8), scale, format)
            del codes
            lost_rtn, lost = (self._loss(target - q.dequantize(target.dtype)) for q in (nearest, solution))
            return Solution(solution, lost_rtn, lost, self._loss(target))

    def _loss(self, error: Tensor) -> float:
        return _quadratic(error, self._hessian.to(error))


def joined(pieces: Iterable[Solution]) -> tuple[QuantizedWeight, SolveLosses]:
    """The weight whose rows were solved piece by piece, and its losses."""
    pieces = list(pieces)
    weight = join_rows([piece.weight for piece in pieces])
    whole = sum(piece.whole for piece in pieces)
    lost = [sum(piece.lost_rtn for piece in pieces), sum(piece.lost for piece in pieces)]
    return weight, SolveLosses(*(loss / whole if whole > 0 else 0.0 for loss in lost))


def join_rows(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One matrix of the rows of several, which have scales of their own or are alone."""
    if len(pieces) == 1:
        return pieces[0]
    rows = [piece.channel_scale for piece in pieces if piece.channel_scale is not None]
    return QuantizedWeight(
        torch.cat([piece.data for piece in pieces]),
        torch.cat([piece.scale for piece in pieces]),
        pieces[0].format,
        torch.cat(rows) if rows else None,
    )


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr((W - Q) H (W - Q)^T) / tr(W H W^T)``; 0 if both vanish."""
    hessian = hessian.to(weight)
    lost, whole = _quadratic(weight - quantized, hessian), _quadratic(weight, hessian)
    return lost / whole if whole > 0 else 0.0


def _quadratic(error: Tensor, hessian: Tensor) -> float:
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def _damped_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H + lambda I and its ``_upper_cholesky``, float64; lambda grows tenfold until the factor exists."""
    hessian = hessian.double()
    hessian = (hessian + hessian.T) / 2
    mean = float(hessian.diagonal().mean())
    if mean <= 0:  # nothing was observed: all columns count alike
        hessian, mean = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device), 1.0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(mean * damping)
        factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # A pivot at the level of rounding errors would divide by noise, so it counts as a failure.
        if int(info) == 0 and float(factor.diagonal().min()) ** 2 > 1e-12 * mean:
            return damped, factor.flip(0, 1)
        damping = max(10 * damping, 1e-8)
        if damping > 10:
            raise QuambaError(
                "The Hessian of a layer is not positive semidefinite, expected second moments of its inputs."
            )


def _upper_cholesky(damped: Tensor) -> Tensor:
    """V upper triangular with ``V V^T = H``: the Cholesky factor, from the last column to the first."""
    return torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)


def _column_order(damped: Tensor, config: GptqConfig) -> Tensor:
    if config.act_order:
        return damped.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(damped), device=damped.device)


def _choose_scale(weight: Tensor, format: WeightFormat, config: GptqConfig, importance: Tensor) -> Tensor:
    if config.scale == "absmax":
        return absmax_scale(weight, format)
    return mse_scale(weight, format, importance)


def _cross_target(weight: Tensor, hessian: Tensor, cross: Tensor, factor: Tensor) -> Tensor:
    """``W + W (C - H) (H + lambda I)^-1``: where ``|W x - Q xhat|^2`` has its minimum over real Q.

    Written as a change to W, so that damping pulls towards W and not towards zero.
    """
    change = (cross.double() - hessian.to(cross.device).double()).T @ weight.double().T
    change = torch.linalg.solve_triangular(factor, change, upper=True)
    change = torch.linalg.solve_triangular(factor.T, change, upper=False)
    return weight + change.T.to(weight.dtype)


def _round_with_feedback(
    weight: Tensor,
    factor: Tensor,
    format: WeightFormat,
    config: GptqConfig,
    order: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step 1 of the module's docstring.

    factor   [K, K], V for the columns in ``order``
    scale    stored shape and dtype, or None (columns in stored order only): chosen as groups are reached
    returns  codes [K, N] of weight's dtype, columns as stored; scale
    """
    # Transposed, so that what one step touches is contiguous.
    ordered = weight.T[order].contiguous()
    feedback = (factor / factor.diagonal()).T.to(weight.dtype).contiguous()
    errors, codes = torch.zeros_like(ordered), torch.empty_like(ordered)
    columns, width = len(ordered), format.group_width(len(ordered))
    kernels = choose_solver_kernels(weight)
    steps = None if scale is None else _steps(scale, weight.dtype)
    chosen: list[Tensor] = []
    for start, stop in _blocks(columns, config.block_size, columns if scale is not None else width):
        block = ordered[start:stop] + feedback[start:stop, :start] @ errors[:start]
        if steps is not None:
            block_steps = steps[order[start:stop] // width]
        else:
            if start % width == 0:
                group = slice(start, start + width)
                wanted = ordered[group] + feedback[group, :start] @ errors[:start]
                importance = factor.diagonal()[group].square()
                chosen.append(_choose_scale(wanted.T, format, config, importance))
            block_steps = _steps(chosen[-1], weight.dtype).expand(stop - start, -1)
        codes[start:stop], errors[start:stop] = kernels.round_columns(
            block,
            ordered[start:stop],
            feedback[start:stop, start:stop],
            block_steps,
            qmin=format.qmin,
            qmax=format.qmax,
        )
    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored, torch.cat(chosen, dim=1) if scale is None else scale


def _blocks(columns: int, size: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks, which end at every multiple of ``size`` and of ``width``."""
    start = 0
    while start < columns:
        stop = min((start // size + 1) * size, (start // width + 1) * width, columns)
        yield start, stop
        start = stop


def _refit_scale(
    weight: Tensor, damped: Tensor, codes: Tensor, scale: Tensor, format: WeightFormat
) -> Tensor:
    """The least-squares scales of given codes, for the rows where they lower the loss after rounding.

    With Z the codes of a row, one column per group, the loss falls by ``2 d.b - d.A d`` when its scales
    change by d, where ``A = Z^T H Z`` and ``b = Z^T H (w - Z scale)``; its maximum is at ``A d = b``.
    """
    width = format.group_width(weight.shape[1])
    normal, slope = [], []
    for rows in torch.arange(weight.shape[0], device=weight.device).split(_REFIT_ROWS):
        z = codes[:, rows].T.contiguous()
        row_scale = scale if scale.shape[0] == 1 else scale[rows]
        residual = weight[rows] - apply_scale(z, row_scale, weight.dtype)
        grouped = z.view(len(z), -1, width)
        projected = [
            ((grouped[:, g] @ damped[g * width : (g + 1) * width]).view_as(grouped) * grouped).sum(-1)
            for g in range(grouped.shape[1])
        ]
        normal.append(torch.stack(projected, dim=1).double())
        slope.append(((residual @ damped).view_as(grouped) * grouped).sum(-1).double())
    a, b = torch.cat(normal), torch.cat(slope)
    if format.granularity == "split":
        return _refit_parts(a, b, scale, format)
    if format.granularity == "tensor":
        a, b = a.sum(0, keepdim=True), b.sum(0, keepdim=True)
    return _accept_scale(a, b, scale, format)


def _refit_parts(a: Tensor, b: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """Equations of all rows [N, 1, 1] and [N, 1]: those of a part are added, since its rows share a scale."""
    parts = format.row_parts
    a, b = (torch.stack([part.sum(0) for part in rows.split(parts)]) for rows in (a, b))
    shared = torch.stack([part[0] for part in scale.split(parts)])
    fitted = _accept_scale(a, b, shared, format)
    return fitted.repeat_interleave(torch.tensor(parts, device=fitted.device), dim=0)


def _accept_scale(a: Tensor, b: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """Solve ``A d = b`` and keep ``scale + d`` in the rows where it is positive and a gain."""
    empty = torch.diagonal(a, dim1=-2, dim2=-1) <= 0  # a group whose codes are all 0 has no equation
    change = torch.linalg.solve_ex(a + torch.diag_embed(empty.double()), b[..., None])[0][..., 0]
    fitted = scale.double() + change
    usable = (fitted.isfinite() & (fitted > 0)).all(-1, keepdim=True)
    fitted = torch.where(usable, fitted, scale.double())
    if format.multiples is None:
        fitted = store_scale(fitted, format)
    else:  # the nearest multiples of the row's number
        unit = row_unit(scale, format)
        fitted = store_multiples(fitted / unit, unit, format)
    d = fitted.double() - scale.double()
    gain = 2 * (d * b).sum(-1) - (d * (a @ d[..., None])[..., 0]).sum(-1)
    return torch.where((gain > 0)[:, None], fitted, scale)


def _descend(
    weight: Tensor, damped: Tensor, codes: Tensor, scale: Tensor, format: WeightFormat, config: GptqConfig
) -> Tensor:
    """Cyclic coordinate descent on the codes, [K, N]: each is set to the best value given all others.

    With ``g = (w - q) H`` the best real value of weight k is ``q_k + g_k / H_kk``; the nearest code is the
    best one, since the loss is a parabola in it.
    """
    codes = codes.clone()
    columns, width = len(codes), format.group_width(len(codes))
    kernels = choose_solver_kernels(weight)
    steps = _steps(scale, weight.dtype)
    group = torch.arange(columns, device=codes.device) // width
    for _ in range(config.sweeps):
        residual = weight - apply_scale(codes.T.contiguous(), scale, weight.dtype)
        slope = damped @ residual.T
        for start, stop in _blocks(columns, config.block_size, columns):
            codes[start:stop], moved = kernels.descend_columns(
                slope[start:stop],
                codes[start:stop],
                damped[start:stop, start:stop],
                steps[group[start:stop]],
                qmin=format.qmin,
                qmax=format.qmax,
            )
            slope[stop:] += damped[stop:, start:stop] @ moved
    return codes


def _steps(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales by group, contiguous: [G, N], or [1, 1] for all."""
    return scale.to(dtype).T.contiguous()


def _check_inputs(columns: int, hessian: Tensor, cross: Tensor | None) -> None:
    for name, matrix in (("Hessian", hessian), ("cross-moment matrix", cross)):
        if matrix is None:
            continue
        if tuple(matrix.shape) != (columns, columns):
            raise QuambaError(
                f"The {name} has shape {list(matrix.shape)}, expected [{columns}, {columns}] for a weight of "
                f"{columns} columns."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise QuambaError(
                f"The {name} of a layer holds NaN or infinity; the calibration inputs overflowed."
            )


def _sqnr_db(relative: float) -> float:
    return -10 * math.log10(relative) if relative > 0 else math.inf


@contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """float32 products in float32: TF32 would lose half of the digits of H."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
