"""Which kernels a model runs on. Chosen once, when a model is built; never on a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quamba.kernels.reference import conv, embedding, hadamard, linear, norm, selective_scan, ssd
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
)
