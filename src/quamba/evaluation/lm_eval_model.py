"""A model as lm-eval wants one: log-likelihoods of continuations and of whole texts, and generation.

``TaskModel`` does the work on token ids and texts; ``lm_eval_model`` makes lm-eval's class of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError, missing_extra
from quamba.evaluation.answers import AnswerStore
from quamba.formats.activation import Activation, Quantized
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import Progress
from quamba.runtime.generate import Run, generate
from quamba.runtime.sampling import SamplingParams

#: Tokens that are read at most: longer contexts lose their beginning, as in lm-eval's own models.
MAX_LENGTH = 2048
# New tokens of a generation for which the task names no number, as in lm-eval.
_NEW_TOKENS = 256
# Without a batch size: so many texts at once, and so many tokens, padding included. Where a CPU only reads,
# few tokens stay in its caches: texts of 110 tokens take a third less time by four than by 32.
_BATCH_ROWS, _BATCH_TOKENS, _CPU_READ_TOKENS = 32, 8192, 512
# Logits of one slab in bytes: bounds the memory on a GPU, keeps close to the caches on a CPU.
_CUDA_SLAB_BYTES, _CPU_SLAB_BYTES = 1 << 28, 1 << 24
# The names that tasks have for the number of new tokens, the first one given counts.
_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

#: ids of the context, at least one, and of what follows it
Pair = tuple[list[int], list[int]]


@dataclass(eq=False)
class TaskModel:
    """What tasks ask of a model.

    batch_size  texts at once; None: by their length, and fewer where a GPU's memory is too small
    max_length  tokens that are read at most; of longer texts the beginning is left out
    progress    told of every text that is done
    seed        of tasks that sample
    notes       what a user should know of the run, one sentence each; filled as it goes
    """

    network: MambaLM
    tokenizer: Tokenizer
    batch_size: int | None = None
    max_length: int = MAX_LENGTH
    progress: Progress | None = None
    seed: int = 1234
    notes: list[str] = field(default_factory=list)

    @property
    def prefix_id(self) -> int:
        """What stands before a text without context: begin-of-text if there is one, else end-of-text."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((i for i in ids if i is not None), None)
        if found is None:
            raise QuambaError(
                "The model's tokenizer has neither a begin-of-text nor an end-of-text token, "
                "and a task has a text without context; expected one of them."
            )
        return found

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) as ids, split where the context alone ends.

        Spaces at the end of the context are read with the continuation, as tokenizers do in running text.
        """
        moved = [_spaces_moved(*pair) for pair in pairs]
        contexts = self.tokenizer.encode_batch([context for context, _ in moved])
        wholes = self.tokenizer.encode_batch([context + rest for context, rest in moved])
        split = []
        for (context, rest), head, whole in zip(moved, contexts, wholes, strict=True):
            if context:
                split.append((head or [self.prefix_id], whole[len(head) :]))
            else:
                ids = self.tokenizer.encode(rest, add_special_tokens=False)
                has_prefix = ids[:1] == [self.prefix_id]
                split.append(([self.prefix_id], ids[1:] if has_prefix else ids))
        return split

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each pair: sum over the continuation of log softmax(logits)[id], in nats; if all are the argmax.

        Texts go from the longest to the shortest; pairs that differ in their last token only are read once.
        Logits over all rows of the head, as in perplexity, and of the continuations' positions only.
        """
        asked: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise QuambaError(
                    f"A task has a continuation of {len(continuation):,} tokens, "
                    f"expected at most the {self.max_length:,} that are read at once."
                )
            if not continuation:
                continue
            text = [*context, *continuation][-(self.max_length + 1) :]
            asked[tuple(text[:-1])].append(i)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        self._stage("Log-likelihoods", len(pairs))
        tokens = _BATCH_TOKENS if self.network.device.type == "cuda" else _CPU_READ_TOKENS
        inputs = sorted(asked, key=len, reverse=True)

        def score(texts: list[tuple[int, ...]]) -> None:
            numbers = [asked[text] for text in texts]
            rows = [(row, pairs[i][1]) for row, indices in enumerate(numbers) for i in indices]
            scores = _score(self.network, texts, rows)
            for i, result in zip((i for indices in numbers for i in indices), scores, strict=True):
                results[i] = result
            self._step(len(rows))

        for texts in self._batches(inputs, inputs, tokens):
            self._as_memory_allows(score, texts)
        return results

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """log p of each whole text, every token predicted once.

        A text longer than max_length is cut into windows of max_length predicted tokens; the last window
        reads as much before its tokens as it may.
        """
        pairs, owners = [], []
        for number, ids in enumerate(self.tokenizer.encode_batch(list(texts))):
            for start in range(0, len(ids), self.max_length):
                end = min(start + self.max_length, len(ids))
                context = ids[max(0, end - self.max_length - 1) : start] or [self.prefix_id]
                pairs.append((context, ids[start:end]))
                owners.append(number)
        sums = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self.log_likelihoods(pairs), strict=True):
            sums[owner] += value
        return sums

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continue each text by its task's options: ``until``, the number of new tokens, sampling.

        A sequence ends at an end-of-text token or as soon as a stop text is in it; the text before that is
        returned. Contexts keep room for the new tokens within max_length.
        """
        contexts = self.tokenizer.encode_batch([context for context, _ in requests])
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for i, (_, options) in enumerate(requests):
            groups[json.dumps(options, sort_keys=True, default=str)].append(i)
        results = [""] * len(requests)
        self._stage("Generation", len(requests))
        batches = 0
        for numbers in groups.values():
            options = requests[numbers[0]][1]
            new_tokens, stop, sampling = self._read_options(options)
            room = self._room(new_tokens)
            order = sorted(numbers, key=lambda i: len(contexts[i]), reverse=True)
            asked = partial(
                generate,
                self.network,
                self.tokenizer,
                max_new_tokens=new_tokens,
                sampling=sampling,
                stop=stop,
            )

            def answer(chosen: list[int], asked: Callable[..., Run] = asked, room: int = room) -> None:
                nonlocal batches
                run = asked([contexts[i][-room:] for i in chosen], seed=self.seed + batches)
                for i, generation in zip(chosen, run.collect(), strict=True):
                    results[i] = generation.text
                batches += 1
                self._step(len(chosen))

            for chosen in self._batches(order, [contexts[i][-room:] for i in order], _BATCH_TOKENS):
                self._as_memory_allows(answer, chosen)
        return results

    def _read_options(self, options: Mapping[str, Any]) -> tuple[int, list[str], SamplingParams]:
        """(new tokens at most, stop texts, sampling); what has no meaning here goes to ``notes``."""
        given = {name: value for name, value in options.items() if value is not None}
        lengths = [given.pop(name) for name in _LENGTH_OPTIONS if name in given]
        until = given.pop("until", [])
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        sample = given.pop("do_sample", None)
        values = {name: given.pop(name) for name in _SAMPLING_OPTIONS if name in given}
        if sample is None:
            sample = float(values.get("temperature", 0.0)) > 0
        for name in given:
            note = f"A task's generation option '{name}' has no meaning here and is left out."
            if note not in self.notes:
                self.notes.append(note)
        new_tokens = int(lengths[0]) if lengths else _NEW_TOKENS
        if not sample:
            penalty = float(values.get("repetition_penalty", 1.0))
            return new_tokens, stop, SamplingParams(repetition_penalty=penalty)
        return new_tokens, stop, SamplingParams(**{"top_k": 0, **values})

    def _room(self, new_tokens: int) -> int:
        room = self.max_length - new_tokens
        if room < 1:
            raise QuambaError(
                f"A task asks for {new_tokens:,} new tokens, expected fewer than the {self.max_length:,} "
                "of context and answer together."
            )
        return room

    def _batches(self, items: list[Any], texts: Sequence[Sequence[int]], tokens: int) -> Iterator[list[Any]]:
        """Items in pieces of at most so many tokens; ``texts``, longest first, say how long each is."""
        start = 0
        while start < len(items):
            fits = tokens // max(1, len(texts[start]))
            size = self.batch_size or max(1, min(_BATCH_ROWS, fits))
            yield items[start : start + size]
            start += size

    def _as_memory_allows(self, run: Callable[[list[Any]], None], items: list[Any]) -> None:
        """All items at once; in halves where a GPU has no room for them, unless the batch size is given."""
        try:
            run(items)
            return
        except torch.OutOfMemoryError:
            if self.batch_size is not None or len(items) == 1:
                raise
        torch.cuda.empty_cache()
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            self._as_memory_allows(run, half)

    def _stage(self, name: str, total: int) -> None:
        if self.progress is not None:
            self.progress.stage(name, total)

    def _step(self, count: int) -> None:
        if self.progress is not None:
            self.progress.step(count)


def lm_eval_model(model: TaskModel, store: AnswerStore | None = None) -> Any:
    """The instance of lm-eval's ``LM`` that answers its requests with ``model``, task by task.

    store  where answers are kept as each task ends, and taken from
    """
    base = import_lm_eval().api.model.LM

    class QuambaLM(base):  # type: ignore[valid-type, misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            def ask(asked: TaskModel, args: list[Any]) -> list[tuple[float, bool]]:
                return asked.log_likelihoods(asked.encode_pairs(args))

            return [
                (value, greedy) for value, greedy in _by_task("log-likelihoods", ask, model, requests, store)
            ]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            def ask(asked: TaskModel, args: list[Any]) -> list[float]:
                return asked.rolling_log_likelihoods([text for (text,) in args])

            return _by_task("texts", ask, model, requests, store)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return _by_task("generation", TaskModel.generate, model, requests, store)

    return QuambaLM()


@dataclass
class _OneBar:
    """A bar that several calls share: only the first stage counts, which its maker announced."""

    progress: Progress

    def stage(self, name: str, total: int) -> None:
        pass

    def step(self, count: int = 1) -> None:
        self.progress.step(count)


def _by_task(
    kind: str,
    ask: Callable[[TaskModel, list[Any]], list[Any]],
    model: TaskModel,
    requests: Sequence[Any],
    store: AnswerStore | None,
) -> list[Any]:
    """Answers in the order of the requests, from the store or the model; one bar for all that is left."""
    tasks: defaultdict[str, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        tasks[str(getattr(request, "task_name", None) or "")].append(i)
    answers: list[Any] = [None] * len(requests)
    left: dict[str, list[Any]] = {}
    for task, numbers in tasks.items():
        args = [tuple(requests[i].args) for i in numbers]
        found = None if store is None else store.find(task, kind, args)
        if found is None:
            left[task] = args
        else:
            _spread(answers, numbers, found)
    asked = model
    if model.progress is not None and len(left) > 1:
        total = sum(map(len, left.values()))
        model.progress.stage(f"{kind.capitalize()} of {len(left)} tasks", total)
        asked = replace(model, progress=_OneBar(model.progress))
    for task, args in left.items():
        new = ask(asked, args)
        if store is not None:
            store.keep(task, kind, args, new)
        _spread(answers, tasks[task], new)
    return answers


def _spread(answers: list[Any], numbers: Sequence[int], new: Sequence[Any]) -> None:
    for i, answer in zip(numbers, new, strict=True):
        answers[i] = answer


def import_lm_eval() -> Any:
    """The ``lm_eval`` library, or the sentence that says how to install it."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise missing_extra("lm-eval", "eval", "An lm-eval task") from error
    return lm_eval


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


@torch.inference_mode()
def _score(
    network: MambaLM, texts: Sequence[Sequence[int]], rows: Sequence[tuple[int, list[int]]]
) -> list[tuple[float, bool]]:
    """Scores of rows: (the number of a text, the ids that its last positions predict).

    Texts are padded on the right, where no position that counts can see it.
    """
    ids = torch.zeros(len(texts), len(texts[0]), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    lines = torch.tensor([row for row, continuation in rows for _ in continuation], dtype=torch.int64)
    places = torch.tensor(
        [p for row, rest in rows for p in range(len(texts[row]) - len(rest), len(texts[row]))],
        dtype=torch.int64,
    )
    targets = torch.tensor([i for _, continuation in rows for i in continuation], dtype=torch.int64)
    device = network.device
    hidden = network.backbone(ids.to(device), None, None)
    picked = _pick(hidden, lines.to(device), places.to(device))
    values, greedy = _token_scores(network, picked, targets.to(device))
    sizes = [len(continuation) for _, continuation in rows]
    return [
        (float(value.sum()), bool(best.all()))
        for value, best in zip(values.split(sizes), greedy.split(sizes), strict=True)
    ]


def _pick(hidden: Activation, lines: Tensor, places: Tensor) -> Activation:
    """Activation (B, L, d) -> (1, N, d), position ``places[n]`` of text ``lines[n]``."""
    if isinstance(hidden, Quantized):
        return hidden._replace(codes=hidden.codes[lines, places][None])
    return hidden[lines, places][None]


def _token_scores(network: MambaLM, hidden: Activation, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (1, N, d), targets (N,) -> log softmax(logits)[target] float64, argmax == target; both (N,)."""
    slab = _CUDA_SLAB_BYTES if targets.is_cuda else _CPU_SLAB_BYTES
    step = max(1, slab // (4 * network.config.padded_vocab_size))
    values, greedy = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.bool)]
    for start in range(0, len(targets), step):
        stop = start + step
        part = hidden[:, start:stop] if isinstance(hidden, Tensor) else _codes(hidden, start, stop)
        logits = network.lm_head(part)[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        wanted = targets[start:stop]
        values.append(-F.cross_entropy(logits, wanted, reduction="none").double().cpu())
        greedy.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(values), torch.cat(greedy)


def _codes(hidden: Quantized, start: int, stop: int) -> Quantized:
    return hidden._replace(codes=hidden.codes[:, start:stop])
