"""``quamba doctor``: what this machine has, and whether every kernel is right on it."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, NearestChoice, say, table
from quamba.cli.flags import BACKENDS
from quamba.errors import QuambaError

if TYPE_CHECKING:
    import torch

    from quamba.kernels.check import Check
    from quamba.kernels.registry import Kernels

EXIT_FAILED = 1
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Run:
    """The checks of one backend on one device."""

    device: str
    backend: str
    checks: list[Check]


@click.command(cls=Command)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda",
    help="auto: the CPU, and the first GPU if there is one.",
)
@click.option(
    "--backend",
    type=NearestChoice(BACKENDS),
    default="auto",
    show_default=True,
    help="Kernels; auto: all that run on the device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(device: str, backend: str, as_json: bool) -> int:
    """Say what this machine has, and check that every kernel gives right results on it.

    Each op runs on small inputs and is compared with its definition in float64; then tiny models of both
    families run a prompt and a few steps. The status is 1 if anything is wrong.
    """
    devices = _devices(device)
    refusals: dict[tuple[str, str], str] = {}
    runs = [
        run
        for target in devices
        for name in (BACKENDS[1:] if backend == "auto" else (backend,))
        if (run := _run(target, name, refusals)) is not None
    ]
    if not runs:
        raise QuambaError(next(iter(refusals.values())))
    passed = all(check.passed for run in runs for check in run.checks)
    machine = _machine(devices)
    if as_json:
        checks = [
            {"device": run.device, "backend": run.backend, **dataclasses.asdict(check)}
            for run in runs
            for check in run.checks
        ]
        click.echo(json.dumps({"passed": passed, "machine": machine, "checks": checks}, indent=2))
    else:
        _print(machine, runs)
    return 0 if passed else EXIT_FAILED


def _devices(device: str) -> list[torch.device]:
    import torch

    from quamba.api import choose_device

    if device == "auto" and torch.cuda.is_available():
        return [torch.device("cpu"), torch.device("cuda")]
    return [choose_device(device)]


def _run(device: torch.device, backend: str, refusals: dict[tuple[str, str], str]) -> Run | None:
    """None, and the reason among the refusals, where these kernels are not for this device."""
    from quamba.kernels.check import Check, check_backend, first_line
    from quamba.runtime.check_ahead import compile_ahead
    from quamba.runtime.check_model import check_models

    try:
        kernels = _kernels(device, backend)
    except QuambaError as error:
        refusals[str(device), backend] = str(error)
        return None
    except Exception as error:  # a broken installation of Triton is what this command is for
        return Run(str(device), backend, [Check("import", backend, False, first_line(error))])
    if device.type == "cuda" and backend == "triton":
        say(f"Compiling the {backend} kernels ...")
        compile_ahead(device, backend)
    say(f"Checking the {backend} kernels on {device} ...")
    return Run(str(device), backend, [*check_backend(kernels, device), *check_models(kernels, device)])


def _kernels(device: torch.device, backend: str) -> Kernels:
    from quamba.kernels.registry import choose_kernels

    return choose_kernels(device, backend)


def _machine(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Facts by name, texts and lists of texts."""
    import torch

    from quamba import __version__
    from quamba.profiling.machine import hardware_name

    cuda = torch.version.cuda
    return {
        "quamba": __version__,
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}",
        "triton": _triton_version(),
        "nvidia driver": _driver_version(),
        "cpu": f"{hardware_name(torch.device('cpu'))}, {torch.get_num_threads()} threads",
        "gpus": _gpus(),
        "auto backend": [_choice(device) for device in devices],
    }


def _gpus() -> list[str]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        gpus.append(
            f"cuda:{i}: {found.name}, compute capability {found.major}.{found.minor},"
            f" {found.total_memory / 2**30:.0f} GiB"
        )
    if gpus:
        return gpus
    if not _DRIVER.exists():
        return ["none: there is no NVIDIA driver here"]
    if torch.version.cuda is None:
        return ["none: there is an NVIDIA driver, but this torch is built without CUDA; install one with it"]
    return [f"none that torch for CUDA {torch.version.cuda} can use; the driver may be too old for it"]


def _driver_version() -> str:
    """From the kernel module's own file; "none" where that is not."""
    if not _DRIVER.exists():
        return "none"
    first, *_ = _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", first)  # the lines after it are of the compiler
    return found.group(1) if found else "unknown"


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _choice(device: torch.device) -> str:
    """Which kernels "auto" takes on a device, and why not the fast ones."""
    from quamba.kernels.registry import why_not_fast

    try:
        reason = why_not_fast(device)
        chosen = _kernels(device, "auto").name
    except Exception as error:
        return f"{device}: none, its kernels cannot be imported ({type(error).__name__})"
    return f"{device}: {chosen}" if reason is None else f"{device}: {chosen}. {reason}"


def _print(machine: dict[str, Any], runs: Sequence[Run]) -> None:
    for name, value in machine.items():
        for line in value if isinstance(value, list) else [value]:
            click.echo(f"{name:<14} {line}")
    header = ("device", "backend", "op", "result", "passed", "seconds", "failing case")
    click.echo("\n" + table(header, [row for run in runs for row in _rows(run)]) + "\n")
    bad = [(run, check) for run in runs for check in run.checks if check.passed is False]
    skipped = sum(check.passed is None for run in runs for check in run.checks)
    for run, check in bad:
        click.echo(f"FAILED on {run.device}, {run.backend}: {check.op} ({check.case}): {check.detail}")
    if skipped:
        click.echo(f"Not run: {skipped} cases, since a failure above left the GPU unusable for this process.")
    if bad or skipped:
        click.echo("Do not trust results on this machine with backends that failed above.")
    elif all(run.device == "cpu" for run in runs):
        click.echo("All passed. The GPU kernels were not checked: they need a CUDA device.")
    else:
        click.echo("All passed.")


def _rows(run: Run) -> list[tuple[str, ...]]:
    """One for each op, in the order they were run."""
    by_op: dict[str, list[Check]] = {}
    for check in run.checks:
        by_op.setdefault(check.op, []).append(check)
    rows: list[tuple[str, ...]] = []
    for op, checks in by_op.items():
        failed = [check.case for check in checks if check.passed is False]
        good = sum(check.passed is True for check in checks)
        result = "FAIL" if failed else "ok" if good == len(checks) else "not run"
        first = f"{failed[0]}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}" if failed else ""
        seconds = f"{sum(check.seconds for check in checks):.2f}"
        rows.append((run.device, run.backend, op, result, f"{good}/{len(checks)}", seconds, first))
    return rows
