from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quamba.calibration import observers
from quamba.calibration.observers import (
    AbsMax,
    ChannelMean,
    Percentile,
    StateAbsMax,
    StatePercentile,
    make_observer,
    make_state_observer,
)
from quamba.errors import QuambaError

ONE_GROUP = torch.zeros(24, dtype=torch.int64)
SORTED = torch.arange(24) // 6
MIXED = torch.arange(24) * 7 % 4


def activations(batch: int, length: int, channels: int = 24, seed: int = 0) -> Tensor:
    """Heavy-tailed, with ties."""
    x = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed)) ** 3
    x[:, ::5] = x[:, ::5].round()
    return x


def quantile(document: Tensor, groups: Tensor, alpha: float) -> Tensor:
    """torch.quantile in float64, group by group."""
    return torch.stack(
        [document.double().abs()[:, groups == k].quantile(alpha) for k in range(int(groups.max()) + 1)]
    )


def test_absmax_by_hand() -> None:
    x = torch.tensor([[[1.0, -2.0, 3.0], [0.5, 1.0, -9.0]], [[-4.0, 0.0, 0.0], [8.0, 8.0, 8.0]]])
    observer = AbsMax(torch.tensor([1, 0, 1]), 2)
    observer.update(x, torch.tensor([[True, False], [True, False]]))
    assert observer.value().tolist() == [2.0, 4.0]
    observer.update(x[:1])
    assert observer.value().tolist() == [2.0, 9.0]
    observer.update(x[1:], torch.zeros(1, 2, dtype=torch.bool))
    assert observer.value().tolist() == [2.0, 9.0]


@pytest.mark.parametrize("groups", [ONE_GROUP, SORTED, MIXED])
@pytest.mark.parametrize("alpha", [0.9995, 0.99999, 0.99, 0.5, 0.01])
@pytest.mark.parametrize("length", [1, 15, 16, 63, 65, 400])
def test_percentile_is_torch_quantile(groups: Tensor, alpha: float, length: int) -> None:
    x = activations(1, length, seed=length)
    observer = Percentile(groups, int(groups.max()) + 1, alpha)
    observer.update(x)
    assert torch.equal(observer.value(), quantile(x[0], groups, alpha).float())


def test_percentile_by_hand() -> None:
    observer = Percentile(torch.zeros(1, dtype=torch.int64), 1, 0.75, sigma=0.5)
    observer.update(torch.tensor([[[-4.0], [1.0], [2.0], [3.0]]]))  # position 2.25 of 1 2 3 4
    assert observer.value().tolist() == [3.25]
    observer.update(
        torch.tensor([[[7.25], [7.25], [99.0], [0.0]]]), torch.tensor([[True, True, False, False]])
    )
    assert observer.value().tolist() == [5.25]


def test_percentile_averages_documents_in_order() -> None:
    x = activations(5, 50)
    observer = Percentile(SORTED, 4, 0.99, sigma=0.01)
    observer.update(x)
    mean = quantile(x[0], SORTED, 0.99).float()
    for document in x[1:]:
        mean = mean + 0.01 * (quantile(document, SORTED, 0.99).float() - mean)
    assert torch.equal(observer.value(), mean)
    backwards = Percentile(SORTED, 4, 0.99, sigma=0.01)
    backwards.update(x.flip(0))
    assert not torch.equal(backwards.value(), mean)


def test_percentile_of_more_than_2_to_the_24_elements() -> None:
    x = torch.arange(2**24 + 5, dtype=torch.float32).view(1, -1, 1)
    observer = Percentile(torch.zeros(1, dtype=torch.int64), 1, 0.75)
    observer.update(x)
    assert observer.value().item() == 0.75 * (2**24 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_accumulators_are_float32(dtype: torch.dtype) -> None:
    x, states = activations(2, 8).to(dtype), activations(2, 24, 4).to(dtype)
    for observer in (AbsMax(MIXED, 4), Percentile(MIXED, 4, 0.9), ChannelMean(24)):
        assert observer.value().dtype == torch.float32
        observer.update(x)
        assert observer.value().dtype == torch.float32
    for state_observer in (StateAbsMax(MIXED, 4), StatePercentile(MIXED, 4, 0.9)):
        state_observer.update(states)
        assert state_observer.value().dtype == torch.float32


OBSERVERS: list[Callable[[], AbsMax | Percentile | ChannelMean]] = [
    lambda: AbsMax(MIXED, 4),
    lambda: Percentile(MIXED, 4, 0.98),
    lambda: Percentile(ONE_GROUP, 1, 0.9995),
    lambda: ChannelMean(24),
]


@pytest.mark.parametrize("make", OBSERVERS)
def test_batching_and_padding_change_no_bit(make: Callable[[], AbsMax | Percentile | ChannelMean]) -> None:
    lengths = [130, 77, 64, 31, 1]
    documents = [activations(1, n, seed=n)[0] for n in lengths]
    alone = make()
    for document in documents:
        alone.update(document[None])
    for size in (1, 2, 5):
        batched = make()
        for start in range(0, 5, size):
            part = documents[start : start + size]
            longest = max(map(len, part))
            x = torch.full((len(part), longest, 24), 1e9)
            mask = torch.zeros(len(part), longest, dtype=torch.bool)
            for row, document in enumerate(part):
                x[row, longest - len(document) :] = document
                mask[row, longest - len(document) :] = True
            batched.update(x, mask)
        assert torch.equal(batched.value(), alone.value())


@pytest.mark.parametrize("together", [2, 5])
@pytest.mark.parametrize("alpha", [0.5, 0.98, 0.9999])
@pytest.mark.parametrize(
    "groups", [ONE_GROUP, SORTED, MIXED, torch.arange(24) // 23 * 3, torch.arange(128) % 64]
)
def test_documents_ranked_together_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, groups: Tensor, alpha: float, together: int
) -> None:
    """Padding anywhere, a document of nothing, groups without channels, groups all alike, NaN in one."""
    x = activations(6, 70, len(groups))
    x[4, 20, 3] = math.nan
    mask = torch.rand(6, 70) < torch.tensor([1.0, 0.9, 0.0, 0.5, 1.0, 0.02])[:, None]
    x[~mask] = 1e9
    n_groups = int(groups.max()) + 1
    for chosen in (None, mask):
        valid = torch.ones_like(mask) if chosen is None else chosen
        alone, several = (Percentile(groups, n_groups, alpha, sigma=0.5) for _ in range(2))
        for part in (slice(0, 4), slice(4, 6)):
            for document, tokens in zip(x[part], valid[part], strict=True):
                alone.update(document[tokens][None])
            with monkeypatch.context() as patched:
                patched.setattr(observers, "_documents_at_once", lambda x: together)
                several.update(x[part], None if chosen is None else chosen[part])
            torch.testing.assert_close(several.value(), alone.value(), rtol=0, atol=0, equal_nan=True)
            assert several.value().isnan().any() == (part.start == 4)


@pytest.mark.parametrize("make", OBSERVERS)
def test_strides_change_no_bit(make: Callable[[], AbsMax | Percentile | ChannelMean]) -> None:
    wide = activations(3, 65, 60)
    plain, slice_, transposed = make(), make(), make()
    plain.update(wide[..., 10:34].contiguous())
    slice_.update(wide[..., 10:34])
    transposed.update(wide[..., 10:34].transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(plain.value(), slice_.value())
    assert torch.equal(plain.value(), transposed.value())


@pytest.mark.parametrize("make", OBSERVERS)
def test_value_is_a_copy_and_update_leaves_the_input(
    make: Callable[[], AbsMax | Percentile | ChannelMean],
) -> None:
    x = activations(2, 40)
    before, observer = x.clone(), make()
    observer.update(x)
    assert torch.equal(x, before)
    first = observer.value()
    kept = first.clone()
    observer.update(x * 100)
    assert torch.equal(first, kept) and not torch.equal(observer.value(), kept)


@pytest.mark.parametrize("make", OBSERVERS)
def test_nan_is_not_hidden(make: Callable[[], AbsMax | Percentile | ChannelMean]) -> None:
    x = activations(2, 40)
    x[1, 3, 5] = float("nan")
    observer = make()
    observer.update(x)
    assert observer.value().isnan().any()
    observer.update(activations(1, 40))
    assert observer.value().isnan().any()


def test_a_group_without_channels_is_zero() -> None:
    groups = torch.tensor([0, 2, 2])
    for observer in (AbsMax(groups, 4), Percentile(groups, 4, 0.9)):
        observer.update(torch.ones(2, 5, 3))
        assert observer.value().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_channel_mean_by_hand() -> None:
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[-1.0, 8.0], [50.0, 50.0]]])
    observer = ChannelMean(2)
    observer.update(x, torch.tensor([[True, True], [True, False]]))
    assert observer.value().tolist() == [2.0, 8.0]
    observer.update(x[1:])
    assert observer.value().tolist() == [25.5, 29.0]


def test_state_absmax_by_hand() -> None:
    states = torch.tensor([[[[1.0, -5.0]], [[2.0, 3.0]], [[-4.0, 0.0]]]])  # [1, 3 heads, 1, 2]
    observer = StateAbsMax(torch.tensor([1, 0, 1]), 2)
    observer.update(states)
    assert observer.value().tolist() == [[2.0, 3.0], [4.0, 5.0]]
    observer.update(torch.tensor([[[0.0, 0.0], [-7.0, 0.0], [0.0, 0.0]]]))  # [1, 3, 2]
    assert observer.value().tolist() == [[7.0, 3.0], [4.0, 5.0]]
    reduced = StateAbsMax(torch.tensor([1, 0, 1]), 2, per_state=False)
    reduced.update(states)
    assert reduced.value().tolist() == [[3.0], [5.0]]


def test_state_observers_flatten_heads_as_torch_does() -> None:
    states = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    flat = states.flatten(1, 2)
    observer = StateAbsMax(MIXED, 4)
    observer.update(states)
    expected = torch.stack([flat[:, k == MIXED].abs().amax(dim=(0, 1)) for k in range(4)])
    assert torch.equal(observer.value(), expected)
    percentile = StatePercentile(MIXED, 4, 0.9)
    percentile.update(states[:1])
    assert percentile.value().shape == (4, 1)
    assert torch.equal(percentile.value()[:, 0], quantile(flat[0].T, MIXED, 0.9).float())
    one_by_one = StatePercentile(MIXED, 4, 0.9)
    for row in states:
        one_by_one.update(row[None])
    percentile = StatePercentile(MIXED, 4, 0.9)
    percentile.update(flat)
    assert torch.equal(percentile.value(), one_by_one.value())


def test_the_factories_choose() -> None:
    assert isinstance(make_observer(MIXED, 1.0), AbsMax)
    assert isinstance(make_observer(MIXED, 0.9995), Percentile)
    assert isinstance(make_state_observer(MIXED, 1.0), StateAbsMax)
    assert isinstance(make_state_observer(MIXED, 0.9995), StatePercentile)
    assert make_observer(MIXED, 1.0).value().shape == (4,)
    assert make_observer(MIXED, 0.5, n_groups=7).value().shape == (7,)
    reduced = make_state_observer(MIXED, 1.0, per_state=False)
    reduced.update(torch.ones(1, 24, 3))
    assert reduced.value().shape == (4, 1)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan"), 99.95])
def test_bad_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(QuambaError, match=r"percentile alpha is .*, expected 0 < alpha <= 1"):
        make_observer(MIXED, alpha)


def test_percentile_points_to_absmax() -> None:
    with pytest.raises(QuambaError, match="use AbsMax"):
        Percentile(MIXED, 4, 1.0)
    with pytest.raises(QuambaError, match="sigma is 0"):
        Percentile(MIXED, 4, 0.5, sigma=0.0)


@pytest.mark.parametrize(("channels", "size"), [(96, 1), (192, 2)])
@pytest.mark.parametrize("alpha", [0.9, 0.9995])
def test_many_equal_groups_are_each_their_own_quantile(channels: int, size: int, alpha: float) -> None:
    n_groups = channels // size
    groups = torch.arange(n_groups).repeat(size)  # interleaved, so that channels must be gathered
    x = torch.randn(2, 57, channels)
    x[1, 3, 5] = math.nan
    observer = Percentile(groups, n_groups, alpha, sigma=1.0)
    observer.update(x[:1])
    for g in range(n_groups):
        expected = torch.quantile(x[0][:, groups == g].abs().double().flatten(), alpha).float()
        assert observer.value()[g] == expected
    observer.update(x[1:])
    assert observer.value().isnan().sum() == 1
