"""What a search minimises: how far a model is from its float model, or how badly it does a job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba.calibration.collect import Batch
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError, one_of
from quamba.evaluation.perplexity import nll_sum
from quamba.models.lm import MambaLM, on_device

OBJECTIVES = ("kl", "perplexity", "accuracy")
#: Log-probabilities of the float model that are kept rather than computed again for each candidate, in bytes.
KEPT_BYTES = 2 << 30
#: Logits of one slice of positions, in bytes.
_SLICE_BYTES = 1 << 24


class Objective(Protocol):
    """A number for each model; smaller is better. Neighbours that begin with the same blocks share them."""

    name: str

    def __call__(self, networks: Sequence[MambaLM]) -> list[float]: ...


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """
    kind    "kl": mean over tokens of KL(float || model) in nats; "perplexity": of the same text;
            "accuracy": 1 - mean accuracy of lm-eval's tasks
    tasks   their names, for "accuracy"
    limit   samples of each task, None for all
    batch   sequences at once
    """

    kind: str = "kl"
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise one_of("The objective", self.kind, OBJECTIVES)
        if (self.kind == "accuracy") != bool(self.tasks):
            said = "needs the names of tasks" if self.kind == "accuracy" else "takes no tasks"
            raise QuambaError(f"The objective '{self.kind}' {said}, expected 'accuracy' and tasks together.")

    @property
    def title(self) -> str:
        return {"kl": "KL to the float model, nats", "perplexity": "perplexity"}.get(
            self.kind, f"1 - accuracy of {', '.join(self.tasks)}"
        )


def objective(
    spec: ObjectiveSpec, reference: MambaLM | None, batches: Sequence[Batch], tokenizer: Tokenizer | None
) -> Objective:
    """reference  the float model, for "kl"; batches  the text, for "kl" and "perplexity"."""
    if spec.kind == "accuracy":
        assert tokenizer is not None
        return Accuracy(spec, tokenizer)
    if spec.kind == "perplexity":
        return Perplexity(batches)
    assert reference is not None
    return Divergence(reference, batches)


class Divergence:
    """Mean over all tokens of KL(float || model), in nats, over the padded vocabulary."""

    name = "kl"

    def __init__(self, reference: MambaLM, batches: Sequence[Batch]) -> None:
        self._batches = batches
        vocab = reference.config.padded_vocab_size
        tokens = sum(ids.numel() for ids, _ in batches)
        kept = 4 * tokens * vocab <= KEPT_BYTES
        self._kept = [self.log_probabilities(reference, batch) for batch in batches] if kept else []
        self._reference = None if kept else reference  # whose memory is then free

    @torch.inference_mode()
    def __call__(self, networks: Sequence[MambaLM]) -> list[float]:
        totals, tokens = [0.0] * len(networks), 0
        for i, batch in enumerate(self._batches):
            if self._reference is None:
                wanted = self._kept[i]
            else:
                wanted = self.log_probabilities(self._reference, batch)
            for k, logits in enumerate(shared_walk(networks, batch)):
                totals[k] += kl_sum(wanted, _rows(logits, batch))
            tokens += len(wanted)
        return [total / tokens for total in totals]

    @staticmethod
    @torch.inference_mode()
    def log_probabilities(network: MambaLM, batch: Batch) -> Tensor:
        (logits,) = shared_walk([network], batch)
        logits = _rows(logits, batch).float()
        for part in logits.split(_positions(logits)):
            part.copy_(F.log_softmax(part, dim=-1))
        return logits


def kl_sum(wanted: Tensor, got: Tensor) -> float:
    """wanted [T, V] float32 log-probabilities, got [T, V] logits -> sum over T of KL(wanted || got)."""
    total = torch.zeros((), dtype=torch.float64, device=got.device)
    step = _positions(got)
    for p, logits in zip(wanted.split(step), got.split(step), strict=True):
        q = F.log_softmax(logits.float(), dim=-1)
        total += F.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum()
    return float(total)


class Perplexity:
    """Of every sequence but its first token."""

    name = "perplexity"

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    @torch.inference_mode()
    def __call__(self, networks: Sequence[MambaLM]) -> list[float]:
        nll, tokens = [0.0] * len(networks), 0
        for ids, mask in self._batches:
            firsts = [0 if mask is None else int((~mask[row]).sum()) for row in range(len(ids))]
            tokens += sum(ids.shape[1] - first - 1 for first in firsts)
            for k, logits in enumerate(shared_walk(networks, (ids, mask))):
                for row, first in enumerate(firsts):
                    nll[k] += nll_sum(logits[row : row + 1, first:], ids[row : row + 1, first:])
        return [math.exp(min(total / tokens, 700.0)) for total in nll]


class Accuracy:
    """1 - mean over tasks of their accuracy (``acc``, else ``exact_match``)."""

    name = "accuracy"

    def __init__(self, spec: ObjectiveSpec, tokenizer: Tokenizer) -> None:
        from quamba.evaluation.tasks import load_tasks

        self._spec, self._tokenizer = spec, tokenizer
        self._tasks = load_tasks(spec.tasks)

    def __call__(self, networks: Sequence[MambaLM]) -> list[float]:
        return [self._of(network) for network in networks]

    def _of(self, network: MambaLM) -> float:
        from quamba.evaluation.lm_eval_model import TaskModel
        from quamba.evaluation.tasks import run_tasks

        found = run_tasks(TaskModel(network, self._tokenizer), self._tasks, limit=self._spec.limit)
        return 1 - sum(accuracy(found.raw, task) for task in self._spec.tasks) / len(self._spec.tasks)


def accuracy(raw: dict[str, dict[str, Any]], task: str) -> float:
    """A task's accuracy among lm-eval's numbers."""
    values = raw.get(task, {})
    for wanted in ("acc", "exact_match"):
        for key, value in values.items():
            if key.partition(",")[0] == wanted:
                return float(value)
    raise QuambaError(
        f"The task '{task}' gives no accuracy, expected one with 'acc' or 'exact_match' such as"
        " 'lambada_local'."
    )


def shared_walk(networks: Sequence[MambaLM], batch: Batch) -> Iterator[Tensor]:
    """Logits [B, L, V] of each network in turn. Blocks at the beginning that are those of the network before
    it are not run again."""
    ids, mask = batch
    before: list[tuple[nn.Module, Tensor, Tensor | None]] = []
    for network in networks:
        device = network.device
        own_mask = None if mask is None else mask.to(device)
        with on_device(device):
            path: list[nn.Module] = [network.backbone.embedding, *network.blocks]
            shared = 0
            while shared < min(len(path), len(before)) and path[shared] is before[shared][0]:
                shared += 1
            del before[shared:]
            if not before:
                before.append((path[0], network.backbone.embedding(ids.to(device)), None))
            for block in path[len(before) :]:
                _, hidden, residual = before[-1]
                before.append((block, *block(hidden, residual, None, own_mask)))
            _, hidden, residual = before[-1]
            yield network.lm_head(network.backbone.norm_f(hidden, residual)[0])


def _rows(logits: Tensor, batch: Batch) -> Tensor:
    """Logits [T, V] of all tokens that are no padding."""
    mask = batch[1]
    return logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device)]


def _positions(logits: Tensor) -> int:
    return max(1, _SLICE_BYTES // (4 * logits.shape[-1]))
