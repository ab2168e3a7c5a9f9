"""From logits to the next token.

Order: repetition penalty, top-k, temperature, top-p, min-p, then one draw. Pure functions of their arguments;
every row of a batch by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quamba.errors import QuambaError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy.

    temperature         logits are divided by it; 0 is greedy
    top_k               only the k largest logits; 1 is greedy, 0 is off
    top_p               only the most probable tokens that together reach this probability; 1 is off
    min_p               only tokens of at least this share of the largest probability; 0 is off
    repetition_penalty  logits of tokens in the prompt or generated before: divided by it if positive,
                        multiplied if negative; 1 is off
    """

    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise QuambaError(f"temperature is {self.temperature!r}, expected a number of at least 0.")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise QuambaError(
                f"top_k is {self.top_k!r}, expected an integer of at least 0 (0: off, 1: greedy)."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise QuambaError(f"top_p is {self.top_p!r}, expected 0 < top_p <= 1 (1: off).")
        if not 0.0 <= self.min_p <= 1.0:
            raise QuambaError(f"min_p is {self.min_p!r}, expected 0 <= min_p <= 1 (0: off).")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise QuambaError(
                f"repetition_penalty is {self.repetition_penalty!r}, expected a number above 0 (1: off)."
            )

    @property
    def greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0


def sample(
    logits: Tensor,
    params: SamplingParams,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row: the argmax if params are greedy (the lowest id on ties), else a draw.

    logits     [B, V] float
    seen       the tokens of prompt and answer so far, for the repetition penalty: bool [B, V], or int64 ids
               [B, T] where -1 is no token; None: nothing is penalised
    generator  on the device of logits; None: torch's global one
    returns    [B] int64
    """
    if params.greedy:
        return _penalised(logits, params.repetition_penalty, seen).argmax(dim=-1)
    probabilities = truncated_probabilities(logits, params, seen)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)[:, 0]


def truncated_probabilities(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """The distribution that ``sample`` draws from: [B, V] float32, or float64 for float64 logits."""
    logits = _penalised(logits, params.repetition_penalty, seen)
    if params.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(~_largest(logits, params.top_k), -math.inf)
    # The bound keeps the quotients finite in float32; the distribution is long since one token's.
    probabilities = (logits / max(params.temperature, 1e-30)).softmax(dim=-1)
    if params.top_p < 1.0:
        probabilities = _renormalised(probabilities, _nucleus(probabilities, params.top_p))
    if params.min_p > 0.0:
        largest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = _renormalised(probabilities, probabilities >= params.min_p * largest)
    return probabilities


def _penalised(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if penalty == 1.0 or seen is None:
        return logits
    if seen.dtype != torch.bool:
        seen = _ids_to_mask(seen, logits.shape[-1])
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _ids_to_mask(ids: Tensor, vocab: int) -> Tensor:
    """int64 [B, T] with -1 for no token -> bool [B, V]."""
    mask = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(1, torch.where(ids < 0, vocab, ids), True)  # one more column takes the -1
    return mask[:, :vocab]


def _largest(logits: Tensor, k: int) -> Tensor:
    """bool [B, V]: exactly k of each row; among equal logits the lowest ids."""
    kth = logits.topk(k, dim=-1).values[:, -1:]
    above, tied = logits > kth, logits == kth
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """bool [B, V]: tokens, most probable first, until their sum reaches top_p; the first one always."""
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = descending.double().cumsum(dim=-1) - descending.double()
    kept = before < top_p
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _renormalised(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = probabilities.masked_fill(~kept, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
