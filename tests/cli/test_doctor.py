"""quamba doctor: facts, a table, and status 1 for anything wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor

from quamba.cli import doctor
from quamba.cli.doctor import command
from quamba.kernels.cases import all_cases
from quamba.kernels.cpu import library
from quamba.kernels.registry import REFERENCE, Kernels
from quamba.runtime import check_model

Run = Callable[..., Result]


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the ops, and of them not the cases that take longest."""
    monkeypatch.setattr(check_model, "check_models", lambda kernels, device: [])
    short = [case for case in all_cases("cpu") if "512 tokens" not in case.name]
    monkeypatch.setattr("quamba.kernels.check.all_cases", lambda device_type: short)


def use(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    monkeypatch.setattr(doctor, "_kernels", lambda device, backend: kernels)


def test_a_sound_machine(run: Run) -> None:
    result = run(command, "--device", "cpu")
    assert result.exit_code == 0, result.output
    facts, listed, verdict = result.stdout.split("\n\n")
    for fact in ("quamba", "system", "python", "torch", "triton", "nvidia driver", "cpu", "gpus"):
        assert any(line.startswith(f"{fact} ") for line in facts.splitlines()), fact
    assert f"torch          {torch.__version__}, built " in facts
    fast = library.available()
    assert ("auto backend   cpu: cpu\n" in f"{facts}\n") == fast
    ops = [field.name for field in dataclasses.fields(Kernels) if field.name != "name"]
    rows = [line.split() for line in listed.splitlines()[2:]]
    assert {row[2] for row in rows} == {*ops, "model"}
    assert all(row[0] == "cpu" and row[3] == "ok" and len(row) == 6 for row in rows)
    assert {row[1] for row in rows} == {"reference", "cpu"} if fast else {"reference"}
    assert verdict == "All passed. The GPU kernels were not checked: they need a CUDA device.\n"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_gpu(run: Run) -> None:
    """Both backends, and tiny models as CUDA graphs."""
    result = run(command, "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert {line.split()[1] for line in result.stdout.splitlines() if " model " in line} == {
        "reference",
        "triton",
    }


def quantize_off_by_one(*args: Any, **named: Any) -> Tensor:
    codes = REFERENCE.quantize(*args, **named)
    codes.view(-1)[-1] ^= 1
    return codes


def raises(*args: Any, **named: Any) -> Tensor:
    raise ValueError("x has stride 2\nand a second line")


BROKEN = {
    "off by one code": ("quantize", quantize_off_by_one, "1 of 2560 codes are wrong", "one row"),
    "nan": (
        "rms_norm",
        lambda *a, **k: REFERENCE.rms_norm(*a, **k) * float("nan"),
        "1360 of 1360 numbers are not finite",
        "int8",
    ),
    "exception": ("linear", raises, "ValueError: x has stride 2", "float32 x float32"),
    "wrong dtype": (
        "ssd_step",
        lambda *a, **k: REFERENCE.ssd_step(*a, **k).double(),
        "it is float64, expected float32",
        "float, state float16",
    ),
}


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(("op", "wrong", "detail", "case"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel(
    run: Run, monkeypatch: pytest.MonkeyPatch, op: str, wrong: Any, detail: str, case: str
) -> None:
    use(monkeypatch, dataclasses.replace(REFERENCE, **{op: wrong}))
    result = run(command, "--device", "cpu", "--backend", "reference")
    assert result.exit_code == 1
    failing = [line for line in result.stdout.splitlines() if " FAIL " in line]
    assert [line.split()[2] for line in failing] == [op]
    reasons = [line for line in result.stdout.splitlines() if line.startswith("FAILED on cpu, reference: ")]
    assert all(f": {op} (" in line for line in reasons)
    assert any(f"({case}): " in line and detail in line for line in reasons)
    assert "second line" not in result.stdout
    assert "Do not trust results" in result.stdout and "All passed" not in result.stdout


def test_a_fault_that_only_models_show(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ids: Tensor, *args: Any, **named: Any) -> Tensor:
        y = REFERENCE.embedding(ids, *args, **named)
        return y * 0 if ids.shape[1] == 1 else y  # no case of the op looks up a single token

    use(monkeypatch, dataclasses.replace(REFERENCE, embedding=wrong))
    result = run(command, "--device", "cpu", "--backend", "reference", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["passed"] is False
    assert {c["op"] for c in found["checks"] if not c["passed"]} == {"model"}


@pytest.mark.usefixtures("no_models")
def test_json(run: Run) -> None:
    result = run(command, "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"] is True
    assert found["machine"]["python"].count(".") == 2
    assert set(found["checks"][0]) == {"device", "backend", "op", "case", "passed", "detail", "seconds"}


@pytest.mark.usefixtures("no_models")
def test_checks_that_were_not_run_are_no_success(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quamba.kernels.check.is_usable", lambda device: False)
    use(monkeypatch, dataclasses.replace(REFERENCE, ssd_scan=raises))
    result = run(command, "--device", "cpu", "--backend", "reference")
    assert result.exit_code == 1
    (row,) = [line.split() for line in result.stdout.splitlines() if " hadamard " in line]
    assert row[3:6] == ["not", "run", "0/11"]
    assert "since a failure above left the GPU unusable" in result.stdout


def test_kernels_that_cannot_be_imported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device, backend: str) -> Kernels:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(doctor, "_kernels", fail)
    result = run(command, "--device", "cpu", "--backend", "triton")
    assert result.exit_code == 1
    assert (
        "FAILED on cpu, triton: import (triton): ImportError: libtriton.so: undefined symbol" in result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu", "--backend", "triton"), "The Triton kernels do not run on 'cpu'"),
        (("--device", "gpu"), "The device is 'gpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'."),
        (("--backend", "tritn"), "Did you mean 'triton'?"),
    ],
    ids=["no GPU", "unknown device", "unknown backend"],
)
def test_refusals(refused: Callable[..., str], arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(command, *arguments)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", "unknown"),
        (None, "none"),
    ],
    ids=["closed", "open", "unreadable", "absent"],
)
def test_driver_version(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, line: str | None, version: str
) -> None:
    file = tmp_path / "version"
    if line is not None:
        file.write_text(line + "\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1)\n")
    monkeypatch.setattr(doctor, "_DRIVER", file)
    assert doctor._driver_version() == version
