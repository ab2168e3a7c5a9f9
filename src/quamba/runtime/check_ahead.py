"""What a check compiles one kernel after the other, compiled by several processes ahead of it."""

from __future__ import annotations

import os

import torch

from quamba.kernels.cases import all_cases
from quamba.kernels.check import check_backend
from quamba.kernels.registry import Kernels, choose_kernels
from quamba.models.lm import on_device
from quamba.runtime.check_model import check_models
from quamba.runtime.processes import run_side_by_side

_MOST_JOBS = 8
#: After these the check goes on alone, whatever is compiled by then.
_SECONDS = 80.0


def compile_ahead(device: torch.device, backend: str) -> None:
    """Fill Triton's cache with the kernels that the check of a backend runs. Their results are not looked at:
    the check itself meets the same errors, and says them."""
    jobs = min(_MOST_JOBS, os.cpu_count() or 1)
    if jobs > 1:
        run_side_by_side(_check_share, str(device), backend, jobs=jobs, seconds=_SECONDS)


def _check_share(number: int, jobs: int, device: str, backend: str) -> None:
    target = torch.device(device)
    with on_device(target):
        check_share(choose_kernels(target, backend), target, number, jobs)


def check_share(kernels: Kernels, device: torch.device, number: int, jobs: int) -> int:
    """Every ``jobs``-th case and model from the ``number``-th on; how many checks that were."""
    cases = check_backend(kernels, device, all_cases(device.type)[number::jobs])
    return len(cases) + len(check_models(kernels, device, slice(number, None, jobs)))
