"""Round to nearest: choose scales, divide, round.

The scales of a matrix ``[N, K]`` are chosen first and rounded to the dtype they are stored in, so the codes
are computed with the very numbers that will dequantize them. (Two levels of scales come after that: codes and
scales are those of ``WeightFormat.one_level``, and ``QuantizedWeight.from_codes`` takes the scales apart.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.weight import QuantizedWeight, WeightFormat, apply_scale, round_significant

# Scale candidates relative to absmax_scale. Below 0.4 a group of 128 Gaussian weights loses more to clipping
# than it can gain; a little above 1 can help because the grid then lands better.
SHRINK_FACTORS = tuple(round(0.40 + 0.03 * i, 2) for i in range(23))
_REFITS = 3
# Of a format with multiples, how often a row's number fits into the scale that its widest group would have
# without: as often as may be, down to this share of it. A smaller number leaves small groups finer steps, a
# larger one lets the widest group have a scale of more than it needs, or of a little less.
_FEWEST_MULTIPLES = 0.75
# Weights whose scales are searched together; elsewhere than on a CPU enough to hide the launches.
_CPU_CHUNK_ELEMENTS = 1 << 22
_CHUNK_ELEMENTS = 1 << 25


def round_to_nearest(
    weight: Tensor, format: WeightFormat, *, scale: Tensor | None = None, importance: Tensor | None = None
) -> QuantizedWeight:
    """``code = clamp(round_half_even(weight / scale), qmin, qmax)``

    weight      [N, K] float, finite
    scale       as ``absmax_scale`` gives it; by default that, or ``mse_scale`` if importance is given
    importance  [K] float, weight of a column's squared error in the choice of scales
    Raises QuambaError for non-finite weights and shapes that the format does not fit.
    """
    if scale is None:
        scale = absmax_scale(weight, format) if importance is None else mse_scale(weight, format, importance)
    return QuantizedWeight.from_codes(round_codes(weight, scale, format), scale, format)


def round_codes(weight: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """The codes of ``round_to_nearest``: int8 [N, K], in float64 if the weight is, else in float32."""
    weight = _as_working_dtype(weight)
    full_scale = apply_scale(torch.ones_like(weight), scale, weight.dtype)
    return torch.round(weight / full_scale).clamp_(format.qmin, format.qmax).to(torch.int8)


def absmax_scale(weight: Tensor, format: WeightFormat) -> Tensor:
    """The finest scale at which no weight errs by more than half a step.

    8 bits: ``max|w| / 127``.  4 bits: ``max(max(w) / 7.5, -min(w) / 8.5)``, since the codes are [-8, 7]
    and the outermost weights may lie half a step beyond them.

    weight   [N, K] float
    returns  stored shape and dtype of the scales of ``format.one_level``, positive
    """
    _require_finite(weight)
    return _part_by_part(_absmax, weight, format)


def _absmax(weight: Tensor, format: WeightFormat) -> Tensor:
    groups = as_groups(weight, format)
    low, high = groups.amin(-1), groups.amax(-1)
    if format.bits == 4:
        scale = torch.maximum(high / (format.qmax + 0.5), low / (format.qmin - 0.5))
    else:
        scale = torch.maximum(high, -low) / format.qmax
    if format.multiples is None:
        return store_scale(scale, format)
    unit = short_unit(scale.amax(1, keepdim=True) / format.multiples, format)
    return store_multiples((scale / unit).ceil(), unit, format)


def mse_scale(weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> Tensor:
    """Per group, the scale s of least ``sum_k importance_k * (w_k - s * code_k(s))^2``.

    Search: ``SHRINK_FACTORS`` times ``absmax_scale``, then a few rounds of the least-squares scale for the
    codes found, kept where it is better. Of a format with multiples: all of them, of several numbers a row.
    Never worse than ``absmax_scale``.

    weight      [N, K] float
    importance  [K] float >= 0, for example the diagonal of the Hessian; equal weights by default
    returns     stored shape and dtype of the scales of ``format.one_level``, positive
    """
    _require_finite(weight)
    weights = weight.new_ones(weight.shape[1]) if importance is None else importance
    return _part_by_part(lambda rows, part: _least_squares(rows, part, weights), weight, format)


def _least_squares(weight: Tensor, format: WeightFormat, importance: Tensor) -> Tensor:
    start = _absmax(weight, format)
    groups = as_groups(weight, format)
    members = importance.to(groups)
    members = members.repeat(weight.shape[0]) if groups.shape[0] < weight.shape[0] else members
    members = members.view(1, *groups.shape[1:])
    together = _CPU_CHUNK_ELEMENTS if groups.device.type == "cpu" else _CHUNK_ELEMENTS
    rows = max(1, together // groups[0].numel())
    search = _search if format.multiples is None else _search_multiples
    return torch.cat(
        [search(w, s, members, format) for w, s in zip(groups.split(rows), start.split(rows), strict=True)]
    )


def _search(groups: Tensor, start: Tensor, importance: Tensor, format: WeightFormat) -> Tensor:
    """``mse_scale`` for some rows: groups [n, G, width], start [n, G] stored dtype."""
    best, best_error = start, torch.full_like(start, torch.inf, dtype=groups.dtype)

    def consider(candidate: Tensor) -> Tensor:
        nonlocal best, best_error
        codes, error = _rounded(groups, candidate, importance, format)
        better = error < best_error
        best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
        return codes

    consider(start)
    for factor in SHRINK_FACTORS:
        consider(store_scale(start.to(groups.dtype) * factor, format))
    codes = consider(best)
    for _ in range(_REFITS):
        fitted = (importance * groups * codes).sum(-1) / (importance * codes.square()).sum(-1)
        fitted = torch.where(fitted.isfinite() & (fitted > 0), fitted, best.to(groups.dtype))
        codes = consider(store_scale(fitted, format))
    return best


def _search_multiples(groups: Tensor, start: Tensor, importance: Tensor, format: WeightFormat) -> Tensor:
    """``_search`` for a format with multiples: of several numbers a row, that of the least total error."""
    assert format.multiples is not None
    finest = dataclasses.replace(format, multiples=None)
    widest = _absmax(groups.flatten(1), finest).float().amax(1, keepdim=True)
    best = start
    best_error = _rounded(groups, start, importance, format)[1].sum(1, keepdim=True)
    for fit in range(format.multiples, int(_FEWEST_MULTIPLES * format.multiples) - 1, -1):
        unit = short_unit(widest / fit, format)
        chosen, least = start, torch.full_like(start, torch.inf, dtype=groups.dtype)
        for multiple in range(1, format.multiples + 1):
            scale = store_multiples(torch.full_like(widest, multiple), unit, format).expand_as(start)
            error = _rounded(groups, scale, importance, format)[1]
            better = error < least
            chosen, least = torch.where(better, scale, chosen), torch.where(better, error, least)
        error = least.sum(1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, chosen, best), torch.where(better, error, best_error)
    return best


def _rounded(
    groups: Tensor, scale: Tensor, importance: Tensor, format: WeightFormat
) -> tuple[Tensor, Tensor]:
    """The nearest codes, as floats [n, G, width], and their squared error [n, G]."""
    step = scale.to(groups.dtype)[..., None]
    codes = torch.round(groups / step).clamp_(format.qmin, format.qmax)
    return codes, ((groups - step * codes).square_() * importance).sum(-1)


def _part_by_part(
    choose: Callable[[Tensor, WeightFormat], Tensor], weight: Tensor, format: WeightFormat
) -> Tensor:
    """``choose(weight, format)``; for granularity "split" part by part, its scale repeated for its rows."""
    if format.granularity != "split":
        return choose(weight, format)
    parts = [
        choose(rows, dataclasses.replace(format, parts=(len(rows),))).expand(len(rows), 1)
        for rows in weight.split(format.row_parts)
    ]
    return torch.cat(parts)


def as_groups(weight: Tensor, format: WeightFormat) -> Tensor:
    """View whose last dimension holds the weights that share a scale; the first two are the scale's shape.

    weight   [N, K] float, for granularity "split" the rows of one part
    returns  [1, 1, N * K], [N, 1, K] or [N, G, group_size]; float64 stays, all else becomes float32
    """
    weight = _as_working_dtype(weight)
    if format.granularity in ("tensor", "split"):
        return weight.reshape(1, 1, -1)
    rows, columns = weight.shape
    return weight.reshape(rows, format.n_groups(columns), format.group_width(columns))


def store_scale(scale: Tensor, format: WeightFormat) -> Tensor:
    """Round to the dtype scales are stored in, and up to the smallest positive number there.

    Those of granularity "split" also to 11 significant bits: published checkpoints hold their quotients by
    an output scale, from which so short a number can be found again.
    Raises QuambaError if a scale is too large for the dtype.
    """
    stored = scale.clamp(min=format.smallest_scale).to(format.scale_dtype)
    if format.granularity == "split":
        stored = round_significant(stored.float()).to(format.scale_dtype)
    if not bool(torch.isfinite(stored).all()):
        raise QuambaError(
            f"A weight needs the scale {float(scale.max()):.3g}, more than {format.scale_dtype} can hold; "
            "use granularity 'channel' with scales of 32 bits."
        )
    return stored


def short_unit(unit: Tensor, format: WeightFormat) -> Tensor:
    """Rounded up so that its ``multiples`` are float16 numbers: to 7 significant bits where they are 16.

    unit     [N, 1] float
    returns  [N, 1] float32, at least 2^-24
    """
    assert format.multiples is not None
    bits = 11 - (format.multiples - 1).bit_length()
    short = round_significant(unit.float().contiguous(), up=True, bits=bits)
    return ((short * 2.0**24).ceil() * 2.0**-24).clamp_(min=2.0**-24)  # the least float16 and its multiples


def store_multiples(multiples: Tensor, unit: Tensor, format: WeightFormat) -> Tensor:
    """Scales, as they are stored: ``multiples`` rounded, limited to those of the format, times ``unit``."""
    assert format.multiples is not None
    return store_scale(multiples.float().round().clamp(1, format.multiples) * unit, format)


def _require_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise QuambaError("A weight to be quantized holds NaN or infinity, expected finite numbers.")


def _as_working_dtype(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
