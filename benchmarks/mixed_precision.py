"""Mixed precision on the demo models: what each method of `quamba search` chooses, and how good that is.

    python benchmarks/mixed_precision.py [--models mamba2-demo mamba-demo] [--budgets 1 2 3]

For each budget (so many of 6 blocks at W4A16, the others W4A8) the choice of every method, of the heuristics
"first k" and "last k", and the best of 20 random choices by the objective. The objective is KL to the float
model on calibration text. What is chosen is scored on the whole held-out text, 96 windows of 1,024 tokens,
by KL and perplexity; with --every_choice all choices are (41 for budgets of 1, 2 and 3), which says what the
best one would have been. Prints tables and writes benchmarks/results/mixed-precision-{device}.json.
Scores are kept in --work: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quamba
from quamba.calibration.data import CalibrationSpec, load_calibration
from quamba.evaluation.perplexity import nll_sum, windows
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import Silent
from quamba.recipes.recipe import load_recipe
from quamba.search.budget import Budget
from quamba.search.methods.registry import METHODS
from quamba.search.objective import Divergence, kl_sum, shared_walk
from quamba.search.score import Candidate, CandidateStore, Labels, portions
from quamba.search.search import Outcome, SearchSpec, search
from quamba.search.texts import OBJECTIVE_SEQLEN, objective_sequences

ROOT = Path(__file__).parent.parent
DATA = ROOT / "assets" / "data"
WINDOW, BATCH = 1024, 4
LOW, HIGH, DRAWS = "W4A8", "W4A16", 20
COLUMNS = ("model", "budget", "by", "blocks", "objective", "heldout_kl", "heldout_perplexity", "rank")
COLUMNS += ("choices", "evaluations", "seconds")
HeldOut = Callable[[Sequence[Labels]], list[dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mamba2-demo", "mamba-demo"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calib_data_num", type=int, default=128)
    parser.add_argument("--calib_seqlen", type=int, default=256)
    parser.add_argument("--objective_num", type=int, default=64)
    parser.add_argument("--objective_seqlen", type=int, default=OBJECTIVE_SEQLEN)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--every_choice", action="store_true", help="Score all there are on the held-out text."
    )
    parser.add_argument("--processes", type=int, default=1, help="That score candidates on calibration text.")
    parser.add_argument("--work", type=Path, default=Path("mixed-precision"), help="Folder of the searches.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, uniform = [], []
    for name in arguments.models:
        own, ends = of_model(name, arguments)
        print(markdown(own), ends, sep="\n", flush=True)
        rows += own
        uniform.append(ends)
    write(rows, uniform, arguments)


def of_model(name: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and the scores of models with all blocks in one precision."""
    source = str(ROOT / "assets" / "models" / name)
    model = quamba.load(source, arguments.device)
    assert model.tokenizer is not None
    spec = CalibrationSpec(
        data=DATA / "calibration.txt",
        num=arguments.calib_data_num,
        seqlen=arguments.calib_seqlen,
        seed=arguments.seed,
    )
    calibration = load_calibration(spec, model.tokenizer)
    tokenizer = model.tokenizer
    sequences = objective_sequences(
        lambda more: load_calibration(more, tokenizer),
        spec,
        calibration,
        arguments.objective_num,
        arguments.objective_seqlen,
    )
    folder = arguments.work / name

    def searched(budget: int, method: str) -> Outcome:
        asked = SearchSpec(
            base=load_recipe("w4a8"),
            precisions=(HIGH,),
            budget=Budget({HIGH: budget}),
            method=method,
            seed=arguments.seed,
            devices=(arguments.device,) * arguments.processes,
        )
        return search(source, model.network, calibration, sequences, asked, folder, Silent())

    full = {budget: searched(budget, "exhaustive") for budget in arguments.budgets}
    rows = [
        row for budget in arguments.budgets for row in chosen_by(full[budget], budget, searched, arguments)
    ]
    held = held_out(full[arguments.budgets[-1]], model, folder / "heldout.jsonl")
    n = len(full[arguments.budgets[-1]].chosen)
    low, high, *_ = held([(LOW,) * n, (HIGH,) * n, *dict.fromkeys(row["labels"] for row in rows)])
    ends = {LOW: low, HIGH: high}
    for row in rows:
        row |= {"model": name, **held([row["labels"]])[0]}
    if arguments.every_choice:
        for budget in arguments.budgets:
            rank(rows, budget, choices(full[budget], budget), held)
    uniform = {"model": name, "heldout": ends, "objective": dict(full[arguments.budgets[-1]].uniform)}
    return [{key: row[key] for key in COLUMNS if key in row} for row in rows], uniform


def choices(outcome: Outcome, budget: int) -> dict[Labels, Candidate]:
    """Every candidate of so many 16-bit blocks."""
    return {c.labels: c for c in outcome.candidates if c.labels.count(HIGH) == budget}


def chosen_by(
    full: Outcome, budget: int, searched: Callable[[int, str], Outcome], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """What heuristics, chance and every method choose, and what that takes."""
    n, known = len(full.chosen), choices(full, budget)
    drawn = list(dict.fromkeys(draws(n, budget, arguments.seed)))
    seconds = sum(known[labels].seconds for labels in drawn)
    found: list[tuple[str, Labels, int, float]] = [
        ("first k", tuple(HIGH if i < budget else LOW for i in range(n)), 0, 0.0),
        ("last k", tuple(HIGH if i >= n - budget else LOW for i in range(n)), 0, 0.0),
        ("best of 20 random", min(drawn, key=lambda c: known[c].score), len(drawn), seconds),
    ]
    for method in METHODS:
        outcome = searched(budget, method)
        found.append((method, outcome.chosen, outcome.evaluations, outcome.seconds))
    return [
        {
            "budget": budget,
            "by": by,
            "labels": labels,
            "blocks": [i for i, label in enumerate(labels) if label == HIGH],
            "objective": known[labels].score,
            "evaluations": evaluations,
            "seconds": round(spent, 1),
        }
        for by, labels, evaluations, spent in found
    ]


def rank(rows: list[dict[str, Any]], budget: int, known: dict[Labels, Candidate], held: HeldOut) -> None:
    """Where each choice stands among all on the held-out text, and the best there is as a row of its own."""
    scores = dict(zip(known, held(list(known)), strict=True))
    order = sorted(known, key=lambda labels: scores[labels]["heldout_kl"])
    own = [row for row in rows if row["budget"] == budget]
    best = {
        "by": "(best on the held-out text)",
        "labels": order[0],
        "evaluations": len(order),
        "seconds": 0.0,
    }
    blocks = [i for i, label in enumerate(order[0]) if label == HIGH]
    best |= {"blocks": blocks, "objective": known[order[0]].score, **scores[order[0]]}
    rows.insert(rows.index(own[-1]) + 1, {**own[-1], **best})
    for row in rows:
        if row["budget"] == budget:
            row |= {"rank": 1 + order.index(row["labels"]), "choices": len(order)}


def draws(n: int, budget: int, seed: int) -> list[Labels]:
    rng = random.Random(seed)
    chosen = [set(rng.sample(range(n), budget)) for _ in range(DRAWS)]
    return [tuple(HIGH if i in blocks else LOW for i in range(n)) for blocks in chosen]


def held_out(outcome: Outcome, model: quamba.Model, path: Path) -> HeldOut:
    """KL to the float model and perplexity of a candidate on the held-out text, kept in files."""
    assert model.tokenizer is not None
    ids = windows(torch.tensor(model.tokenizer.encode((DATA / "heldout.txt").read_text("utf-8"))), WINDOW)
    stores = {name: CandidateStore(path.with_stem(f"heldout-{name}")) for name in ("kl", "perplexity")}

    def score(candidates: Sequence[Labels]) -> list[dict[str, float]]:
        missing = [c for c in candidates if any(store.get(c) is None for store in stores.values())]
        for some in portions(missing, 1):
            started = time.perf_counter()
            networks = [outcome.bank.assemble(labels) for labels in some]
            found = both(networks, model.network, ids)
            seconds = (time.perf_counter() - started) / len(some)
            for labels, values in zip(some, found, strict=True):
                for name, store in stores.items():
                    store.add(Candidate(labels, values[name], seconds))
        kept = [{name: store.get(c) for name, store in stores.items()} for c in candidates]
        return [{f"heldout_{n}": c.score for n, c in one.items() if c is not None} for one in kept]

    return score


@torch.inference_mode()
def both(networks: Sequence[MambaLM], reference: MambaLM, ids: Tensor) -> list[dict[str, float]]:
    kl, nll = [0.0] * len(networks), [0.0] * len(networks)
    for batch in ids.split(BATCH):
        p = Divergence.log_probabilities(reference, (batch, None))
        for k, logits in enumerate(shared_walk(networks, (batch, None))):
            kl[k] += kl_sum(p, logits.flatten(0, 1))
            nll[k] += nll_sum(logits, batch)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return [{"kl": a / ids.numel(), "perplexity": math.exp(b / tokens)} for a, b in zip(kl, nll, strict=True)]


def markdown(rows: list[dict[str, Any]]) -> str:
    ranked = all("rank" in row for row in rows)
    head = ["model", "A16 blocks", "chosen by", "blocks", "KL, calibration text", "KL, held-out"]
    head += ["perplexity, held-out", *(["rank held-out"] if ranked else []), "candidates", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        blocks = ", ".join(map(str, row["blocks"]))
        cells = [row["model"], row["budget"], row["by"], blocks, f"{1e3 * row['objective']:.3f}"]
        cells += [f"{1e3 * row['heldout_kl']:.3f}", f"{row['heldout_perplexity']:.4f}"]
        cells += [f"{row['rank']} of {row['choices']}"] if ranked else []
        cells += [row["evaluations"], f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], uniform: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k not in ("work", "out")}
    record = {
        "options": options,
        "versions": {
            "quamba": quamba.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "uniform": uniform,
        "rows": rows,
    }
    path = arguments.out or ROOT / "benchmarks" / "results" / f"mixed-precision-{arguments.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
