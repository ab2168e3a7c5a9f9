"""The search: blocks quantized once in every precision, put together, scored, and the best choice kept."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.calibration.data import left_pad
from quamba.checkpoints.float import read_float
from quamba.checkpoints.tokenizer import load_tokenizer
from quamba.errors import QuambaError
from quamba.evaluation.answers import weights_digest
from quamba.kernels.registry import choose_kernels
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import Progress, Silent
from quamba.recipes.recipe import Recipe
from quamba.search.blocks import (
    BankPlan,
    BlockBank,
    bank_folders,
    digest,
    fill_bank,
    mixed_recipe,
    plan_bank,
    read_bank,
)
from quamba.search.budget import Budget
from quamba.search.costs import TimeSpec, limits_of
from quamba.search.integer_program import check_feasible
from quamba.search.methods.method import sensitivities
from quamba.search.methods.registry import method_of
from quamba.search.objective import ObjectiveSpec, objective
from quamba.search.problem import Assignment, Limit, Problem
from quamba.search.score import Candidate, CandidateStore, Labels, Runner, Scorer, ScoreSome, here
from quamba.search.workers import Pool

MARK = "search.json"


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """
    base        recipe of embedding, head and the blocks that the budget does not change
    precisions  labels that blocks may have besides the base's
    budget      what is allowed
    method      a name of ``methods/registry.py``
    devices     of the processes that score; one: this process

    """

    base: Recipe
    precisions: tuple[str, ...]
    budget: Budget
    method: str = "auto"
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    seed: int = 1234
    time: TimeSpec = field(default_factory=TimeSpec)
    devices: tuple[str, ...] = ("cpu",)
    backend: str = "auto"

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.base.blocks.label, *self.precisions)

    def __post_init__(self) -> None:
        method_of(self.method)
        if self.base.overrides:
            raise QuambaError(
                f"The recipe '{self.base.name}' has overrides of its own, expected one precision for all"
                " blocks."
            )
        if not self.precisions:
            raise QuambaError("There is one precision to choose from, expected two or more.")
        for label in self.budget.counts:
            if label not in self.precisions:
                raise QuambaError(f"The budget counts {label}, which is not among the precisions.")

    def check(self, config: ModelConfig) -> None:
        """Refuse counts that the model has no blocks for, before any weight is read."""
        limits = tuple(Limit(name, "", most, 0.0, ()) for name, most in self.budget.most.items())
        Problem(self.labels, config.n_layer, self._counts(), limits)

    def problem(self, n_blocks: int, limits: tuple[Limit, ...]) -> Problem:
        return Problem(self.labels, n_blocks, self._counts(), limits)

    def _counts(self) -> dict[int, int]:
        return {self.labels.index(label): count for label, count in self.budget.counts.items()}


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored on a device, in whichever process; goes to other processes whole."""

    source: str
    base: Recipe
    plan: BankPlan
    folders: Mapping[str, Path]
    spec: ObjectiveSpec
    sequences: tuple[Tensor, ...]
    backend: str

    def bank(self, device: str) -> BlockBank:
        """On the device, floats as ``api.load`` has them there."""
        target = torch.device(device)
        checkpoint = read_float(self.source)
        network = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
        bank = read_bank(self.folders, self.plan, self.base, network.set_compute_dtype(torch.float32))
        own = bank.ends.network.lm_head.compute_dtype
        dtype = torch.float16 if target.type == "cuda" else own
        return bank.to(target, dtype, choose_kernels(target, self.backend))

    def scoring(self, device: str, bank: BlockBank | None = None) -> ScoreSome:
        """bank  of that device, if there is one"""
        target, reference, tokenizer = torch.device(device), None, None
        have = bank or self.bank(device)
        checkpoint = read_float(self.source)
        if self.spec.kind == "kl":
            reference = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
            dtype = torch.float16 if target.type == "cuda" else torch.float32
            reference.set_compute_dtype(dtype).to(target).use_kernels(choose_kernels(target, self.backend))
        elif self.spec.kind == "accuracy":
            tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config, self.source)
        measure = objective(self.spec, reference, batches(self.sequences, self.spec.batch), tokenizer)
        return lambda some: measure([have.assemble(labels) for labels in some])


def batches(sequences: Sequence[Tensor], size: int) -> list[tuple[Tensor, Tensor | None]]:
    """From the longest sequence to the shortest, padded on the left."""
    ordered = sorted(sequences, key=len, reverse=True)
    return [left_pad(ordered[i : i + size]) for i in range(0, len(ordered), size)]


@dataclass(frozen=True)
class Outcome:
    """
    chosen         the precision of every block
    sensitivities  [block][label]: what the score changes by where that block alone is changed from ``begin``
    evaluations    candidates that the method asked for; seconds: that scoring them takes, one after the other
    candidates     all that are known of this model, recipe and objective, those of earlier runs too
    costs          name of a limit -> what the choice costs
    """

    spec: SearchSpec
    problem: Problem
    chosen: Labels
    score: float
    uniform: Mapping[str, float]
    sensitivities: list[list[float]]
    evaluations: int
    seconds: float
    candidates: list[Candidate]
    costs: Mapping[str, float]
    bank: BlockBank
    source: str

    @property
    def recipe(self) -> Recipe:
        return mixed_recipe(self.spec.base, self.chosen, "w4ax")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": self.source,
            "chosen": list(self.chosen),
            "score": self.score,
            "objective": dataclasses.asdict(self.spec.objective),
            "method": self.spec.method,
            "seed": self.spec.seed,
            "budget": self.spec.budget.to_dict(),
            "costs": dict(self.costs),
            "uniform": dict(self.uniform),
            "labels": list(self.problem.labels),
            "sensitivities": self.sensitivities,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "recipe": self.recipe.to_dict(),
        }


class SearchFolder:
    """What a search keeps: the bank of blocks, candidates, measured times. Names change with what went in,
    so one folder serves many budgets, methods and objectives of a model, and a killed run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Refuse a folder of something else."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / MARK).is_file():
            raise QuambaError(
                f"'{self.folder}' is not empty and no folder of a search (it has no {MARK}), expected a new"
                " folder or that of an earlier search."
            )

    def open(self) -> None:
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / MARK
        if not mark.is_file():
            mark.write_text('{"format_version": 1}\n', encoding="utf-8")

    @property
    def bank(self) -> Path:
        return self.folder / "blocks"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def times(self) -> Path:
        return self.folder / "times.json"

    def candidates(self, identity: object) -> CandidateStore:
        return CandidateStore(self.folder / f"candidates-{digest(identity)}.jsonl")


def search(
    source: str,
    network: MambaLM,
    calibration: Any,
    sequences: Sequence[Tensor],
    spec: SearchSpec,
    folder: Path,
    progress: Progress | None = None,
) -> Outcome:
    """
    source       where the float model is, for the processes that score
    network      the same, loaded
    calibration  text that the blocks are quantized with (``CalibrationSet``), or None where none is needed
    sequences    text of the objective, ids (L,) int64 each; other text than ``calibration``, to which the
                 weights have been fitted
    folder       kept and used again: docs/mixed-precision.md
    """
    progress = progress or Silent()
    spec.check(network.config)
    kept = SearchFolder(folder)
    kept.open()
    made_of = {
        "model": weights_digest(network),
        "calibration": None if calibration is None else calibration.fingerprint,
    }
    plan = plan_bank(spec.base, spec.labels, network.config)
    folders = bank_folders(kept.bank, plan, made_of)
    fill_bank(folders, plan, network, calibration, source, kept.work, progress)
    scoring = Scoring(source, spec.base, plan, folders, spec.objective, tuple(sequences), spec.backend)
    bank = scoring.bank(spec.devices[0])
    banks = {"made_of": made_of, "models": {label: folder.name for label, folder in folders.items()}}
    limits = limits_of(spec.budget, bank, spec.labels, spec.time, kept.times, banks, progress)
    problem = spec.problem(network.config.n_layer, limits)
    check_feasible(problem)
    store = kept.candidates([banks, _identity(spec, sequences)])
    with _runner(scoring, spec.devices, bank) as runner:
        return _run(problem, store, runner, spec, bank, source, progress)


def _run(
    problem: Problem,
    store: CandidateStore,
    runner: Runner,
    spec: SearchSpec,
    bank: BlockBank,
    source: str,
    progress: Progress,
) -> Outcome:
    scorer = Scorer(store, runner, progress)
    chosen = method_of(spec.method)(problem, _by_index(problem, scorer), random.Random(spec.seed))
    rest = Scorer(store, runner, progress)
    table = sensitivities(problem, _by_index(problem, rest))
    uniform = rest([(label,) * problem.n_blocks for label in problem.labels])
    labels = tuple(problem.names(chosen))
    return Outcome(
        spec=spec,
        problem=problem,
        chosen=labels,
        score=scorer([labels])[0],
        uniform=dict(zip(problem.labels, uniform, strict=True)),
        sensitivities=table,
        evaluations=len(scorer.asked),
        seconds=sum(candidate.seconds for candidate in scorer.asked.values()),
        candidates=store.all(),
        costs={limit.name: limit.of(chosen) for limit in problem.limits},
        bank=bank,
        source=source,
    )


def _by_index(problem: Problem, scorer: Scorer) -> Callable[[Sequence[Assignment]], list[float]]:
    return lambda assignments: scorer([tuple(problem.names(a)) for a in assignments])


def _runner(scoring: Scoring, devices: Sequence[str], bank: BlockBank) -> AbstractContextManager[Runner]:
    if len(devices) > 1:
        cores = max(1, (os.cpu_count() or 1) // len(devices))
        return Pool(scoring, devices, cores)
    return nullcontext(here(_later(lambda: scoring.scoring(devices[0], bank))))


def _later(make: Callable[[], ScoreSome]) -> ScoreSome:
    """Made when the first candidate comes: a run that finds all scores on disk reads no float model."""
    made: list[ScoreSome] = []

    def score(some: Sequence[Labels]) -> list[float]:
        if not made:
            made.append(make())
        return made[0](some)

    return score


def _identity(spec: SearchSpec, sequences: Sequence[Tensor]) -> dict[str, Any]:
    """What scores depend on besides the blocks."""
    text = [] if spec.objective.kind == "accuracy" else [s.tolist() for s in sequences]
    objective = {k: v for k, v in dataclasses.asdict(spec.objective).items() if k != "batch"}
    return {
        "objective": objective,
        "text": digest(text),
        "device": torch.device(spec.devices[0]).type,
        "backend": spec.backend,
    }
