"""Size and speed of one network on the device that it is on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from quamba.models.lm import MambaLM
from quamba.profiling.latency import Latency, measure
from quamba.profiling.machine import (
    PeakMemory,
    copy_bandwidth_gb_per_s,
    hardware_name,
    matmul_gflop_per_s,
    peak_memory,
    reset_peak,
)
from quamba.profiling.operations import Operations, prefill_operations
from quamba.profiling.size import SizeReport, measure_size, step_bytes
from quamba.profiling.spec import Mode, ProfileSpec
from quamba.quantization.pipeline import Progress, Silent
from quamba.runtime.graph import graph_wanted


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one prefill, and how many of them a second the median prefill did.

    matmul_gop_per_s  what a product of large matrices reaches on this machine
    matmul_dtype      of those: the model's floats on a GPU, float32 on a CPU, where narrower ones are slow
    """

    operations: Operations
    gop_per_s: float
    matmul_gop_per_s: float
    matmul_dtype: str

    @property
    def share_of_matmul(self) -> float:
        """May be above 1 on integers, of which a machine may do more a second."""
        return self.gop_per_s / self.matmul_gop_per_s

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.operations.to_dict(),
            "integer_share": self.operations.integer_share,
            "gop_per_s": self.gop_per_s,
            "matmul_gop_per_s": self.matmul_gop_per_s,
            "matmul_dtype": self.matmul_dtype,
            "share_of_matmul": self.share_of_matmul,
        }


@dataclass(frozen=True)
class Traffic:
    """The least bytes that one decode step moves, and how fast the median step moved them.

    gb_per_s       10^9 bytes a second
    copy_gb_per_s  what copying a buffer larger than the caches reaches on this machine
    """

    step_bytes: int
    gb_per_s: float
    copy_gb_per_s: float

    @property
    def share_of_copy(self) -> float:
        """Above 1 where the weights stay in the caches."""
        return self.gb_per_s / self.copy_gb_per_s

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share_of_copy": self.share_of_copy}


@dataclass(frozen=True)
class ProfileReport:
    """What was measured; None and missing keys stand for modes that were not asked for.

    spec     as asked for, with ``cuda_graph`` decided
    dtype    of floats between leaves, such as "float32"
    threads  of torch on the CPU
    """

    spec: ProfileSpec
    device: str
    hardware: str
    threads: int
    dtype: str
    size: SizeReport | None
    latencies: dict[Mode, Latency]
    arithmetic: Arithmetic | None
    traffic: Traffic | None
    peak: PeakMemory | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; no time limit is None, since JSON has no infinity."""
        spec = {**dataclasses.asdict(self.spec), "modes": list(self.spec.modes)}
        if math.isinf(self.spec.max_seconds):
            spec["max_seconds"] = None
        return {
            "spec": spec,
            "device": self.device,
            "hardware": self.hardware,
            "threads": self.threads,
            "dtype": self.dtype,
            "size": None if self.size is None else self.size.to_dict(),
            "latency": {mode: latency.to_dict() for mode, latency in self.latencies.items()},
            "prefill_arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "decode_traffic": None if self.traffic is None else self.traffic.to_dict(),
            "peak_memory": None if self.peak is None else dataclasses.asdict(self.peak),
        }


def profile(
    network: MambaLM, spec: ProfileSpec | None = None, *, progress: Progress | None = None
) -> ProfileReport:
    """Measure a network, float or quantized; ``spec`` None: all modes with the defaults.

    The prompts are random ids, the same for equal seeds.
    """
    spec, progress = spec or ProfileSpec(), progress or Silent()
    spec = dataclasses.replace(spec, cuda_graph=graph_wanted(spec.cuda_graph, network))
    device = network.device
    reset_peak(device)
    latencies = {mode: measure(network, mode, spec, progress) for mode in spec.timed_modes}
    peak = peak_memory(device) if latencies else None  # before the buffers of the copy test
    return ProfileReport(
        spec=spec,
        device=str(device),
        hardware=hardware_name(device),
        threads=torch.get_num_threads(),
        dtype=str(network.lm_head.compute_dtype).removeprefix("torch."),
        size=measure_size(network, spec.batch_size) if "size" in spec.modes else None,
        latencies=latencies,
        arithmetic=_arithmetic(network, spec, latencies["ttft"]) if "ttft" in latencies else None,
        traffic=_traffic(network, spec, latencies["tpot"]) if "tpot" in latencies else None,
        peak=peak,
    )


def speedups(report: ProfileReport, baseline: ProfileReport) -> dict[Mode, float]:
    """How many times shorter the median of each mode is than the baseline's."""
    return {
        mode: baseline.latencies[mode].median_ms / latency.median_ms
        for mode, latency in report.latencies.items()
        if mode in baseline.latencies
    }


def _arithmetic(network: MambaLM, spec: ProfileSpec, ttft: Latency) -> Arithmetic:
    operations = prefill_operations(network, spec.batch_size, spec.prompt_len)
    dtype = network.lm_head.compute_dtype if network.device.type == "cuda" else torch.float32
    reached = matmul_gflop_per_s(network.device, dtype)
    name = str(dtype).removeprefix("torch.")
    return Arithmetic(operations, operations.count / ttft.median_ms / 1e6, reached, name)


def _traffic(network: MambaLM, spec: ProfileSpec, tpot: Latency) -> Traffic:
    moved = step_bytes(network, spec.batch_size)
    return Traffic(moved, moved / tpot.median_ms / 1e6, copy_bandwidth_gb_per_s(network.device))
