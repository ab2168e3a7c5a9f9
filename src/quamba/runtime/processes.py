"""Work for several processes, which leave nothing behind but what is on the disk: compiled kernels."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any


def run_side_by_side(work: Callable[..., Any], *args: Any, jobs: int, seconds: float) -> None:
    """``work(number, jobs, *args)`` for each number below jobs, silently, in a process of its own.

    Returns when all have ended, or after so many seconds. Whatever goes wrong there is not told. work is a
    function of a module, and the arguments can be pickled.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    until = time.monotonic() + seconds
    processes = [
        context.Process(target=_silently, args=(work, number, jobs, *args), daemon=True)
        for number in range(jobs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.terminate()
        process.join()


def _silently(work: Callable[..., Any], *args: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    work(*args)
