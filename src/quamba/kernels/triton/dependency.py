"""Programmatic dependent launch: a kernel starts while the one before it still runs.

``wait_for_inputs`` returns when all kernels before it are done and their writes can be seen. What a kernel
reads before that must be written by no kernel that may still run: tensors of the model, but not what was
computed from them, as A = -exp(A_log). What it writes must wait, too.
Every program of a kernel that is launched so must wait, whatever it does: the kernels after it take its end
for the end of all before it.

``let_next_start`` comes first in a kernel. The next one starts when all programs of this one have, and takes
what room they leave, so kernels of many waves lose nothing by it: they are launched so for prompts as for
steps of decoding, where a launch of one microsecond is much of the two to ten that a kernel takes. A kernel
with an ordinary launch waits for the end of the one before.

The kernels of a fused step (``decode/``) read more early: states of their own layer. A step must begin with
an ordinary launch (the lookup), which keeps two steps apart. Kernels of single ops may follow each other in
any order and number, so they read states after they have waited. To fetch states and weights into the L2
cache before that made steps of batches slower, not faster (docs/notes/gpu-kernels.md).
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


#: Arguments of a kernel that does not start early.
ORDINARY_LAUNCH: dict[str, Any] = {"EARLY": False}


@functools.lru_cache(maxsize=16)
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that starts early where the GPU can: compute capability 9.0 and newer."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else ORDINARY_LAUNCH
