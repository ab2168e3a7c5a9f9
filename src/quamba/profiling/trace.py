"""torch.profiler: a trace of some runs, and the operators by their own time."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from quamba.models.lm import MambaLM
from quamba.profiling.latency import job, timed_ms
from quamba.profiling.spec import Mode, ProfileSpec

#: Runs in a trace, after one that is not; a ttlt run is hundreds of steps, each of hundreds of operators.
TRACED_RUNS: dict[Mode, int] = {"ttft": 5, "tpot": 5, "ttlt": 1}


@dataclass(frozen=True)
class OpTime:
    """One operator in all traced runs together: calls, and milliseconds without ("self") and with what it
    calls; the device's are 0 without a GPU."""

    name: str
    calls: int
    self_cpu_ms: float
    cpu_ms: float
    self_device_ms: float
    device_ms: float


@dataclass(frozen=True)
class Trace:
    """trace  JSON for Perfetto and TensorBoard; table  CSV, one line an operator, the most time first."""

    mode: Mode
    runs: int
    trace: Path
    table: Path
    ops: list[OpTime]

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "runs": self.runs,
            "trace": str(self.trace),
            "table": str(self.table),
            "ops": [dataclasses.asdict(op) for op in self.ops],
        }


@torch.inference_mode()
def trace(network: MambaLM, mode: Mode, spec: ProfileSpec, folder: str | Path) -> Trace:
    """Profile a few runs of a mode; writes NAME.pt.trace.json and NAME.csv, replacing those of before."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    work, device = job(network, mode, spec), network.device
    timed_ms(work, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch_profile(activities=activities, acc_events=True) as profiler:
        for _ in range(TRACED_RUNS[mode]):
            timed_ms(work, device)
    name = trace_name(mode, spec)
    ops = sorted((_op_time(event) for event in profiler.key_averages()), key=_own_time, reverse=True)
    path, table = folder / f"{name}.pt.trace.json", folder / f"{name}.csv"
    draft = folder / f".{name}.pt.trace.json"
    try:
        profiler.export_chrome_trace(str(draft))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _write_table(table, ops)
    return Trace(mode, TRACED_RUNS[mode], path, table, ops)


def trace_name(mode: Mode, spec: ProfileSpec) -> str:
    """``ttft_prompt_len_1024``, ``tpot``, ``ttlt_prompt_len_1024_gen_len_128``."""
    prompt, new = f"_prompt_len_{spec.prompt_len}", f"_gen_len_{spec.gen_len}"
    return mode + {"ttft": prompt, "ttlt": prompt + new}.get(mode, "")


def _op_time(event: Any) -> OpTime:
    """torch counts microseconds."""
    return OpTime(
        name=event.key,
        calls=event.count,
        self_cpu_ms=event.self_cpu_time_total / 1e3,
        cpu_ms=event.cpu_time_total / 1e3,
        self_device_ms=event.self_device_time_total / 1e3,
        device_ms=event.device_time_total / 1e3,
    )


def _own_time(op: OpTime) -> tuple[float, float]:
    return op.self_device_ms, op.self_cpu_ms


def _write_table(path: Path, ops: list[OpTime]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([field.name for field in dataclasses.fields(OpTime)])
    writer.writerows(dataclasses.astuple(op) for op in ops)
    draft = path.with_name(f".{path.name}")
    try:
        draft.write_text(text.getvalue(), encoding="utf-8", newline="")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
