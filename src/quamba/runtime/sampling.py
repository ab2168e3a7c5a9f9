"""From logits to the next token.

Order: repetition penalty, top-k, temperature, top-p, min-p, then one draw. Pure functions of their arguments;
every row of a batch by itself. The same operations run eagerly and in CUDA graphs, on the CPU and on GPUs:
settings are read from tensors, nothing waits for the device, and a draw takes one number from outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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

    @property
    def rules(self) -> Rules:
        return Rules(
            self.greedy,
            self.repetition_penalty != 1.0,
            0 if self.greedy else self.top_k,
            not self.greedy and self.top_p < 1.0,
            not self.greedy and self.min_p > 0.0,
        )

    def numbers(self, device: torch.device | str) -> Tensor:
        """float64 [4] on the device: repetition penalty, temperature, top_p, min_p."""
        # The bound keeps quotients of logits finite in float32; the distribution is long since one token's.
        values = (self.repetition_penalty, max(self.temperature, 1e-30), self.top_p, self.min_p)
        return torch.tensor(values, dtype=torch.float64).to(device)


class Rules(NamedTuple):
    """Which parts of ``SamplingParams`` do anything: what a CUDA graph of the choice is captured for."""

    greedy: bool
    penalty: bool
    top_k: int
    top_p: bool
    min_p: bool


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
    generator  on any device; None: torch's global one of the CPU
    returns    [B] int64
    """
    uniforms = None
    if not params.greedy:
        device = "cpu" if generator is None else generator.device
        uniforms = torch.rand(len(logits), dtype=torch.float64, generator=generator, device=device)
        uniforms = uniforms.to(logits.device)
    return choose(logits, params.rules, params.numbers(logits.device), seen, uniforms)


def choose(
    logits: Tensor, rules: Rules, numbers: Tensor, seen: Tensor | None, uniforms: Tensor | None
) -> Tensor:
    """``sample`` with all that changes from call to call on the device of logits, as a CUDA graph needs it.

    numbers   of ``SamplingParams``
    uniforms  [B] float64 in [0, 1), one draw a row; None if greedy
    """
    if rules.greedy:
        return _penalised(logits, rules, numbers, seen).argmax(dim=-1)
    assert uniforms is not None
    return draw(_truncated(logits, rules, numbers, seen), uniforms)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of the probabilities first exceeds the share ``uniforms`` of it.

    probabilities [B, V] float, uniforms [B] float64 in [0, 1) -> [B] int64, none of probability 0

    Summed as integers, multiples of 2^-52: a sum of floats depends on the order that a device adds them in.
    """
    sums = (probabilities.double() * 2.0**52).round_().long().cumsum(dim=-1)
    target = (uniforms[:, None] * sums[:, -1:]).long()  # below the sum, which is about 2^52
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=sums.shape[-1] - 1)


def truncated_probabilities(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """The distribution that ``sample`` draws from: [B, V] float32, or float64 for float64 logits."""
    rules, numbers = params.rules, params.numbers(logits.device)
    if rules.greedy:
        logits = _penalised(logits, rules, numbers, seen)
        one = torch.zeros_like(logits, dtype=_wide(logits))
        return one.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return _truncated(logits, rules, numbers, seen)


def _truncated(logits: Tensor, rules: Rules, numbers: Tensor, seen: Tensor | None) -> Tensor:
    _, temperature, top_p, min_p = numbers.unbind()
    logits = _penalised(logits, rules, numbers, seen).to(_wide(logits))
    if 0 < rules.top_k < logits.shape[-1]:
        logits = logits.masked_fill(~_largest(logits, rules.top_k), -math.inf)
    probabilities = (logits / temperature).softmax(dim=-1)
    if rules.top_p:
        probabilities = _renormalised(probabilities, _nucleus(probabilities, top_p))
    if rules.min_p:
        largest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = _renormalised(probabilities, probabilities >= min_p * largest)
    return probabilities


def _penalised(logits: Tensor, rules: Rules, numbers: Tensor, seen: Tensor | None) -> Tensor:
    if not rules.penalty or seen is None:
        return logits
    if seen.dtype != torch.bool:
        seen = _ids_to_mask(seen, logits.shape[-1])
    logits, penalty = logits.to(_wide(logits)), numbers[0]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """bool [B, V]: tokens, most probable first, until their sum reaches top_p; the first one always."""
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = descending.double().cumsum(dim=-1) - descending.double()
    kept = before < top_p
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _renormalised(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = probabilities.masked_fill(~kept, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
