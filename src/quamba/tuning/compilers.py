"""Candidates compiled by several processes ahead of the search, which then finds them in Triton's cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from quamba.kernels.check import is_usable
from quamba.models.lm import MambaLM, on_device
from quamba.recipes.plan import Plan
from quamba.runtime.processes import run_side_by_side
from quamba.tuning.networks import random_network
from quamba.tuning.tune import candidates, unknown

if TYPE_CHECKING:
    from quamba.kernels.triton.launch_tables import Key

Known = Collection["tuple[str, Key]"]


def compile_ahead(
    plans: Sequence[Plan],
    rows: Sequence[int],
    ops: Sequence[str],
    known: Known,
    *,
    device: torch.device,
    jobs: int,
    seconds: float,
) -> None:
    """Returns when all is compiled, or after so many seconds. What goes wrong is left for the search."""
    work = (list(plans), list(rows), list(ops), set(known), str(device))
    run_side_by_side(_compile, *work, jobs=jobs, seconds=seconds)


def _compile(
    number: int, jobs: int, plans: list[Plan], rows: list[int], ops: list[str], known: Any, device: str
) -> None:
    """The search meets the same errors, and says them."""
    target = torch.device(device)
    with on_device(target):
        networks = [random_network(plan, target) for plan in plans]
        compile_share(networks, rows, ops, known, number, jobs)


def compile_share(
    networks: Sequence[MambaLM],
    rows: Sequence[int],
    ops: Sequence[str],
    known: Known,
    number: int,
    jobs: int,
) -> int:
    """Run every ``jobs``-th candidate once, from the ``number``-th on; how many that were."""
    met = done = 0
    for trial, asked in unknown(networks, rows, ops, lambda op, key: (op, key) in known, only_ask=True):
        for launch in candidates(asked):
            met += 1
            if (met - 1) % jobs != number:
                continue
            done += 1
            try:
                with torch.inference_mode():
                    trial.compile(partial(asked.choice.forced, launch))
            except Exception:
                if not is_usable(trial.device):
                    return done
    return done
