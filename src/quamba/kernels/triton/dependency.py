"""Programmatic dependent launch: a kernel starts while the one before it still runs.

``wait_for_inputs`` returns when all kernels before it are done and their writes can be seen. What a kernel
reads before that must be written by no kernel that may still run.

A kernel of a decoding step (``decode/``) calls ``let_next_start`` first, so that the next one can take what
room is left on the GPU. It then reads what no kernel of the step writes before it reads it: weights, and
states of its own layer. The first kernel of a step must be an ordinary launch, which keeps two steps apart.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def let_next_start(EARLY: tl.constexpr) -> None:
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr) -> None:
    if EARLY:
        tl.extra.cuda.gdc_wait()


@functools.lru_cache(maxsize=16)
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that starts early where the GPU can: compute capability 9.0 and newer."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
