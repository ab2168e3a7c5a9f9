"""Mixed precision on the demo models: what each method of `quamba search` chooses, and how good that is.

    python benchmarks/mixed_precision.py [--models mamba2-demo mamba-demo] [--budgets 1 2 3]

For each budget (so many of 6 blocks at W4A16, the others W4A8) the choice of every method, of the heuristics
"first k" and "last k", and the best of 20 random choices by the objective. The objective is KL to the float
model on calibration text. Every choice there is (41 for budgets of 1, 2 and 3) is scored on the whole
held-out text too, 96 windows of 1,024 tokens, by KL and perplexity, so that it can be said what the best
choice would have been. Prints tables and writes benchmarks/results/mixed-precision-{device}.json. Scores are
kept in --work: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
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
from quamba.search.objective import Divergence, kl_sum
from quamba.search.score import Candidate, CandidateStore, Labels
from quamba.search.search import Outcome, SearchSpec, search

ROOT = Path(__file__).parent.parent
DATA = ROOT / "assets" / "data"
WINDOW, BATCH = 1024, 4
LOW, HIGH, DRAWS = "W4A8", "W4A16", 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mamba2-demo", "mamba-demo"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calib_data_num", type=int, default=128)
    parser.add_argument("--calib_seqlen", type=int, default=256)
    parser.add_argument("--objective_num", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--work", type=Path, default=Path("mixed-precision"), help="Folder of the searches.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in of_model(name, arguments)]
    print(markdown(rows))
    write(rows, arguments)


def of_model(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
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
    more = CalibrationSpec(
        data=spec.data, num=spec.num + arguments.objective_num, seqlen=spec.seqlen, seed=spec.seed
    )
    sequences = load_calibration(more, model.tokenizer).sequences[spec.num :]
    folder = arguments.work / name

    def searched(budget: int, method: str) -> Outcome:
        asked = SearchSpec(
            base=load_recipe("w4a8"),
            precisions=(HIGH,),
            budget=Budget({HIGH: budget}),
            method=method,
            seed=arguments.seed,
            devices=(arguments.device,),
        )
        return search(source, model.network, calibration, sequences, asked, folder, Silent())

    rows = []
    for budget in arguments.budgets:
        full = searched(budget, "exhaustive")
        held = held_out(full, model, folder / "heldout.jsonl")
        scores = {c.labels: c.score for c in full.candidates}
        choices = [c for c in scores if c.count(HIGH) == budget]
        measured = {c: held(c) for c in choices}
        ends = {label: held((label,) * len(full.chosen)) for label in (LOW, HIGH)}
        order = sorted(choices, key=lambda c: measured[c]["kl"])

        def row(
            what: str,
            chosen: Labels,
            evaluations: int,
            seconds: float,
            *,
            budget: int = budget,
            scores: dict[Labels, float] = scores,
            measured: dict[Labels, dict[str, float]] = measured,
            order: list[Labels] = order,
        ) -> None:
            rows.append(
                {
                    "model": name,
                    "budget": budget,
                    "by": what,
                    "blocks": [i for i, label in enumerate(chosen) if label == HIGH],
                    "objective": scores[chosen],
                    "heldout_kl": measured[chosen]["kl"],
                    "heldout_perplexity": measured[chosen]["perplexity"],
                    "heldout_rank": 1 + order.index(chosen),
                    "choices": len(order),
                    "evaluations": evaluations,
                    "seconds": round(seconds, 1),
                }
            )

        n = len(full.chosen)
        row("first k", tuple(HIGH if i < budget else LOW for i in range(n)), 0, 0.0)
        row("last k", tuple(HIGH if i >= n - budget else LOW for i in range(n)), 0, 0.0)
        drawn = draws(n, budget, arguments.seed)
        asked = list(dict.fromkeys(drawn))
        seconds = sum(c.seconds for c in full.candidates if c.labels in asked)
        row("best of 20 random", min(drawn, key=scores.__getitem__), len(asked), seconds)
        for method in METHODS:
            found = searched(budget, method)
            row(method, found.chosen, found.evaluations, found.seconds)
        row("best on the held-out text", order[0], len(order), 0.0)
        rows[-1] |= {"uniform_heldout": ends, "uniform_objective": dict(full.uniform)}
        print(markdown([r for r in rows if r["budget"] == budget]), flush=True)
    return rows


def draws(n: int, budget: int, seed: int) -> list[Labels]:
    rng = random.Random(seed)
    chosen = [set(rng.sample(range(n), budget)) for _ in range(DRAWS)]
    return [tuple(HIGH if i in blocks else LOW for i in range(n)) for blocks in chosen]


def held_out(outcome: Outcome, model: quamba.Model, path: Path) -> Callable[[Labels], dict[str, float]]:
    """KL to the float model and perplexity of a candidate on the held-out text, kept in files."""
    assert model.tokenizer is not None
    ids = windows(torch.tensor(model.tokenizer.encode((DATA / "heldout.txt").read_text("utf-8"))), WINDOW)
    stores = {name: CandidateStore(path.with_stem(f"heldout-{name}")) for name in ("kl", "perplexity")}

    def score(labels: Labels) -> dict[str, float]:
        known = {name: store.get(labels) for name, store in stores.items()}
        if any(found is None for found in known.values()):
            started = time.perf_counter()
            values = both(outcome.bank.assemble(labels), wanted(model.network, ids), ids)
            seconds = time.perf_counter() - started
            for name, store in stores.items():
                known[name] = Candidate(labels, values[name], seconds)
                store.add(known[name])
        return {name: found.score for name, found in known.items() if found is not None}

    return score


_WANTED: dict[int, list[Tensor]] = {}


def wanted(network: MambaLM, ids: Tensor) -> list[Tensor]:
    """Log-probabilities of the float model, a batch each; of one model at a time."""
    if id(network) not in _WANTED:
        _WANTED.clear()
        _WANTED[id(network)] = [Divergence.log_probabilities(network, (b, None)) for b in ids.split(BATCH)]
    return _WANTED[id(network)]


@torch.inference_mode()
def both(network: MambaLM, reference: list[Tensor], ids: Tensor) -> dict[str, float]:
    kl = nll = 0.0
    for p, batch in zip(reference, ids.split(BATCH), strict=True):
        logits = network(batch.to(network.device))
        kl += kl_sum(p, logits.flatten(0, 1))
        nll += nll_sum(logits, batch)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return {"kl": kl / ids.numel(), "perplexity": math.exp(nll / tokens)}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | A16 blocks | chosen by | blocks | KL, calibration text | KL, held-out"
        " | perplexity, held-out | rank held-out | scored | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        blocks = ", ".join(map(str, r["blocks"]))
        lines.append(
            f"| {r['model']} | {r['budget']} | {r['by']} | {blocks} | {1e3 * r['objective']:.3f} |"
            f" {1e3 * r['heldout_kl']:.3f} | {r['heldout_perplexity']:.4f} |"
            f" {r['heldout_rank']} of {r['choices']} | {r['evaluations']} | {r['seconds']:.1f} |"
        )
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
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
        "rows": rows,
    }
    path = arguments.out or ROOT / "benchmarks" / "results" / f"mixed-precision-{arguments.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
