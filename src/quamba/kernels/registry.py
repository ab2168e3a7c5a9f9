"""Which kernels a model runs on, and which the weight solver. Chosen once for a model or a weight."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quamba.errors import QuambaError, one_of
from quamba.kernels.reference import conv, embedding, gptq, hadamard, linear, norm, selective_scan, ssd
from quamba.kernels.reference import quantize as quantize_ops


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One function an op. The reference functions' docstrings are the specification of each."""

    name: str
    quantize: Callable[..., Any]
    embedding: Callable[..., Any]
    linear: Callable[..., Any]
    add_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    gated_rms_norm: Callable[..., Any]
    causal_conv1d: Callable[..., Any]
    selective_scan: Callable[..., Any]
    selective_scan_step: Callable[..., Any]
    ssd_scan: Callable[..., Any]
    ssd_step: Callable[..., Any]
    hadamard: Callable[..., Any]
    hadamard_quantize: Callable[..., Any]
    gated_norm_hadamard: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class SolverKernels:
    """The loops of the weight solver, one function each; specified by ``kernels/reference/gptq.py``."""

    name: str
    round_columns: Callable[..., Any]
    descend_columns: Callable[..., Any]


REFERENCE = Kernels(
    name="reference",
    quantize=quantize_ops.quantize,
    embedding=embedding.embedding,
    linear=linear.linear,
    add_norm=norm.add_norm,
    rms_norm=norm.rms_norm,
    gated_rms_norm=norm.gated_rms_norm,
    causal_conv1d=conv.causal_conv1d,
    selective_scan=selective_scan.selective_scan,
    selective_scan_step=selective_scan.selective_scan_step,
    ssd_scan=ssd.ssd_scan,
    ssd_step=ssd.ssd_step,
    hadamard=hadamard.hadamard,
    hadamard_quantize=hadamard.hadamard_quantize,
    gated_norm_hadamard=hadamard.gated_norm_hadamard,
)

REFERENCE_SOLVER = SolverKernels(
    name="reference", round_columns=gptq.round_columns, descend_columns=gptq.descend_columns
)

#: The file of each op, in the folder of every backend.
_FILES = {
    "quantize": "quantize",
    "embedding": "embedding",
    "linear": "linear",
    "add_norm": "norm",
    "rms_norm": "norm",
    "gated_rms_norm": "norm",
    "causal_conv1d": "conv",
    "selective_scan": "selective_scan",
    "selective_scan_step": "selective_scan",
    "ssd_scan": "ssd",
    "ssd_step": "ssd",
    "hadamard": "hadamard",
    "hadamard_quantize": "hadamard",
    "gated_norm_hadamard": "hadamard",
}

BACKENDS = ("auto", "reference", "triton", "cpu")
#: What "auto" is, by the kind of device.
_FAST = {"cuda": "triton", "cpu": "cpu"}


def choose_kernels(device: torch.device, backend: str = "auto") -> Kernels:
    """The kernels for models on a device.

    backend  "reference" runs anywhere; "triton" on CUDA devices of compute capability 8.0 and newer; "cpu" on
             CPUs where it was compiled when the package was installed; "auto" is the fast one of the device
             where that runs, else the reference, which is said once
    """
    if backend not in BACKENDS:
        raise one_of("The backend", backend, BACKENDS)
    wanted = _FAST.get(device.type, "reference") if backend == "auto" else backend
    if wanted == "reference":
        return REFERENCE
    reason = _without_triton(device) if wanted == "triton" else _without_compiled(device)
    if reason is None:
        return _triton_on(device) if wanted == "triton" else _kernels_of("cpu")
    why = _sentence(wanted, device, reason)
    if backend != "auto":
        raise QuambaError(f"{why}; use backend 'reference'.")
    _say_once(f"The model runs on the reference kernels, which are slow. {why}.")
    return REFERENCE


def why_not_fast(device: torch.device) -> str | None:
    """Why models do without the fast kernels on a device, a sentence; None if they have them."""
    fast = _FAST.get(device.type)
    if fast is None:
        return f"There are no kernels for '{device.type}'."
    reason = _without_triton(device) if fast == "triton" else _without_compiled(device)
    return None if reason is None else f"{_sentence(fast, device, reason)}."


def _sentence(backend: str, device: torch.device, reason: str) -> str:
    name = {"triton": "Triton", "cpu": "compiled CPU"}[backend]
    return f"The {name} kernels do not run on '{device}': {reason}"


def choose_solver_kernels(weight: Tensor) -> SolverKernels:
    """The kernels for solving this weight: Triton for float32 where it runs, else the reference.

    A GPU that goes without is told of once.
    """
    if weight.device.type != "cuda" or weight.dtype != torch.float32:
        return REFERENCE_SOLVER
    reason = _without_triton(weight.device)
    if reason is None:
        return _triton_solver()
    _say_once(f"The weight solver runs on the reference kernels, which are slow on a GPU: {reason}.")
    return REFERENCE_SOLVER


def _without_triton(device: torch.device) -> str | None:
    """Why a device cannot have the Triton kernels; None if it can."""
    if device.type != "cuda":
        return "they need a CUDA device"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _without_compiled(device: torch.device) -> str | None:
    """Why a device cannot have the compiled kernels; None if it can."""
    if device.type != "cpu":
        return "they are for CPUs"
    from quamba.kernels.cpu import library

    found = library.load()
    return found if isinstance(found, str) else None


def _triton_on(device: torch.device) -> Kernels:
    from quamba.kernels.triton.launches import check_tables

    check_tables(device)
    return _kernels_of("triton")


@functools.cache
def _kernels_of(backend: str) -> Kernels:
    """The functions of ``kernels/{backend}/``, which is imported now."""

    def found(op: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(f"quamba.kernels.{backend}.{_FILES[op]}"), op)
        return function

    return Kernels(name=backend, **{op: found(op) for op in _FILES})


@functools.cache
def _triton_solver() -> SolverKernels:
    from quamba.kernels.triton import gptq

    return SolverKernels(
        name="triton", round_columns=gptq.round_columns, descend_columns=gptq.descend_columns
    )


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("quamba").warning(message)
