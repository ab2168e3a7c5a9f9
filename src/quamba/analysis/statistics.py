"""Sums that grow batch by batch: noise, ranges, and what happens to the predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.calibration.observers import AbsMax
from quamba.formats.activation import Activation, Quantized, as_float

INT8_LIMIT = 127
PERCENTILES = (99.0, 99.9, 99.99)
OUTLIER_CHANNELS = 3
# |x| in bins of 1/64 of an octave, from 2^-40 to 2^24: the upper bits of a float32, less those of 2^-40.
_MANTISSA_BITS, _LOWEST, _OCTAVES = 6, -40, 64
_SHIFT = 23 - _MANTISSA_BITS
_BINS = _OCTAVES << _MANTISSA_BITS
_FIRST = (127 + _LOWEST) << _MANTISSA_BITS


class Noise:
    """snr_db = 10 log10(sum f^2 / sum (f - q)^2), in float64: the float f as signal, its error as noise."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._signal, self._noise = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def update(self, wanted: Tensor, got: Activation) -> None:
        """Two tensors of one shape; int8 codes count with their real values."""
        wanted = _wide(wanted)
        self._signal += wanted.square().sum(dtype=torch.float64)
        self._noise += (wanted - as_float(got, wanted.dtype)).square().sum(dtype=torch.float64)

    @property
    def snr_db(self) -> float:
        """Infinity without noise, -infinity with noise alone, NaN where either is."""
        signal, noise = float(self._signal), float(self._noise)
        if math.isnan(signal) or math.isnan(noise):
            return math.nan
        if noise == 0:
            return math.inf
        if math.isinf(noise) or signal == 0:
            return -math.inf
        return 10 * math.log10(signal / noise)


@dataclass(frozen=True)
class RangeReport:
    """Of all values x at a site of the float model.

    percentiles       of |x|, to about 1%: "99.9" -> value
    kurtosis          mean ((x - mean) / std)^4: 3 for a normal distribution
    outlier_ratio     the largest absolute maximum of a channel over that of the median channel
    outlier_channels  the channels with the largest, and these
    """

    absmax: float
    std: float
    kurtosis: float
    percentiles: dict[str, float]
    outlier_ratio: float
    outlier_channels: list[tuple[int, float]]


class Ranges:
    """Range, spread and outliers of x (B, L, C), which must not be empty."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._absmax = AbsMax(torch.arange(channels, device=device), channels)
        self._powers = torch.zeros(5, dtype=torch.float64, device=device)
        self._bins = torch.zeros(_BINS, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        self._absmax.update(x)
        wide, power = x.double(), torch.ones((), dtype=torch.float64, device=x.device)
        for i in range(5):
            self._powers[i] += power.expand_as(wide).sum()
            power = power * wide
        bits = x.float().abs().flatten().view(torch.int32) >> _SHIFT
        self._bins += torch.bincount((bits - _FIRST).clamp_(0, _BINS - 1), minlength=_BINS)

    def report(self) -> RangeReport:
        channels = self._absmax.value()
        top = channels.topk(min(OUTLIER_CHANNELS, len(channels)))
        largest, median = float(top.values[0]), float(channels.quantile(0.5))
        std, kurtosis = self._moments()
        return RangeReport(
            absmax=largest,
            std=std,
            kurtosis=kurtosis,
            percentiles={f"{p:g}": min(self._percentile(p), largest) for p in PERCENTILES},
            outlier_ratio=largest / median if median else math.inf if largest else 1.0,
            outlier_channels=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def _moments(self) -> tuple[float, float]:
        count, *sums = self._powers.tolist()
        m1, m2, m3, m4 = (s / count for s in sums)
        variance = m2 - m1**2
        if not variance > 0:
            return (0.0 if variance <= 0 else math.nan), math.nan
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return math.sqrt(variance), fourth / variance**2

    def _percentile(self, percent: float) -> float:
        """By linear interpolation inside the bin."""
        counts = self._bins.double()
        ends = counts.cumsum(0)
        wanted = percent / 100 * ends[-1]
        bin = int((ends < wanted).sum())
        inside = float((wanted - (ends[bin] - counts[bin])) / counts[bin])
        octave, part = divmod(bin, 1 << _MANTISSA_BITS)
        low = math.ldexp(1 + part / (1 << _MANTISSA_BITS), octave + _LOWEST)
        return low + inside * math.ldexp(1.0, octave + _LOWEST - _MANTISSA_BITS)


class Codes:
    """How the int8 codes of a site use their range; shares are None where there are no codes."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._at_limit, self._clipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._count = 0

    def update(self, wanted: Tensor, x: Activation) -> None:
        if isinstance(x, Quantized):
            self._at_limit += ((x.codes >= INT8_LIMIT) | (x.codes <= -INT8_LIMIT)).sum()
            self._clipped += (wanted.abs() > (INT8_LIMIT + 0.5) * x.scale).sum()
            self._count += x.codes.numel()

    @property
    def at_limit(self) -> float | None:
        """The share of codes at or beyond +-127."""
        return int(self._at_limit) / self._count if self._count else None

    @property
    def clipped(self) -> float | None:
        """The share of the float model's values that are beyond what the codes can say."""
        return int(self._clipped) / self._count if self._count else None


@dataclass(frozen=True)
class LogitReport:
    """Predictions of the model q against those of the float model p.

    kl_mean, kl_max  KL(p || q) of a token in nats, over all positions
    kl_by_position   its mean over the windows: [window length]
    top1_agreement   share of positions at which both have the same most likely token
    perplexity, float_perplexity  by the rule of ``evaluation/perplexity.py``
    """

    kl_mean: float
    kl_max: float
    kl_by_position: list[float]
    top1_agreement: float
    perplexity: float
    float_perplexity: float


class Predictions:
    """Logits of two models for windows of ``length`` tokens, position by position."""

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self._kl, self._agree = (torch.zeros(length, dtype=torch.float64, device=device) for _ in range(2))
        self._nll = torch.zeros(2, dtype=torch.float64, device=device)
        self._kl_max = torch.zeros((), dtype=torch.float64, device=device)
        self._windows = 0

    def add_windows(self, count: int) -> None:
        self._windows += count

    def update(self, wanted: Tensor, got: Tensor, ids: Tensor, start: int) -> None:
        """Logits (B, S, V) of positions start .. start + S - 1 of windows ids (B, L)."""
        p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (wanted, got))
        kl = (p.exp() * (p - q)).sum(-1)
        part = slice(start, start + kl.shape[1])
        self._kl[part] += kl.sum(0)
        self._kl_max = torch.maximum(self._kl_max, kl.max())
        self._agree[part] += (wanted.argmax(-1) == got.argmax(-1)).double().sum(0)
        targets = ids[:, start + 1 : start + 1 + kl.shape[1]]
        for i, scores in enumerate((q, p)):
            scored = scores[:, : targets.shape[1]].gather(-1, targets[..., None])
            self._nll[i] -= scored.sum()

    def report(self) -> LogitReport:
        by_position = self._kl / self._windows
        tokens = self._windows * (len(by_position) - 1)
        perplexities = (self._nll / tokens).exp().tolist()
        return LogitReport(
            kl_mean=float(by_position.mean()),
            kl_max=float(self._kl_max),
            kl_by_position=by_position.tolist(),
            top1_agreement=float((self._agree / self._windows).mean()),
            perplexity=perplexities[0],
            float_perplexity=perplexities[1],
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
