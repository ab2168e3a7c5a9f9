"""The choice of the next ids, with all that it remembers on the device, so that CUDA graphs can hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quamba.runtime.sampling import Rules, SamplingParams, choose

#: Uniform numbers that a row draws at a time.
DRAWS = 256


def row_generator(seed: int, row: int) -> torch.Generator:
    """The generator of a row of a run, or of an answer of a conversation. It draws on the CPU, so that a seed
    means the same numbers on every device."""
    # Hashed, so that row 1 of one seed is not row 0 of the next.
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Choice:
    """What one run asks for.

    vocab       ids below this may be chosen
    prompts     the ids of each row so far, for the repetition penalty
    generators  one a row; none are needed where params are greedy
    """

    vocab: int
    params: SamplingParams
    prompts: Sequence[Sequence[int]]
    generators: Sequence[torch.Generator]

    @classmethod
    def seeded(
        cls, vocab: int, params: SamplingParams, prompts: Sequence[Sequence[int]], seed: int, first: int = 0
    ) -> Choice:
        """Row i draws from ``row_generator(seed, first + i)``."""
        rows = range(first, first + len(prompts))
        return cls(vocab, params, prompts, [] if params.greedy else [row_generator(seed, i) for i in rows])


class Chooser:
    """Chooses for a batch, step after step: ``prepare`` on the host, then ``choose`` on the device.

    Everything that ``choose`` reads and changes is in tensors that stay where they are, so a graph that was
    captured of it goes on with what ``begin`` or ``take`` wrote there.

    _numbers   of ``SamplingParams``
    _seen      (B, vocab) bool, the ids of each row; None where nothing is penalised
    _uniforms  (DRAWS, B) float64, drawn ahead by the rows' generators; None if greedy
    _next      (1,) int64, which row of them comes next
    _drawn     choices that ``prepare`` has seen
    """

    def __init__(self, batch: int, vocab: int, rules: Rules, device: torch.device) -> None:
        self.vocab, self.rules = vocab, rules
        self._numbers = torch.ones(4, dtype=torch.float64, device=device)
        self._seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device) if rules.penalty else None
        self._uniforms = (
            None if rules.greedy else torch.zeros(DRAWS, batch, dtype=torch.float64, device=device)
        )
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._generators: list[torch.Generator] = []
        self._drawn = 0

    @torch.inference_mode()
    def begin(self, choice: Choice) -> Chooser:
        """Start anew. The choice has the rules and the vocabulary that this was made for."""
        assert (choice.vocab, choice.params.rules) == (self.vocab, self.rules)
        self._numbers.copy_(choice.params.numbers("cpu"))
        if self._seen is not None:
            self._seen.copy_(_mask(choice.prompts, self.vocab))
        self._generators, self._drawn = list(choice.generators), 0
        return self

    @torch.inference_mode()
    def take(self, other: Chooser) -> None:
        """Go on where another one of the same batch size and rules is."""
        self._numbers.copy_(other._numbers)
        self._next.copy_(other._next)
        if self._seen is not None and other._seen is not None:
            self._seen.copy_(other._seen)
        if self._uniforms is not None and other._uniforms is not None:
            self._uniforms.copy_(other._uniforms)
        self._generators, self._drawn = other._generators, other._drawn

    @torch.inference_mode()
    def prepare(self) -> None:
        """Before each choice: draw more numbers, where those on the device are used up."""
        if self._uniforms is not None and self._drawn % DRAWS == 0:
            columns = [torch.rand(DRAWS, dtype=torch.float64, generator=g) for g in self._generators]
            block = torch.stack(columns, dim=1)
            if self._uniforms.device.type == "cuda":
                block = (
                    block.pin_memory()
                )  # the copy then waits in line behind the steps that use the old ones
            self._uniforms.copy_(block, non_blocking=True)
            self._next.zero_()
        self._drawn += 1

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> Tensor:
        """Logits (B, at least vocab) -> ids (B,) int64, which are seen from now on."""
        uniforms = None
        if self._uniforms is not None:
            uniforms = self._uniforms.index_select(0, self._next)[0]
            self._next.add_(1)
        ids = choose(logits[:, : self.vocab], self.rules, self._numbers, self._seen, uniforms)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        return ids

    @torch.inference_mode()
    def keep(self, lines: Sequence[int]) -> None:
        """Drop all other rows. Moves the tensors, so it is not for graphs."""
        kept = torch.tensor(lines, device=self._numbers.device)
        if self._seen is not None:
            self._seen = self._seen[kept]
        if self._uniforms is not None:
            self._uniforms = self._uniforms[:, kept]
            self._generators = [self._generators[line] for line in lines]


def _mask(prompts: Sequence[Sequence[int]], vocab: int) -> Tensor:
    """bool (B, vocab): the ids of each prompt."""
    mask = torch.zeros(len(prompts), vocab, dtype=torch.bool)
    for row, prompt in zip(mask, prompts, strict=True):
        ids = torch.tensor(prompt, dtype=torch.int64)
        row[ids[ids < vocab]] = True
    return mask
