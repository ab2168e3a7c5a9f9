from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.errors import QuambaError
from quamba.evaluation import perplexity as module
from quamba.evaluation.perplexity import nll_sum, perplexity, windows


def random_case(batch: int, length: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * length + vocab)
    logits = 5 * torch.randn(batch, length, vocab, generator=generator)
    return logits, torch.randint(vocab, (batch, length), generator=generator)


def exact_nll(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).item()


def test_windows_do_not_overlap_and_drop_the_remainder() -> None:
    assert windows(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(8, dtype=torch.int32), 4).dtype == torch.int64
    assert windows(torch.arange(8)[None], 8).shape == (1, 8)


def test_windows_refuses_short_texts_and_lengths() -> None:
    with pytest.raises(QuambaError, match="The text has 7 tokens, fewer than one window of 8"):
        windows(range(7), 8)
    for length in (1, 0, -5, 2.5):
        with pytest.raises(QuambaError, match="expected an integer of at least 2"):
            windows(range(7), length)  # type: ignore[arg-type]


def test_by_hand() -> None:
    """Probabilities 1/2 and 1/8 for the two predicted tokens: the mean is 2 bits, the perplexity 4."""
    probabilities = torch.tensor([[0.25, 0.5, 0.25], [0.125, 0.375, 0.5], [1e-9, 1e-9, 1.0]])

    def logits(ids: Tensor) -> Tensor:
        return probabilities.log()[None].expand(len(ids), -1, -1).double()

    result = perplexity(logits, torch.tensor([[2, 1, 0]] * 5), batch_size=2)
    assert result.perplexity == pytest.approx(4.0, rel=1e-7)  # float32 logarithms
    assert result.nll_mean == pytest.approx(2 * math.log(2), rel=1e-7)
    assert (result.tokens_scored, result.windows, result.window_length) == (10, 5, 3)
    assert result.rule == "mean over the L-1 predicted tokens of each non-overlapping window"


def test_uniform_logits_give_the_vocabulary_size() -> None:
    result = perplexity(
        lambda ids: torch.zeros(*ids.shape, 96, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.int64)
    )
    assert result.perplexity == pytest.approx(96, rel=1e-14)


@pytest.mark.parametrize("slice_bytes", [1, 4 * 50 * 7, 1 << 20])
@pytest.mark.parametrize("length", [2, 63, 65])
def test_slices_give_the_plain_cross_entropy(
    length: int, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_BYTES", slice_bytes)
    logits, ids = random_case(3, length, 50)
    exact = exact_nll(logits, ids)
    assert nll_sum(logits.double(), ids) == pytest.approx(exact, rel=1e-14)
    # The mean error of a token is below that of its own float32 logarithm.
    tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    exact_tokens = F.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    assert abs(nll_sum(logits, ids) - exact) <= 2 * (tokens - exact_tokens).abs().sum().item()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits, ids = random_case(2, 33, 50)
    half = logits.half()
    assert nll_sum(half, ids) == nll_sum(half.float(), ids)


def test_the_first_token_and_the_last_logits_do_not_count() -> None:
    logits, ids = random_case(2, 10, 20)
    before = nll_sum(logits, ids)
    logits[:, -1] = float("nan")
    ids[:, 0] = 0
    assert nll_sum(logits, ids) == before


def test_batches_progress_and_max_windows() -> None:
    logits, ids = random_case(7, 12, 30)
    seen: list[int] = []
    calls: list[tuple[int, int]] = []

    def logits_fn(batch: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        start = sum(seen)
        seen.append(len(batch))
        assert torch.equal(batch, ids[start : start + len(batch)])
        return logits[start : start + len(batch)]

    result = perplexity(logits_fn, ids, batch_size=3, progress=lambda *a: calls.append(a), max_windows=5)
    assert seen == [3, 2]
    assert calls == [(3, 5), (5, 5)]
    assert (result.windows, result.tokens_scored) == (5, 55)
    exact = exact_nll(logits[:5], ids[:5]) / 55
    assert result.nll_mean == pytest.approx(exact, rel=1e-7)
    assert result.perplexity == math.exp(result.nll_mean)
    assert result.seconds > 0
    stated = json.loads(json.dumps(result.to_dict()))
    assert stated["tokens_scored"] == 55
    assert stated["stride"] == stated["window_length"] == result.window_length


def test_batch_size_changes_no_bit() -> None:
    logits, ids = random_case(6, 40, 64)
    values = set()
    for size in (1, 4, 6, 100):
        parts = iter(logits.split(size))
        values.add(perplexity(lambda _, parts=parts: next(parts), ids, batch_size=size).nll_mean)
    # Float64 sums in another order agree to a few of their last bits.
    assert max(values) - min(values) <= 4 * math.ulp(max(values))


def test_hopeless_models_do_not_overflow() -> None:
    ids = torch.tensor([[0, 1]])
    assert perplexity(lambda _: torch.tensor([[[0.0, -1e4]] * 2]), ids).perplexity == math.inf
    assert math.isnan(perplexity(lambda _: torch.full((1, 2, 2), float("nan")), ids).perplexity)


@pytest.mark.parametrize("setting", ["batch_size", "max_windows"])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(QuambaError, match=f"{setting} is 0, expected at least 1"):
        perplexity(lambda ids: ids, torch.zeros(1, 2, dtype=torch.int64), **{setting: 0})
