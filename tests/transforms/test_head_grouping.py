"""Head and channel groups: planted clusters come back, and every order stays inside its SSD groups."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from quamba.errors import QuambaError
from quamba.transforms.head_grouping import ChannelOrder, _cut, group_heads


def random_stats(ngroups: int, heads: int, headdim: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ngroups, heads, headdim, generator=generator).exp()


def planted_stats() -> tuple[torch.Tensor, list[list[int]]]:
    """[1, 6, 16]: heads 1, 4 | 0, 3, 5 | 2 in ascending mean, 12+4, 8+8, 4+12 channels of two levels."""
    groups = [[1, 4], [0, 3, 5], [2]]
    levels = [(0.1, 0.2, 12), (0.5, 5.0, 8), (1.0, 30.0, 4)]
    generator = torch.Generator().manual_seed(11)
    stats = torch.empty(1, 6, 16)
    for heads, (low, high, n_low) in zip(groups, levels, strict=True):
        for head in heads:
            profile = torch.cat([torch.full((n_low,), low), torch.full((16 - n_low,), high)])
            profile = profile * (1 + 0.01 * torch.rand(16, generator=generator))
            stats[0, head] = profile[torch.randperm(16, generator=generator)]
    return stats, groups


def assert_consistent(order: ChannelOrder, stats: torch.Tensor) -> None:
    """Permutations, ranges and group ids say the same, recomputed here by loops."""
    ngroups, heads_per_group, headdim = stats.shape
    nheads = ngroups * heads_per_group
    flat = stats.flatten()
    assert sorted(order.head_perm.tolist()) == list(range(nheads))
    assert sorted(order.channel_perm.tolist()) == list(range(flat.numel()))
    group = []
    for new_head in range(nheads):
        ssd_group, local = divmod(new_head, heads_per_group)
        assert order.head_perm[new_head] // heads_per_group == ssd_group
        channels = order.channel_perm[new_head * headdim : (new_head + 1) * headdim]
        assert (channels // headdim == order.head_perm[new_head]).all()
        assert (flat[channels].diff() >= 0).all()
        head_group = sum(local >= end for end in order.head_group_range[ssd_group].tolist())
        for position in range(headdim):
            ends = order.dim_group_range[ssd_group, head_group].tolist()
            channel_group = sum(position >= end for end in ends)
            first = (ssd_group * order.n_head_groups + head_group) * order.n_channel_groups
            group.append(first + channel_group)
    assert order.group.dtype == torch.int64
    assert order.group.tolist() == group
    assert sorted(set(group)) == list(range(ngroups * order.n_head_groups * order.n_channel_groups))


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1, 24, 64), (4, 4)),
        ((8, 16, 64), (4, 4)),
        ((2, 4, 8), (4, 4)),
        ((1, 12, 64), (3, 5)),
        ((3, 1, 7), (1, 7)),
        ((2, 5, 1), (2, 1)),
    ],
)
def test_orders_are_consistent(shape, counts):
    stats = random_stats(*shape)
    order = group_heads(stats, *counts)
    assert order.head_group_range.shape == (shape[0], counts[0])
    assert order.dim_group_range.shape == (shape[0], *counts)
    assert (order.ngroups, order.n_head_groups, order.n_channel_groups) == (shape[0], *counts)
    assert order.headdim == shape[2]
    assert_consistent(order, stats)


def test_planted_groups_come_back():
    stats, groups = planted_stats()
    order = group_heads(stats, n_head_groups=3, n_channel_groups=2)
    assert order.head_perm.tolist() == [head for heads in groups for head in heads]
    assert order.head_group_range.tolist() == [[2, 5, 6]]
    assert order.dim_group_range.tolist() == [[[12, 16], [8, 16], [4, 16]]]
    assert_consistent(order, stats)


def test_ssd_groups_are_grouped_alone():
    first, second = random_stats(1, 8, 16, seed=1), random_stats(1, 8, 16, seed=2)
    together = group_heads(torch.cat([first, second]))
    alone = [group_heads(first), group_heads(second)]
    assert torch.equal(together.head_group_range, torch.cat([o.head_group_range for o in alone]))
    assert torch.equal(together.dim_group_range, torch.cat([o.dim_group_range for o in alone]))
    assert torch.equal(together.head_perm, torch.cat([alone[0].head_perm, alone[1].head_perm + 8]))
    assert torch.equal(together.channel_perm, torch.cat([alone[0].channel_perm, alone[1].channel_perm + 128]))


def test_heads_are_grouped_by_shape_not_size():
    flat, steep = torch.ones(8), torch.tensor([0.01] * 7 + [1.0])
    stats = torch.stack([steep, 100 * flat, 3 * flat, 50 * steep]).unsqueeze(0)
    order = group_heads(stats, 2, 2)
    assert order.head_perm.tolist() == [0, 3, 1, 2]
    assert order.head_group_range.tolist() == [[2, 4]]


def test_permuted_statistics_are_in_order_already():
    stats = random_stats(2, 8, 16)
    order = group_heads(stats)
    again = group_heads(stats.flatten()[order.channel_perm].reshape(stats.shape))
    assert torch.equal(again.channel_perm, torch.arange(2 * 8 * 16))
    assert torch.equal(again.group, order.group)


@pytest.mark.parametrize("zeros", [[0], [0, 2, 5], list(range(8))])
def test_silent_heads(zeros):
    stats = random_stats(1, 8, 16)
    stats[0, zeros] = 0
    assert_consistent(group_heads(stats), stats)


def test_equal_heads_and_channels_keep_their_order():
    order = group_heads(torch.ones(1, 4, 8), n_head_groups=1)
    assert torch.equal(order.channel_perm, torch.arange(32))


def test_dtype_and_layout_do_not_matter():
    stats = random_stats(2, 8, 16).half()
    expected = group_heads(stats.double()).to_dict()
    assert group_heads(stats).to_dict() == expected
    assert group_heads(stats.transpose(0, 2).contiguous().transpose(0, 2).float()).to_dict() == expected


def test_deterministic_for_any_thread_count():
    script = (
        "import torch, json\n"
        "from quamba.transforms.head_grouping import group_heads\n"
        "g = torch.Generator().manual_seed(5)\n"
        "print(json.dumps(group_heads(torch.rand(2, 32, 64, generator=g)).to_dict()))\n"
    )
    results = []
    for threads in ("1", "3"):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        results.append(
            subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout
        )
    generator = torch.Generator().manual_seed(5)
    here = group_heads(torch.rand(2, 32, 64, generator=generator)).to_dict()
    assert results[0] == results[1]
    assert json.loads(results[0]) == here


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_cut_is_the_best_of_all_cuts(seed, count):
    features = np.sort(np.random.default_rng(seed).random((9, 3)), axis=0)

    def cost(ends: tuple[int, ...]) -> float:
        bounds = [0, *ends, 9]
        parts = [features[a:b] for a, b in itertools.pairwise(bounds)]
        return sum(np.square(part - part.mean(axis=0)).sum() for part in parts)

    best = min(itertools.combinations(range(1, 9), count - 1), key=cost)
    assert _cut(features, count).tolist() == [*best, 9]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_cut_of_constant_features(count):
    ends = _cut(np.full((5, 2), 0.3), count).tolist()
    assert len(ends) == count and ends[-1] == 5 and (np.diff([0, *ends]) >= 1).all()


def test_dict_round_trip_through_json():
    order = group_heads(random_stats(2, 8, 16))
    back = ChannelOrder.from_dict(json.loads(json.dumps(order.to_dict())))
    assert back.to_dict() == order.to_dict()
    assert torch.equal(back.group, order.group)
    assert back.channel_perm.dtype == torch.int64


@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    [
        (
            (2, 3, 64),
            (4, 4),
            "n_head_groups is 4, but there are 3 heads in each SSD group: expected 1 to 3, nearest 3",
        ),
        (
            (1, 8, 3),
            (4, 4),
            "n_channel_groups is 4, but there are 3 channels in each head: expected 1 to 3, nearest 3",
        ),
        ((1, 8, 8), (0, 4), "n_head_groups is 0.*nearest 1"),
        ((8, 8), (4, 4), r"shape \(8, 8\), expected \[ngroups, heads_per_group, headdim\]"),
        ((1, 0, 8), (4, 4), r"shape \(1, 0, 8\)"),
    ],
)
def test_refused_sizes(shape, counts, message):
    with pytest.raises(QuambaError, match=message):
        group_heads(torch.ones(shape), *counts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_refused_statistics(value):
    stats = random_stats(1, 8, 8)
    stats[0, 3, 2] = value
    with pytest.raises(QuambaError, match="negative or non-finite"):
        group_heads(stats)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head_perm", lambda v: [v[0], *v[:-1]], "head_perm is not a permutation"),
        ("head_perm", lambda v: v[::-1], "head_perm is not a permutation inside each SSD group"),
        ("head_perm", lambda v: v[:-1], "do not divide"),
        ("channel_perm", lambda v: v[::-1], "does not move whole heads"),
        ("channel_perm", lambda v: [v[1], *v[1:]], "channel_perm is not a permutation"),
        (
            "head_group_range",
            lambda v: [[e + 1 for e in row] for row in v],
            "head_group_range does not rise to 8",
        ),
        (
            "dim_group_range",
            lambda v: [[row[::-1] for row in g] for g in v],
            "dim_group_range does not rise to 16",
        ),
        ("head_group_range", lambda v: v[:1], "disagree"),
        ("head_group_range", lambda v: v[0], "expected int64 with 2 dimensions"),
        ("dim_group_range", lambda v: [v[0], v[1][:-1]], "not a regular list of integers"),
        ("head_perm", lambda v: ["a"], "not a regular list of integers"),
    ],
)
def test_damaged_orders_are_refused(name, change, message):
    fields = group_heads(random_stats(2, 8, 16)).to_dict()
    with pytest.raises(QuambaError, match=message):
        ChannelOrder.from_dict({**fields, name: change(fields[name])})


def test_missing_field_is_named():
    fields = group_heads(random_stats(1, 4, 4)).to_dict()
    fields.pop("head_perm")
    with pytest.raises(QuambaError, match=r"has the fields head_perm, .*, got channel_perm"):
        ChannelOrder.from_dict(fields)
