"""Which heads and channels of a Mamba2 block's x share a scale, and the order that puts them side by side.

Sorting and clustering after Quamba2 (Chiang et al. 2025): the channels of a head are sorted by magnitude,
heads with a similar profile form a head group, and the sorted positions of a head group are cut into channel
groups. All of it is single-threaded float64 NumPy, so equal statistics give equal orders on any thread count.

New order from old: ``new[i] = old[perm[i]]``. With ch = channel_perm and hd = head_perm of a ChannelOrder, a
Mamba2 block computes the same function when these are permuted together:

==========================================  =============================================
``in_proj.weight`` (and bias) rows          z and x by ch, B and C unchanged, dt by hd
``conv1d.weight`` and ``bias`` channels     x by ch, those of B and C unchanged
``ssm.A_log``, ``ssm.dt_bias`` [nheads]     by hd
``ssm.D``                                   [nheads] by hd; [d_inner] (D_has_hdim) by ch
``norm.weight`` (gated norm) [d_inner]      by ch
``out_proj.weight`` columns                 by ch (its bias unchanged), before T is folded in
==========================================  =============================================

Channels move with their heads and inside them; nothing leaves its SSD group, so the matrices B and C and the
groups of the gated norm stay valid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quamba.errors import QuambaError


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """A new order of heads and channels, and where the groups end in it. All tensors int64, on the CPU.

    head_perm         [nheads] old index of each new head
    channel_perm      [d_inner] old index of each new channel
    head_group_range  [ngroups, n_head_groups] cumulative ends, in heads of the SSD group
    dim_group_range   [ngroups, n_head_groups, n_channel_groups] cumulative ends, in channels of a head

    QuambaError if the parts contradict each other.
    """

    head_perm: torch.Tensor
    channel_perm: torch.Tensor
    head_group_range: torch.Tensor
    dim_group_range: torch.Tensor

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise QuambaError(f"The channel order is inconsistent: {problem}.")

    @property
    def ngroups(self) -> int:
        return self.dim_group_range.shape[0]

    @property
    def n_head_groups(self) -> int:
        return self.dim_group_range.shape[1]

    @property
    def n_channel_groups(self) -> int:
        return self.dim_group_range.shape[2]

    @property
    def headdim(self) -> int:
        return self.channel_perm.numel() // self.head_perm.numel()

    @functools.cached_property
    def group(self) -> torch.Tensor:
        """[d_inner] int64, group of each new channel:
        (SSD group * n_head_groups + head group) * n_channel_groups + channel group,
        an index into the flattened scales [ngroups, n_head_groups, n_channel_groups].
        """
        head = torch.arange(self.head_perm.numel() // self.ngroups)
        position = torch.arange(self.headdim)
        per_ssd_group = []
        for ssd_group, (head_ends, dim_ends) in enumerate(
            zip(self.head_group_range, self.dim_group_range, strict=True)
        ):
            head_group = torch.searchsorted(head_ends, head, right=True)
            channel_group = torch.stack([torch.searchsorted(ends, position, right=True) for ends in dim_ends])
            first = (ssd_group * self.n_head_groups + head_group) * self.n_channel_groups
            per_ssd_group.append((first[:, None] + channel_group[head_group]).flatten())
        return torch.cat(per_ssd_group)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that ``from_dict`` reads back to an equal order."""
        return {name: getattr(self, name).tolist() for name in _FIELDS}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ChannelOrder:
        """Inverse of ``to_dict``."""
        if set(fields) != set(_FIELDS):
            got = ", ".join(sorted(fields)) or "none"
            raise QuambaError(f"A channel order has the fields {', '.join(_FIELDS)}, got {got}.")
        try:
            return cls(**{name: torch.tensor(fields[name], dtype=torch.int64) for name in _FIELDS})
        except (TypeError, ValueError) as error:
            raise QuambaError(
                f"A field of the channel order is not a regular list of integers: {error}."
            ) from error

    def _problem(self) -> str | None:
        """What contradicts what, or None."""
        for name, ndim in zip(_FIELDS, (1, 1, 2, 3), strict=True):
            tensor = getattr(self, name)
            if tensor.ndim != ndim or tensor.numel() == 0 or tensor.dtype != torch.int64:
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                return f"{name} is {found}, expected int64 with {ndim} dimensions"
        nheads, d_inner = self.head_perm.numel(), self.channel_perm.numel()
        if self.head_group_range.shape != self.dim_group_range.shape[:2]:
            return "head_group_range and dim_group_range disagree on the number of groups"
        if d_inner % nheads or nheads % self.ngroups:
            return f"{d_inner} channels, {nheads} heads and {self.ngroups} SSD groups do not divide"
        if not _is_permutation_inside(self.head_perm, nheads // self.ngroups):
            return "head_perm is not a permutation inside each SSD group"
        old_head = self.channel_perm // self.headdim
        if not torch.equal(old_head, self.head_perm.repeat_interleave(self.headdim)):
            return "channel_perm does not move whole heads by head_perm"
        if not _is_permutation_inside(self.channel_perm, d_inner // self.ngroups):
            return "channel_perm is not a permutation"
        for name, last in (("head_group_range", nheads // self.ngroups), ("dim_group_range", self.headdim)):
            ends = getattr(self, name)
            sizes = torch.diff(ends, prepend=torch.zeros_like(ends[..., :1]))
            if bool((sizes < 1).any()) or bool((ends[..., -1] != last).any()):
                return f"{name} does not rise to {last}"
        return None


def _is_permutation_inside(perm: torch.Tensor, size: int) -> bool:
    """Whether each run of size entries holds exactly the indices of that run."""
    own = torch.arange(perm.numel()).reshape(-1, size)
    return torch.equal(perm.reshape(-1, size).sort(dim=1).values, own)


_FIELDS = ("head_perm", "channel_perm", "head_group_range", "dim_group_range")


def group_heads(stats: torch.Tensor, n_head_groups: int = 4, n_channel_groups: int = 4) -> ChannelOrder:
    """Order and groups for the channels of one block from their magnitudes.

    stats  [ngroups, heads_per_group, headdim] float, >= 0: of each channel of x after the convolution, the
           mean over tokens of |x|, then the maximum over documents

    1. Channels of a head ascending by stats, ties in old order; the sorted vector scaled to L2 norm 1 (an
       all-zero head stays zero).
    2. In each SSD group, Ward clustering of these vectors into n_head_groups. Groups ascending by their mean
       stats, heads of a group in old order.
    3. In each head group, the positions 0..headdim-1 cut into n_channel_groups ranges. A position has one
       value per head of the group; the ranges minimise the squared distance of positions from their range's
       mean. Positions are sorted, so groups should be ranges, and dynamic programming finds the best ranges
       exactly; KMeans depends on its start and may return labels that are no ranges.

    Every group has at least one head and one position. Counts are never reduced to fit: QuambaError for more
    head groups than heads in an SSD group or more channel groups than channels in a head, and for statistics
    that are negative or not finite.
    """
    _check(stats, n_head_groups, n_channel_groups)
    values = stats.detach().to("cpu", torch.float64).numpy()
    ngroups, heads_per_group, headdim = values.shape
    channel_order = np.argsort(values, axis=-1, kind="stable")
    profiles = _unit_rows(np.take_along_axis(values, channel_order, axis=-1))

    head_perm, channel_perm, head_ends, dim_ends = [], [], [], []
    for ssd_group in range(ngroups):
        members = _cluster_heads(profiles[ssd_group], values[ssd_group], n_head_groups)
        order = np.concatenate(members)
        old_heads = ssd_group * heads_per_group + order
        head_perm.append(old_heads)
        channel_perm.append((old_heads[:, None] * headdim + channel_order[ssd_group, order]).ravel())
        head_ends.append(np.cumsum([len(heads) for heads in members]))
        dim_ends.append([_cut(profiles[ssd_group, heads].T, n_channel_groups) for heads in members])
    return ChannelOrder(
        head_perm=torch.from_numpy(np.concatenate(head_perm)),
        channel_perm=torch.from_numpy(np.concatenate(channel_perm)),
        head_group_range=torch.from_numpy(np.stack(head_ends)),
        dim_group_range=torch.from_numpy(np.array(dim_ends)),
    )


def _check(stats: torch.Tensor, n_head_groups: int, n_channel_groups: int) -> None:
    if stats.ndim != 3 or stats.numel() == 0:
        raise QuambaError(
            f"Channel statistics have shape {tuple(stats.shape)}, "
            "expected [ngroups, heads_per_group, headdim]."
        )
    _, heads_per_group, headdim = stats.shape
    for name, count, limit, where in (
        ("n_head_groups", n_head_groups, heads_per_group, "heads in each SSD group"),
        ("n_channel_groups", n_channel_groups, headdim, "channels in each head"),
    ):
        if not 1 <= count <= limit:
            raise QuambaError(
                f"{name} is {count}, but there are {limit} {where}: expected 1 to {limit}, "
                f"nearest {min(max(count, 1), limit)}."
            )
    if not bool(((stats >= 0) & torch.isfinite(stats)).all()):
        raise QuambaError("Channel statistics hold negative or non-finite values, expected means of |x|.")


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """rows / their L2 norm, 0 for zero rows. Scaled by the maximum first: squares of tiny values vanish."""
    peak = rows.max(axis=-1, keepdims=True)
    scaled = np.divide(rows, peak, out=np.zeros_like(rows), where=peak > 0)
    norm = np.sqrt(np.square(scaled).sum(axis=-1, keepdims=True))
    return np.divide(scaled, norm, out=np.zeros_like(rows), where=norm > 0)


def _cluster_heads(profiles: np.ndarray, values: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each Ward cluster of profiles, ascending; clusters ascending by the mean of their values."""
    if count == 1:  # scikit-learn wants two samples
        return [np.arange(len(profiles))]
    from sklearn.cluster import AgglomerativeClustering

    labels = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(profiles)
    members = [np.flatnonzero(labels == label) for label in range(count)]
    return sorted(members, key=lambda heads: (values[heads].mean(), heads[0]))


def _cut(features: np.ndarray, count: int) -> np.ndarray:
    """Ends [count] of the consecutive ranges of rows with the least sum of squares around the range means.

    features [positions, dims]. best[e] = least cost of rows 0..e-1 in the ranges so far; one more range is
    best'[e] = min_b best[b] + cost[b, e]. Ties go to the smaller b. O(count * positions^2).
    """
    positions = len(features)
    cost = _range_costs(features)
    best, starts = cost[0], []
    for _ in range(count - 1):
        candidates = best[:, None] + cost
        starts.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    ends = [positions]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return np.array(ends[::-1], dtype=np.int64)


def _range_costs(features: np.ndarray) -> np.ndarray:
    """cost[b, e] = sum over rows b..e-1 of |row - mean of these rows|^2; inf for empty ranges (e <= b).

    [positions + 1, positions + 1]. From running sums that start at row b, relative to row b: constant ranges
    cost exactly 0.
    """
    positions = len(features)
    cost = np.full((positions + 1, positions + 1), np.inf)
    for begin in range(positions):
        offset = features[begin:] - features[begin]
        size = np.arange(1, positions - begin + 1)
        squares = np.square(offset).cumsum(axis=0).sum(axis=1)
        mean_part = np.square(offset.cumsum(axis=0)).sum(axis=1) / size
        cost[begin, begin + 1 :] = np.maximum(squares - mean_part, 0.0)
    return cost
