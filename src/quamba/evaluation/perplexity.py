"""Perplexity over non-overlapping windows.

    perplexity = exp( mean over windows w and positions t = 1 .. L-1 of  -log softmax(logits[w, t-1])[ids[w,
    t]] )

Every window starts from an empty state; its first token is context only, so L - 1 of L tokens are predicted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.errors import QuambaError

RULE = "mean over the L-1 predicted tokens of each non-overlapping window"
# Logits of one slice in bytes: it and its log-softmax stay in a core's cache. For [8, 1024, 4096] float32 on
# one core, slices take 15 ms and one call 150 ms.
_SLICE_BYTES = 1 << 20


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity = exp(nll_mean), nll_mean in nats over tokens_scored tokens of windows x window_length."""

    perplexity: float
    nll_mean: float
    tokens_scored: int
    windows: int
    window_length: int
    seconds: float
    rule: str = RULE

    @property
    def stride(self) -> int:
        """Tokens from the start of one window to that of the next: windows do not overlap."""
        return self.window_length

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for logs and reports."""
        return {**dataclasses.asdict(self), "stride": self.stride}


def windows(ids: Tensor | Sequence[int], length: int) -> Tensor:
    """ids [tokens] -> [n, length] int64, n = tokens // length; the remainder is dropped."""
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise QuambaError(f"The window length is {length!r}, expected an integer of at least 2.")
    ids = torch.as_tensor(ids, dtype=torch.int64).flatten()
    count = len(ids) // length
    if count == 0:
        raise QuambaError(f"The text has {len(ids)} tokens, fewer than one window of {length}.")
    return ids[: count * length].view(count, length)


def perplexity(
    logits_fn: Callable[[Tensor], Tensor],
    windows: Tensor,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    max_windows: int | None = None,
) -> PerplexityResult:
    """Scores windows [n, L] int64 with logits_fn(ids [B, L]) -> logits [B, L, V] float.

    Cross-entropy in float32 (float64 for float64 logits), summed in float64. progress(done, total) is called
    after each batch, in windows; max_windows scores only the first ones.
    """
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise QuambaError(f"The evaluation's {name} is {value}, expected at least 1.")
    windows = windows[:max_windows]
    total, length = windows.shape
    started = time.perf_counter()
    nll = 0.0
    with torch.inference_mode():
        for start in range(0, total, batch_size):
            ids = windows[start : start + batch_size]
            nll += nll_sum(logits_fn(ids), ids)
            if progress is not None:
                progress(min(start + batch_size, total), total)
    tokens = total * (length - 1)
    mean = nll / tokens
    seconds = time.perf_counter() - started
    return PerplexityResult(_exp(mean), mean, tokens, total, length, seconds)


def nll_sum(logits: Tensor, ids: Tensor) -> float:
    """Sum of -log softmax(logits[b, t])[ids[b, t + 1]] over b and t < L - 1, in float64.

    logits [B, L, V] float, ids [B, L] int64 on any device. Works on slices of positions that fit in the
    cache, so nothing of the size of the logits is allocated.
    """
    batch, length, vocab = logits.shape
    targets = ids.to(logits.device)[:, 1:]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    step = length if logits.is_cuda else max(1, _SLICE_BYTES // (vocab * dtype.itemsize))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row in range(batch):
        for start in range(0, length - 1, step):
            stop = min(start + step, length - 1)
            part = logits[row, start:stop].to(dtype)
            total += F.cross_entropy(part, targets[row, start:stop], reduction="none").double().sum()
    return float(total)


def _exp(value: float) -> float:
    """math.exp, with infinity where that raises."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
