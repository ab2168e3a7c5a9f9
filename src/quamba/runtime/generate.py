"""Text from a model: read the prompts, then choose one token after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quamba.calibration.data import left_pad
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError
from quamba.models.lm import MambaLM
from quamba.runtime.choice import Choice
from quamba.runtime.decode import EagerDecoder, decode_step, new_decoder
from quamba.runtime.graph import graph_wanted, lease
from quamba.runtime.prefill import prefill, read
from quamba.runtime.sampling import SamplingParams
from quamba.runtime.stream_text import TextStream, stop_index

__all__ = ["Finished", "Generation", "Prompts", "Run", "decode_step", "generate", "prefill"]

Prompts = str | Sequence[str] | Tensor | Sequence[Sequence[int]]
Finished = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    prompt_ids  what the model read
    ids         the new ids, without the end-of-text token
    text        the new ids decoded, up to the first stop text; empty without a tokenizer
    finished    "eos": at an end-of-text token; "stop": at a stop text; "length": after max_new_tokens

    Of the whole run, so the same in every generation of a batch:
    prefill_seconds  from the prompts' ids to the first new token of each
    decode_seconds   all further tokens; time the caller takes between steps is not counted
    tokens           new ids of all prompts together, end-of-text tokens included
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: Finished
    prefill_seconds: float
    decode_seconds: float
    tokens: int


@dataclass(frozen=True)
class Run:
    """A checked request. Each ``stream`` or ``collect`` computes it anew, with the same result."""

    network: MambaLM
    tokenizer: Tokenizer | None
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    stop: tuple[str, ...]
    cuda_graph: bool = False

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset() if self.tokenizer is None else self.tokenizer.eos_token_ids

    @cached_property
    def vocab(self) -> int:
        """Ids below this may be chosen: no padding rows of the table, and none that the tokenizer lacks."""
        rows = self.network.config.vocab_size
        return rows if self.tokenizer is None else min(rows, self.tokenizer.vocab_size)

    def stream(self) -> Iterator[Tensor]:
        """The new ids (B,) int64 of each step, on the CPU; -1 for sequences that have ended.

        The ids of a row before its first -1 are ``Generation.ids``.
        """
        for ids in _steps(self, _new_rows(self), _Timing()):
            yield torch.tensor(ids, dtype=torch.int64)

    def collect(self) -> list[Generation]:
        rows, timing = _new_rows(self), _Timing()
        for _ in _steps(self, rows, timing):
            pass
        return [
            _generation(self, prompt, row, timing) for prompt, row in zip(self.prompts, rows, strict=True)
        ]


def generate(
    network: MambaLM,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    max_new_tokens: int = 100,
    sampling: SamplingParams | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    cuda_graph: bool | None = None,
) -> Run:
    """Continue one prompt or a batch; nothing is computed before ``stream`` or ``collect``.

    prompts         text, texts, ids (L,) or (B, L), or lists of ids. An empty one is read as the
                    end-of-text token alone.
    max_new_tokens  not counting the prompt; a sequence ends earlier at an end-of-text token of the
                    tokenizer or once one of the ``stop`` texts is in its new text
    sampling        None: greedy
    cuda_graph      replay prompts and steps as CUDA graphs: the same tokens, sooner. None: on a GPU with
                    kernels of its own
    seed            None: one from torch's global generator. Row i draws from a generator of its own, made
                    from seed and i, so its draws do not depend on the other rows.

    Only ids that both the model's vocabulary and the tokenizer know are chosen. Raises QuambaError for
    anything that cannot be run.
    """
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise QuambaError(f"max_new_tokens is {max_new_tokens!r}, expected an integer of at least 1.")
    return Run(
        network,
        tokenizer,
        _prompt_ids(prompts, tokenizer, network.config.vocab_size),
        max_new_tokens,
        sampling or SamplingParams(),
        _checked_seed(seed),
        _checked_stop(stop, tokenizer),
        graph_wanted(cuda_graph, network),
    )


@dataclass
class _Timing:
    """Seconds of each step, the first with the prefill, and the ids chosen for rows that had not ended."""

    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass
class _Row:
    """One sequence on its way. ``text`` only where there are stop texts to look for."""

    text: TextStream | None
    ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, token: int, eos: frozenset[int], limit: int) -> int:
        """Append one id, see whether it is the last; returns it, or -1 if it is an end-of-text token."""
        if token in eos:
            self.finished = "eos"
            return -1
        self.ids.append(token)
        if self.text is not None:
            self.text.push(token)
        if self.text is not None and self.text.stopped:
            self.finished = "stop"
        elif len(self.ids) == limit:
            self.finished = "length"
        return token


def _steps(run: Run, rows: list[_Row], timing: _Timing) -> Iterator[list[int]]:
    """Advance the rows; yields the new id of each, -1 where there is none.

    Rows that have ended are computed along. An eager run drops them once they are half of the batch.
    """
    start = time.perf_counter()
    network, eos = run.network, run.eos_ids
    choice = Choice.seeded(run.vocab, run.sampling, run.prompts, run.seed)
    with lease(network, len(rows)) if run.cuda_graph else nullcontext() as graphs:
        ids, mask = left_pad([torch.tensor(prompt, dtype=torch.int64) for prompt in run.prompts])
        mask = None if mask is None else mask.to(network.device)
        logits, cache = read(network, ids.to(network.device), mask, graphs=graphs)
        steps = run.max_new_tokens - 1
        decoder = new_decoder(network, logits, cache, choice, steps=steps, graphs=graphs)
        active = list(range(len(rows)))  # row of each line of the batch
        while True:
            new = [-1] * len(rows)
            for i, token in zip(active, decoder.tokens(ahead=steps > 0), strict=True):
                if rows[i].finished is None:
                    new[i] = rows[i].take(token, eos, run.max_new_tokens)
                    timing.tokens += 1
            timing.step_seconds.append(time.perf_counter() - start)
            if max(new) >= 0:
                yield new
            start = time.perf_counter()
            running = [line for line, i in enumerate(active) if rows[i].finished is None]
            if not running:
                return
            if isinstance(decoder, EagerDecoder) and 2 * len(running) <= len(active):
                decoder.keep(running)
                active = [active[line] for line in running]
            decoder.go_on()
            steps -= 1


def _new_rows(run: Run) -> list[_Row]:
    return [
        _Row(TextStream(run.tokenizer, run.stop, prompt) if run.stop and run.tokenizer is not None else None)
        for prompt in run.prompts
    ]


def _generation(run: Run, prompt: list[int], row: _Row, timing: _Timing) -> Generation:
    text = "" if run.tokenizer is None else run.tokenizer.decode_after(prompt, row.ids)
    assert row.finished is not None
    return Generation(
        prompt_ids=prompt,
        ids=row.ids,
        text=text[: stop_index(text, run.stop)],
        finished=row.finished,
        prefill_seconds=timing.step_seconds[0],
        decode_seconds=sum(timing.step_seconds[1:]),
        tokens=timing.tokens,
    )


def _prompt_ids(prompts: Prompts, tokenizer: Tokenizer | None, vocab: int) -> list[list[int]]:
    """Ids of each prompt, at least one each and all of them in the vocabulary."""
    listed = _as_id_lists(prompts, tokenizer)
    if not listed:
        raise QuambaError("There is no prompt to continue, expected at least one.")
    for number, ids in enumerate(listed, start=1):
        if not ids:
            if tokenizer is None or tokenizer.eos_token_id is None:
                raise QuambaError(
                    f"Prompt {number} is empty, and there is no end-of-text token to begin with; "
                    "expected at least one token."
                )
            ids.append(tokenizer.eos_token_id)
        outside = next((i for i in ids if not 0 <= i < vocab), None)
        if outside is not None:
            raise QuambaError(
                f"Prompt {number} has the id {outside}, expected ids of the model's vocabulary, "
                f"0 to {vocab - 1}."
            )
    return listed


def _as_id_lists(prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or prompts.dtype not in (torch.int64, torch.int32):
            raise QuambaError(
                f"The prompt ids are {prompts.dtype} of shape {list(prompts.shape)}, "
                "expected int64 of shape [L] or [B, L]."
            )
        return prompts.tolist() if prompts.dim() == 2 else [prompts.tolist()]
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [prompt for prompt in listed if isinstance(prompt, str)]
    if texts and len(texts) == len(listed):
        if tokenizer is None:
            raise QuambaError("The model has no tokenizer, expected token ids instead of text.")
        return tokenizer.encode_batch(texts)
    id_lists = [list(ids) for ids in listed if isinstance(ids, list | tuple)]
    if len(id_lists) == len(listed) and all(type(i) is int for ids in id_lists for i in ids):
        return id_lists
    raise QuambaError(
        "The prompts are of an unknown kind, expected text, texts, a tensor of ids or lists of ids."
    )


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(2**62, ()))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise QuambaError(f"The seed is {seed!r}, expected an integer of at least 0.")
    return seed


def _checked_stop(stop: str | Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise QuambaError(f"The stop texts are {list(texts)!r}, expected non-empty strings.")
    if texts and tokenizer is None:
        raise QuambaError("Stop texts need a tokenizer, and the model has none.")
    return texts
