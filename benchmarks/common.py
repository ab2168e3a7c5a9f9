"""What the GPU benchmarks share: the device, timing, the file of results. Run, it does nothing.

A file of results has the rows of many runs on one machine. A row replaces an older one of the same
measurement and names its run, and the run says when, with what versions and by which command it was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from random_models import MODELS, PUBLISHED, compute_dtype

import quamba
from quamba.errors import QuambaError, one_of
from quamba.kernels.registry import choose_kernels
from quamba.profiling.latency import percentile
from quamba.profiling.machine import copy_bandwidth_gb_per_s, hardware_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Seconds that one measurement may take, however many repeats were asked for.
SECONDS_A_MEASUREMENT = 15.0
_WARM_UPS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    median_ms: float
    p5_ms: float
    p95_ms: float
    runs: int

    def to_dict(self) -> Row:
        return dataclasses.asdict(self)


def parser_with_common_options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: the GPU; 'cpu' measures eagerly, to try the script out")
    parser.add_argument("--models", nargs="+", default=PUBLISHED, help=", ".join(MODELS))
    parser.add_argument("--max_seconds", type=float, default=600.0, help="start no further row after these")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/, named after the machine")
    parser.add_argument("--resume", help=argparse.SUPPRESS)  # id of the run to go on with, see restart
    return parser


def check_choices(what: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise one_of(what, value, choices)


def chosen_device(asked: str | None) -> torch.device | None:
    """None, and a sentence about it, where there is no GPU and no other device was asked for."""
    if asked is not None:
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise QuambaError(f"The device is '{asked}', but torch sees no CUDA device; use --device cpu.")
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print("This benchmark needs an NVIDIA GPU; --device cpu --models tiny tries it out without one.")
    return None


def time_runs(run: Callable[[], object], device: torch.device, repeats: int) -> Times:
    """Of each run from its start until the device is done: CUDA events, or the clock of a CPU."""
    run()  # compiles, which is not to be taken from the time for measuring
    times = [_run_ms(run, device)]
    for _ in range(1, min(_WARM_UPS, int(1e3 * SECONDS_A_MEASUREMENT / 10 / max(times[0], 1e-3)))):
        _run_ms(run, device)
    deadline = time.perf_counter() + SECONDS_A_MEASUREMENT
    times.clear()
    while not times or (len(times) < repeats and time.perf_counter() < deadline):
        times.append(_run_ms(run, device))
    return Times(statistics.median(times), percentile(times, 5), percentile(times, 95), len(times))


def _run_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last))


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as the replay of a CUDA graph; on a CPU itself. What it returns is kept for the graph."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more, so that the next row starts as the first did."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a context that the row has lost
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """Kind and first sentence of an error, for a row that failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


class Results:
    """The file of a machine; written after every row.

    key  names of the columns that tell one measurement from another
    """

    def __init__(
        self, script: str, key: Sequence[str], device: torch.device, options: argparse.Namespace
    ) -> None:
        self.key = tuple(key)
        hardware = hardware_name(device)
        slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
        self.path: Path = options.out or RESULTS / f"{script}-{slug}.json"
        self._content = _read(self.path, hardware)
        self.run: str = options.resume or datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        if self.run not in self._content["runs"]:
            self._content["runs"][self.run] = _stamp(device)
        self.copy_gb_per_s: float = self._content["runs"][self.run]["copy_gb_per_s"]
        self._device, self._options = device, options

    def has(self, row: Row) -> bool:
        """Whether this run has measured it already, before it was started again."""
        return any(self._same(row, old) and old["run"] == self.run for old in self._content["rows"])

    def find(self, **key: Any) -> Row | None:
        """The row of a measurement, of this run or an earlier one."""
        return next((old for old in self._content["rows"] if self._same(key, old)), None)

    def add(self, row: Row) -> None:
        rows = [old for old in self._content["rows"] if not self._same(row, old)]
        rows.append({name: _short(value) for name, value in row.items()} | {"run": self.run})
        used = {old["run"] for old in rows}
        runs = {name: stamp for name, stamp in self._content["runs"].items() if name in used}
        self._content |= {"runs": runs, "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_layout(self._content), encoding="utf-8")
        partial.replace(self.path)

    def restart_if_lost(self) -> None:
        """After a failed row: kernel errors end a CUDA context, so the rest is measured in a new process."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            print("The CUDA context is lost; going on in a new process.", flush=True)
            os.execv(sys.executable, [sys.executable, *sys.argv, "--resume", self.run])

    def say_where(self) -> None:
        measured = any(row["run"] == self.run for row in self._content["rows"])
        print(f"written to {self.path}" if measured else "nothing was measured")

    @property
    def out_of_time(self) -> bool:
        started = datetime.fromisoformat(self.run)
        return (datetime.now(timezone.utc) - started).total_seconds() > self._options.max_seconds

    def _same(self, one: Row, other: Row) -> bool:
        return all(one[name] == other.get(name) for name in self.key)


def _short(value: Any) -> Any:
    """Floats of a row in six digits: no clock here has more."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _read(path: Path, hardware: str) -> dict[str, Any]:
    if not path.exists():
        return {"hardware": hardware, "runs": {}, "rows": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured_on = content["hardware"]
    except (ValueError, KeyError, TypeError) as error:
        raise QuambaError(f"'{path}' is no file of results; name another one with --out.") from error
    if measured_on != hardware:
        raise QuambaError(
            f"'{path}' has results of '{measured_on}', and this is '{hardware}'; name another --out."
        )
    return content


def _layout(content: dict[str, Any]) -> str:
    """JSON with one row a line, so that changes can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _stamp(device: torch.device) -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "copy_gb_per_s": copy_bandwidth_gb_per_s(device),
        "kernels": choose_kernels(device).name,
        "floats": str(compute_dtype(device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "quamba": quamba.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _commit() -> str | None:
    """Short hash, with a plus sign where files were changed since; None outside a repository."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changes else commit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
