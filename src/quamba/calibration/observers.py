"""Statistics of activations, collected while a model runs over calibration text.

An observer only updates a statistic; what scale follows from it is decided elsewhere. The statistics are per
group of channels: ``groups`` [C] int64 gives the group of each channel of the last dimension, 0 <= group <
n_groups. Per tensor is one group, per channel is C groups, and an SSD group or a head group x channel group
is one of K.

A *document* is one row of a batch. Accumulators are float32 on the device of ``groups``, which must be that
of the activations. Results do not depend on how documents are batched or padded. NaN goes through to the
value.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from quamba.errors import QuambaError

# Moving average of the percentile: each further document moves it by this share of the difference.
EMA_SIGMA = 0.01
_BLOCK = 16
_MANY_GROUPS = 64


class Observer(Protocol):
    """Watches activations x [B, L, C] and keeps one statistic."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None: ...

    def value(self) -> Tensor: ...


class StateObserver(Protocol):
    """Watches states [B, H, P, N] or [B, C, N] and keeps one statistic."""

    def update(self, states: Tensor) -> None: ...

    def value(self) -> Tensor: ...


def make_observer(
    groups: Tensor, alpha: float, n_groups: int | None = None, *, sigma: float = EMA_SIGMA
) -> AbsMax | Percentile:
    """AbsMax for alpha = 1, else the alpha-quantile. n_groups defaults to the largest group + 1."""
    n_groups = _count_groups(groups, n_groups)
    if alpha == 1.0:
        return AbsMax(groups, n_groups)
    return Percentile(groups, n_groups, alpha, sigma)


def make_state_observer(
    groups: Tensor,
    alpha: float,
    n_groups: int | None = None,
    *,
    per_state: bool = True,
    sigma: float = EMA_SIGMA,
) -> StateAbsMax | StatePercentile:
    """StateAbsMax for alpha = 1, else the alpha-quantile, which is never per state dimension."""
    n_groups = _count_groups(groups, n_groups)
    if alpha == 1.0:
        return StateAbsMax(groups, n_groups, per_state=per_state)
    return StatePercentile(groups, n_groups, alpha, sigma)


class AbsMax:
    """value[k] = max |x[b, l, c]| over documents, valid tokens and the channels c of group k."""

    def __init__(self, groups: Tensor, n_groups: int) -> None:
        self._groups = groups
        self._max = torch.zeros(n_groups, dtype=torch.float32, device=groups.device)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """x [B, L, C] float, mask [B, L] bool (False: padding, left out)."""
        _check_channels(x.shape[-1], self._groups)
        valid = x.flatten(0, -2) if mask is None else x[mask]
        if len(valid):
            channel_max = torch.maximum(valid.amax(dim=0), -valid.amin(dim=0)).float()
            self._max.scatter_reduce_(0, self._groups, channel_max, "amax")

    def value(self) -> Tensor:
        """[K] float32; 0 for a group without channels."""
        return self._max.clone()


class Percentile:
    """The alpha-quantile of |x| over a document's valid tokens x a group's channels, averaged over documents.

    m = q(document 0), then m <- m + sigma (q(document) - m). q is torch.quantile's linear interpolation: with
    the n values in ascending order, v[i] + f (v[i+1] - v[i]) at i + f = alpha (n - 1), here with i + f in
    float64 and without torch.quantile's limit of 2^24 elements.
    """

    def __init__(self, groups: Tensor, n_groups: int, alpha: float, sigma: float = EMA_SIGMA) -> None:
        if alpha == 1.0:
            raise QuambaError(
                "A percentile alpha of 1.0 is the absolute maximum; use AbsMax or make_observer."
            )
        if not 0.0 < alpha < 1.0:
            raise QuambaError(
                f"The percentile alpha is {alpha!r}, expected 0 < alpha <= 1, for example 0.9995."
            )
        if not 0.0 < sigma <= 1.0:
            raise QuambaError(f"The percentile's moving average sigma is {sigma!r}, expected 0 < sigma <= 1.")
        self._groups = groups
        self._alpha = alpha
        self._sigma = sigma
        # Channels sorted by group, so that a group is a slice: [start, stop) after reordering.
        self._order = torch.argsort(groups, stable=True)
        self._in_order = bool((groups[1:] >= groups[:-1]).all())
        sizes = torch.bincount(groups, minlength=n_groups)
        self._stops = sizes.cumsum(0).tolist()
        # Many groups of one size, one a channel say, are ranked together.
        same = n_groups >= _MANY_GROUPS and bool((sizes == sizes[0]).all()) and int(sizes[0]) > 0
        self._equal_size = int(sizes[0]) if same else None
        self._mean: Tensor | None = None
        self._n_groups = n_groups

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """x [B, L, C] float, mask [B, L] bool (False: padding, left out)."""
        _check_channels(x.shape[-1], self._groups)
        for row in range(len(x)):
            document = x[row] if mask is None else x[row][mask[row]]
            if document.numel():
                self._add(self._quantiles(document.float().abs()))

    def value(self) -> Tensor:
        """[K] float32; 0 before the first document and for a group without channels."""
        if self._mean is None:
            return torch.zeros(self._n_groups, dtype=torch.float32, device=self._groups.device)
        return self._mean.clone()

    def _quantiles(self, magnitudes: Tensor) -> Tensor:
        if not self._in_order:
            magnitudes = magnitudes.index_select(1, self._order)
        if self._equal_size is not None:
            return _row_quantiles(
                magnitudes.unflatten(1, (-1, self._equal_size)).transpose(0, 1).flatten(1), self._alpha
            )
        found = torch.zeros(self._n_groups, dtype=torch.float32, device=magnitudes.device)
        start = 0
        for group, stop in enumerate(self._stops):
            if stop > start:
                found[group] = _quantile(magnitudes[:, start:stop], self._alpha)
            start = stop
        return found

    def _add(self, current: Tensor) -> None:
        self._mean = current if self._mean is None else self._mean + self._sigma * (current - self._mean)


class ChannelMean:
    """value[c] = max over documents of the mean over valid tokens of |x[:, c]|; for head grouping."""

    def __init__(self, n_channels: int, device: torch.device | str = "cpu") -> None:
        self._max = torch.zeros(n_channels, dtype=torch.float32, device=device)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """x [B, L, C] float, mask [B, L] bool (False: padding, left out)."""
        for row in range(len(x)):
            # One document at a time and contiguous, so that the sum always has the same order and rounding.
            document = (x[row] if mask is None else x[row][mask[row]]).float().abs().contiguous()
            if len(document):
                self._max = torch.maximum(self._max, document.mean(dim=0))

    def value(self) -> Tensor:
        """[C] float32."""
        return self._max.clone()


class StateAbsMax:
    """value[k, n] = max |state[b, c, n]| over documents and the channels c of group k.

    Channels are those of the flattened [H, P]. With per_state False, also the maximum over n: value [K, 1].
    """

    def __init__(self, groups: Tensor, n_groups: int, per_state: bool = True) -> None:
        self._groups = groups
        self._n_groups = n_groups
        self._per_state = per_state
        self._max: Tensor | None = None

    def update(self, states: Tensor) -> None:
        """states [B, H, P, N] or [B, C, N] float."""
        states = _channels_of(states)
        _check_channels(states.shape[1], self._groups)
        channel_max = torch.maximum(states.amax(dim=0), -states.amin(dim=0)).float()
        if not self._per_state:
            channel_max = channel_max.amax(dim=1, keepdim=True)
        if self._max is None:
            self._max = channel_max.new_zeros(self._n_groups, channel_max.shape[1])
        self._max.scatter_reduce_(0, self._groups[:, None].expand_as(channel_max), channel_max, "amax")

    def value(self) -> Tensor:
        """[K, N] float32, or [K, 1]."""
        if self._max is None:
            return torch.zeros(self._n_groups, 1, dtype=torch.float32, device=self._groups.device)
        return self._max.clone()


class StatePercentile:
    """``Percentile`` of a document's states, over a group's channels x all state dimensions. value [K, 1]."""

    def __init__(self, groups: Tensor, n_groups: int, alpha: float, sigma: float = EMA_SIGMA) -> None:
        self._percentile = Percentile(groups, n_groups, alpha, sigma)

    def update(self, states: Tensor) -> None:
        """states [B, H, P, N] or [B, C, N] float."""
        self._percentile.update(_channels_of(states).transpose(1, 2))

    def value(self) -> Tensor:
        """[K, 1] float32."""
        return self._percentile.value()[:, None]


def _quantile(values: Tensor, alpha: float) -> Tensor:
    """The alpha-quantile of all of values [L, C], sorting only what lies above it."""
    k, fraction = _rank(values.numel(), alpha)
    return _between(_candidates(values, k).topk(k).values, fraction)


def _row_quantiles(values: Tensor, alpha: float) -> Tensor:
    """The alpha-quantile of each row of values [K, n]: [K]."""
    k, fraction = _rank(values.shape[1], alpha)
    return _between(values.topk(k, dim=1).values, fraction)


def _rank(n: int, alpha: float) -> tuple[int, float]:
    """k and f: in ascending order, the quantile lies f of the way from the k-th largest to the next."""
    position = alpha * (n - 1)
    return n - math.floor(position), position - math.floor(position)


def _between(top: Tensor, fraction: float) -> Tensor:
    """top [..., k] descending; NaN where the largest is NaN."""
    k = top.shape[-1]
    low, high = top[..., k - 1].double(), top[..., max(k - 2, 0)].double()
    found = torch.lerp(low, high, fraction).float()
    return torch.where(top[..., 0].isnan(), top[..., 0].float(), found)


def _candidates(values: Tensor, k: int) -> Tensor:
    """1-D: a superset of the k largest of values [L, C], small when k is.

    The k-th largest of the maxima of disjoint blocks is a bound that at least k values reach.
    """
    whole = len(values) // _BLOCK * _BLOCK
    blocks = values[:whole].unflatten(0, (-1, _BLOCK)).amax(dim=1).flatten()
    if len(blocks) < k:
        return values.flatten()
    bound = blocks.topk(k).values[-1]
    return values[~(values < bound)]  # not "values >= bound": NaN must stay


def _channels_of(states: Tensor) -> Tensor:
    """[B, H, P, N] -> [B, H * P, N]; [B, C, N] as it is."""
    return states.flatten(1, 2) if states.dim() == 4 else states


def _count_groups(groups: Tensor, n_groups: int | None) -> int:
    return int(groups.max()) + 1 if n_groups is None else n_groups


def _check_channels(found: int, groups: Tensor) -> None:
    assert found == len(groups), f"{found} channels, but groups are given for {len(groups)}"
