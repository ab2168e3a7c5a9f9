"""Sums over batches equal the formulas on all values at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.analysis.statistics import Codes, Noise, Predictions, Ranges
from quamba.evaluation.perplexity import perplexity
from quamba.formats.activation import Quantized


def test_noise_by_hand() -> None:
    noise = Noise()
    noise.update(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 0.5]))
    noise.update(torch.tensor([4.0]), torch.tensor([4.0]))
    assert noise.snr_db == pytest.approx(10 * math.log10(25 / 0.25), abs=1e-12)


def test_codes_count_with_their_real_values() -> None:
    noise = Noise()
    noise.update(
        torch.tensor([[1.0, -2.0]]), Quantized(torch.tensor([[3, -2]]).to(torch.int8), _scale(0.5, 1))
    )
    assert noise.snr_db == pytest.approx(10 * math.log10(5 / 0.25), abs=1e-12)


@pytest.mark.parametrize(
    ("wanted", "got", "snr"),
    [(1.0, 1.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (1.0, math.inf, -math.inf)],
    ids=["equal", "zeros", "no signal", "overflow"],
)
def test_noise_at_its_ends(wanted: float, got: float, snr: float) -> None:
    noise = Noise()
    noise.update(torch.tensor([wanted]), torch.tensor([got]))
    assert noise.snr_db == snr


def test_nan_stays() -> None:
    noise = Noise()
    noise.update(torch.ones(2), torch.tensor([1.0, math.nan]))
    assert math.isnan(noise.snr_db)


def test_noise_of_float16_is_computed_wider() -> None:
    noise = Noise()
    noise.update(torch.full((1,), 300.0, dtype=torch.float16), torch.full((1,), 299.0, dtype=torch.float16))
    assert noise.snr_db == pytest.approx(20 * math.log10(300), abs=1e-9)


def test_ranges_are_those_of_all_values() -> None:
    x = torch.randn(3, 500, 7, dtype=torch.float64).pow(3) + 2.0
    x[1, 3, 4] = -90.0
    ranges = Ranges(7)
    for part in x:
        ranges.update(part[None].float())
    found = ranges.report()
    x = x.float().double()
    centred = x - x.mean()
    assert found.absmax == 90.0
    assert found.std == pytest.approx(float(x.std(correction=0)), rel=1e-9)
    assert found.kurtosis == pytest.approx(
        float(centred.pow(4).mean() / centred.square().mean().square()), rel=1e-9
    )
    by_channel = x.abs().amax((0, 1))
    assert [c for c, _ in found.outlier_channels] == by_channel.topk(3).indices.tolist()
    assert found.outlier_channels[0] == (4, 90.0)
    assert found.outlier_ratio == pytest.approx(90 / float(by_channel.median()), rel=1e-6)
    for name, value in found.percentiles.items():
        wanted = float(x.abs().flatten().quantile(float(name) / 100))
        assert value == pytest.approx(wanted, rel=0.02), name


def test_percentiles_of_a_known_spread() -> None:
    """|x| in equal steps from 0 to 1000, in both signs: the 99th percentile is 990."""
    x = torch.linspace(0, 1000, 100_001)
    x[::2] *= -1
    ranges = Ranges(1)
    ranges.update(x[None, :, None])
    assert ranges.report().percentiles == pytest.approx({"99": 990, "99.9": 999, "99.99": 999.9}, rel=2e-3)


def test_ranges_of_zeros_and_of_one_value() -> None:
    for value, ratio in ((0.0, 1.0), (2.0, 1.0)):
        ranges = Ranges(3)
        ranges.update(torch.full((1, 4, 3), value))
        found = ranges.report()
        assert (found.absmax, found.std, found.outlier_ratio) == (value, 0.0, ratio)
        assert math.isnan(found.kurtosis)


def test_codes_at_their_limits() -> None:
    codes = Codes()
    codes.update(torch.ones(1, 3), torch.ones(1, 3))
    assert (codes.at_limit, codes.clipped) == (None, None)
    wanted = torch.tensor([[127.4, -127.6, -500.0, 126.0]])
    codes.update(wanted, Quantized(torch.tensor([[127, -127, -128, 126]]).to(torch.int8), _scale(1.0)))
    scales = _scale(1.0, 0.5, 2.0, 1.0)  # one a channel: 64 is beyond 127.5 halves
    wanted = torch.tensor([[64.0, -64.0, 250.0, 0.0]])
    codes.update(wanted, Quantized(torch.tensor([[64, -127, 125, 0]]).to(torch.int8), scales))
    assert (codes.at_limit, codes.clipped) == (4 / 8, 3 / 8)


def test_predictions_are_those_of_all_logits() -> None:
    ids = torch.randint(0, 11, (4, 9))
    p, q = (2 * torch.randn(4, 9, 11) for _ in range(2))
    found = Predictions(9)
    for rows in (slice(0, 3), slice(3, 4)):
        found.add_windows(len(ids[rows]))
        for start in (0, 4, 8):
            part = slice(start, start + 4)
            found.update(p[rows, part], q[rows, part], ids[rows], start)
    report = found.report()
    kl = F.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert report.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-12)
    assert report.kl_mean == pytest.approx(float(kl.mean()), rel=1e-12)
    assert report.kl_max == pytest.approx(float(kl.max()), rel=1e-12)
    assert report.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for logits, value in ((q, report.perplexity), (p, report.float_perplexity)):
        assert value == pytest.approx(perplexity(_given(logits), ids, batch_size=4).perplexity, rel=1e-6)


def _given(logits: Tensor) -> object:
    return lambda batch: logits


def _scale(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0])
