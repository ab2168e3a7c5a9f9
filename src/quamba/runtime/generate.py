"""Text from a model: read the prompts, then choose one token after the other."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quamba.calibration.data import left_pad
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.graph import decode_graph
from quamba.runtime.sampling import SamplingParams, sample, truncated_probabilities
from quamba.runtime.stream_text import TextStream, stop_index

# Tokens of each prompt read at once: bounds the memory of a long prompt.
PREFILL_PIECE = 2048

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
    cuda_graph      replay the step of a token as a CUDA graph: the same tokens, sooner. None: on a GPU with
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
        _checked_graph(cuda_graph, network),
    )


@torch.inference_mode()
def prefill(
    network: MambaLM, ids: Tensor, mask: Tensor | None = None, *, piece: int = PREFILL_PIECE
) -> tuple[Tensor, MambaCache]:
    """Read prompts: ids (B, L) int64, L >= 1 -> logits (B, padded_vocab) after the last token, and the cache.

    mask   (B, L) bool, False at left padding, or None
    piece  tokens of a row read at once. Between pieces the state is in the cache's format, so the result is
           that of one pass where the cache is float, and rounded once a piece where it is int8 or fp16.

    Padding keeps a zero state zero and counts as zero inputs of the convolution, so a piece that is padding
    through and through leaves the cache empty for the next one.
    """
    cache = network.new_cache(len(ids))
    for start in range(0, ids.shape[1], piece):
        part = slice(start, start + piece)
        logits = network(ids[:, part], cache, None if mask is None else mask[:, part], last_only=True)
    return logits[:, 0], cache


@torch.inference_mode()
def decode_step(network: MambaLM, ids: Tensor, cache: MambaCache) -> Tensor:
    """One token of each sequence: ids (B,) int64 -> logits (B, padded_vocab). The cache is advanced."""
    return network(ids[:, None], cache, last_only=True)[:, 0]


@dataclass
class _Timing:
    """Seconds of each step, the first with the prefill, and the ids chosen for rows that had not ended."""

    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass
class _Row:
    """One sequence on its way. ``text`` only where there are stop texts to look for."""

    generator: torch.Generator | None
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

    Rows that have ended are computed along until half of the batch has; then they are dropped, unless a graph
    of this batch size is there to be replayed.
    """
    start = time.perf_counter()
    network, device, eos, vocab = run.network, run.network.device, run.eos_ids, run.vocab
    ids, mask = left_pad([torch.tensor(prompt) for prompt in run.prompts])
    logits, cache = prefill(network, ids.to(device), None if mask is None else mask.to(device))
    seen = _seen(run) if run.sampling.repetition_penalty != 1.0 else None
    active = list(range(len(rows)))  # row of each line of the batch
    graph = decode_graph(network, len(rows)) if run.cuda_graph and run.max_new_tokens > 1 else None
    if graph is not None:
        graph.take(cache)
    while True:
        tokens = _choose(logits[:, :vocab], run.sampling, seen, [rows[i].generator for i in active])
        new = [-1] * len(rows)
        for i, token in zip(active, tokens.tolist(), strict=True):  # tolist: here the device is waited for
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
        if graph is None and 2 * len(running) <= len(active):
            kept = torch.tensor(running, device=device)
            tokens, cache, seen = tokens[kept], cache.select(kept), None if seen is None else seen[kept]
            active = [active[line] for line in running]
        logits = decode_step(network, tokens, cache) if graph is None else graph.step(tokens)


@torch.inference_mode()
def _choose(
    logits: Tensor, params: SamplingParams, seen: Tensor | None, generators: list[torch.Generator | None]
) -> Tensor:
    """Logits (B, V) -> ids (B,) int64, each row drawn with its own generator; ``seen`` is updated."""
    if params.greedy:
        tokens = sample(logits, params, seen)
    else:
        rows = zip(truncated_probabilities(logits, params, seen), generators, strict=True)
        tokens = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    return tokens


def _seen(run: Run) -> Tensor:
    """bool (B, vocab): the ids of each prompt."""
    seen = torch.zeros(len(run.prompts), run.vocab, dtype=torch.bool)
    for row, prompt in zip(seen, run.prompts, strict=True):
        row[[i for i in prompt if i < run.vocab]] = True
    return seen.to(run.network.device)


def _new_rows(run: Run) -> list[_Row]:
    return [
        _Row(
            None if run.sampling.greedy else _row_generator(run.seed, i, run.network.device),
            TextStream(run.tokenizer, run.stop, prompt) if run.stop and run.tokenizer is not None else None,
        )
        for i, prompt in enumerate(run.prompts)
    ]


def _row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    # Hashed, so that row 1 of one seed is not row 0 of the next.
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


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


def _checked_graph(asked: bool | None, network: MambaLM) -> bool:
    on_gpu = network.device.type == "cuda"
    if asked and not on_gpu:
        raise QuambaError(f"A CUDA graph needs a CUDA device, and the model is on '{network.device}'.")
    return on_gpu and network.kernels.name != "reference" if asked is None else asked


def _checked_stop(stop: str | Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise QuambaError(f"The stop texts are {list(texts)!r}, expected non-empty strings.")
    if texts and tokenizer is None:
        raise QuambaError("Stop texts need a tokenizer, and the model has none.")
    return texts
