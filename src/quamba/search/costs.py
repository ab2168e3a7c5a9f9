"""What a block costs in each precision: bytes of weights, milliseconds of a step or of a prompt.

Blocks of one model have the same shapes, so a block costs the n-th part of what n of them cost more or less
than other precisions do: times are those of models with all blocks in one precision, measured, or predicted
from the bytes that a step must move.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from quamba.errors import QuambaError
from quamba.models.lm import Block
from quamba.profiling.latency import measure
from quamba.profiling.machine import copy_bandwidth_gb_per_s, hardware_name
from quamba.profiling.size import measure_size, step_bytes
from quamba.profiling.spec import Mode, ProfileSpec
from quamba.quantization.pipeline import Progress
from quamba.search.blocks import BlockBank, digest
from quamba.search.budget import Budget
from quamba.search.problem import Limit

Times = Literal["measured", "predicted"]


@dataclass(frozen=True, kw_only=True)
class TimeSpec:
    """
    how          "measured" here; "predicted" (tpot alone): bytes of a step by the bandwidth of memory
    bandwidth_gb_per_s  for "predicted"; None: that of a copy, measured here
    """

    how: Times = "measured"
    batch_size: int = 1
    prompt_len: int = 512
    repeats: int = 30
    max_seconds: float = 20.0
    bandwidth_gb_per_s: float | None = None

    def profile(self, mode: Mode) -> ProfileSpec:
        return ProfileSpec(
            modes=(mode,),
            batch_size=self.batch_size,
            prompt_len=self.prompt_len,
            repeats=self.repeats,
            max_seconds=self.max_seconds,
        )


def weight_limit(bank: BlockBank, labels: Sequence[str], most: float) -> Limit:
    """In bytes of every parameter and buffer."""
    n = bank.config.n_layer
    rows = [[block_bytes(bank.blocks[label][i]) for label in labels] for i in range(n)]
    base = bank.assemble([labels[0]] * n)
    own = sum(block_bytes(block) for block in base.blocks)
    fixed = measure_size(base).weight_bytes - own
    return Limit("weights", "bytes", most, float(fixed), tuple(tuple(map(float, row)) for row in rows))


def block_bytes(block: Block) -> int:
    return sum(t.nbytes for t in block.state_dict().values())


def time_limit(
    bank: BlockBank, labels: Sequence[str], mode: Mode, most: float, spec: TimeSpec, progress: Progress
) -> Limit:
    """In milliseconds; a model's time is shared out among its blocks, what is outside them included."""
    n = bank.config.n_layer
    if spec.how == "predicted":
        if mode != "tpot":
            raise QuambaError(
                f"{mode} cannot be predicted from bytes, expected measured times for it (--time measured)."
            )
        rate = spec.bandwidth_gb_per_s or copy_bandwidth_gb_per_s(bank.device)
        totals = [step_bytes(bank.assemble([label] * n), spec.batch_size) / (1e6 * rate) for label in labels]
    else:
        profile = spec.profile(mode)
        totals = [measure(bank.assemble([label] * n), mode, profile, progress).median_ms for label in labels]
    return Limit(mode, "ms", most, 0.0, ((*(total / n for total in totals),),) * n)


def limits_of(
    budget: Budget,
    bank: BlockBank,
    labels: Sequence[str],
    spec: TimeSpec,
    kept: Path,
    identity: object,
    progress: Progress,
) -> tuple[Limit, ...]:
    """The limits of a budget. Measured times are kept in a file, since a run that is resumed must find the
    same costs; ``identity`` says of what models they are."""
    found = []
    for name, most in budget.most.items():
        if name == "weights":
            found.append(weight_limit(bank, labels, most))
            continue
        hardware = hardware_name(bank.device)
        key = digest([identity, name, list(labels), vars(spec), hardware])
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if key not in known:
            limit = time_limit(bank, labels, cast(Mode, name), most, spec, progress)
            known[key] = {"name": name, "labels": list(labels), "ms_a_block": list(limit.cost[0])}
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft = kept.with_name(f".{kept.name}")
            draft.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            draft.replace(kept)
        row = tuple(known[key]["ms_a_block"])
        found.append(Limit(name, "ms", most, 0.0, (row,) * bank.config.n_layer))
    return tuple(found)
