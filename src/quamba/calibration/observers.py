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
import torch.nn.functional as F
from torch import Tensor

from quamba.errors import QuambaError

# Moving average of the percentile: each further document moves it by this share of the difference.
EMA_SIGMA = 0.01
_BLOCK = 16
_MANY_GROUPS = 64
# Of a part of a batch, where not on a CPU; a few copies of them in float32 are made.
_ELEMENTS_AT_ONCE = 1 << 27


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
        in_order = bool((groups[1:] >= groups[:-1]).all())
        self._order = None if in_order else torch.argsort(groups, stable=True)
        self._sizes: list[int] = torch.bincount(groups, minlength=n_groups).tolist()
        # Many groups of one size, one a channel say, are ranked together.
        self._alike = n_groups >= _MANY_GROUPS and len(set(self._sizes)) == 1 and self._sizes[0] > 0
        self._mean: Tensor | None = None
        self._n_groups = n_groups

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """x [B, L, C] float, mask [B, L] bool (False: padding, left out)."""
        _check_channels(x.shape[-1], self._groups)
        lengths: list[int] = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
        together = _documents_at_once(x)
        for start in range(0, len(x), together):
            part = slice(start, start + together)
            if not any(lengths[part]):
                continue
            found = self._quantiles(x[part], None if mask is None else mask[part], lengths[part])
            for length, current in zip(lengths[part], found, strict=True):
                if length:
                    self._add(current)

    def value(self) -> Tensor:
        """[K] float32; 0 before the first document and for a group without channels."""
        if self._mean is None:
            return torch.zeros(self._n_groups, dtype=torch.float32, device=self._groups.device)
        return self._mean.clone()

    def _quantiles(self, x: Tensor, mask: Tensor | None, lengths: list[int]) -> Tensor:
        """Of each document and group: [b, K] float32; anything for a document of length 0."""
        sizes = self._sizes[:1] if self._alike else self._sizes
        ranks = [[_rank(length * size, self._alpha) for size in sizes] for length in lengths]
        most = [max(k for k, _ in column) for column in zip(*ranks, strict=True)]
        values = self._magnitudes(x, mask)
        if self._alike:
            values = values.unflatten(2, (-1, sizes[0])).transpose(1, 2).flatten(2)
            return _between(values.topk(most[0]).values, ranks)
        largest = []
        for group, k in zip(values.split(sizes, dim=2), most, strict=True):
            top = _largest(group, k) if group.numel() else values.new_zeros(len(x), 1)
            largest.append(F.pad(top, (0, max(most) - top.shape[1])))
        return _between(torch.stack(largest, dim=1), ranks)

    def _magnitudes(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """|x| with its channels in the order of their groups, float32; -1, below all others, at padding."""
        values = x.float().abs()
        if mask is not None:
            values.masked_fill_(~mask[..., None], -1.0)
        if self._order is None:
            return values
        return values.flatten(0, 1).index_select(1, self._order).view_as(values)

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


def _documents_at_once(x: Tensor) -> int:
    """How many documents of x [B, L, C] to work on together: on a CPU one, which may stay in the caches."""
    return 1 if x.device.type == "cpu" else max(1, _ELEMENTS_AT_ONCE // max(1, x.shape[1] * x.shape[2]))


def _rank(n: int, alpha: float) -> tuple[int, float]:
    """k and f: in ascending order, the quantile lies f of the way from the k-th largest to the next."""
    if n == 0:
        return 1, 0.0
    position = alpha * (n - 1)
    return n - math.floor(position), position - math.floor(position)


def _between(top: Tensor, ranks: list[list[tuple[int, float]]]) -> Tensor:
    """The quantiles [b, K] from the largest numbers top [b, K, k], descending; NaN where the largest is NaN.

    ranks  of b documents in K groups, or in one for all groups alike
    """
    k = torch.tensor([[k for k, _ in row] for row in ranks]).to(top.device, non_blocking=True)
    fraction = torch.tensor([[f for _, f in row] for row in ranks], dtype=torch.float64)
    fraction = fraction.to(top.device, non_blocking=True).expand(top.shape[:2])
    low, high = (
        top.gather(2, index.expand(top.shape[:2])[..., None])[..., 0].double()
        for index in (k - 1, (k - 2).clamp(min=0))
    )
    found = torch.lerp(low, high, fraction).float()
    return torch.where(top[..., 0].isnan(), top[..., 0], found)


def _largest(values: Tensor, k: int) -> Tensor:
    """The k largest numbers of each document of values [b, L, C], descending: [b, k].

    They are among the tokens left over by blocks of a channel and in the k blocks with the largest maxima.
    """
    documents, length, channels = values.shape
    whole = length // _BLOCK * _BLOCK
    blocks = values[:, :whole].unflatten(1, (-1, _BLOCK))
    maxima = blocks.amax(dim=2).flatten(1)
    if maxima.shape[1] <= k:
        return values.flatten(1).topk(k).values
    chosen = maxima.topk(k, sorted=False).indices
    document = torch.arange(documents, device=values.device)[:, None]
    inside = blocks[document, chosen // channels, :, chosen % channels]
    return torch.cat([inside.flatten(1), values[:, whole:].flatten(1)], dim=1).topk(k).values


def _channels_of(states: Tensor) -> Tensor:
    """[B, H, P, N] -> [B, H * P, N]; [B, C, N] as it is."""
    return states.flatten(1, 2) if states.dim() == 4 else states


def _count_groups(groups: Tensor, n_groups: int | None) -> int:
    return int(groups.max()) + 1 if n_groups is None else n_groups


def _check_channels(found: int, groups: Tensor) -> None:
    assert found == len(groups), f"{found} channels, but groups are given for {len(groups)}"
