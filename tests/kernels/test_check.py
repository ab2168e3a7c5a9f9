"""Checking kernels: right ones pass, and whatever is wrong with one is found and named."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba.kernels import check, definitions
from quamba.kernels.cases import Case, Draw, all_cases
from quamba.kernels.check import check_backend
from quamba.kernels.registry import REFERENCE, Kernels

CPU = torch.device("cpu")
OPS = [field.name for field in dataclasses.fields(Kernels) if field.name != "name"]


def cases_of(op: str) -> list[Case]:
    return [case for case in all_cases("cuda") if case.op == op]


def broken(op: str, spoil: Callable[[Tensor], Any]) -> Kernels:
    """The reference, but ``spoil`` of the first result of one op."""
    right = getattr(REFERENCE, op)

    def wrong(*args: Any, **named: Any) -> Any:
        result = right(*args, **named)
        return (spoil(result[0]), *result[1:]) if isinstance(result, tuple) else spoil(result)

    return dataclasses.replace(REFERENCE, **{op: wrong})


def move_last(y: Tensor) -> Tensor:
    """The last code by one, or the last float by 2 % of the root mean square and of itself."""
    y = y.clone()
    last = y.view(-1)[-1:]
    if y.dtype == torch.int8:
        last += 1 if last < 127 else -1
    else:
        last += (last.abs() + y.float().square().mean().sqrt()).to(y.dtype) * 0.02
    return y


def test_the_reference_is_right() -> None:
    checks = check_backend(REFERENCE, CPU, all_cases("cuda"))
    assert [c for c in checks if not c.passed] == []


def test_every_op_has_a_definition_and_cases_with_names_of_their_own() -> None:
    assert {case.op for case in all_cases("cpu")} == set(OPS)
    assert all(hasattr(definitions, op) for op in OPS)
    names = [(case.op, case.name) for case in all_cases("cuda")]
    assert len(set(names)) == len(names)


def test_the_same_arguments_every_time() -> None:
    one, other = (Draw(3), Draw(3))
    assert torch.equal(one.floats(5), other.floats(5))
    assert torch.equal(one.codes(5), other.codes(5))


@pytest.mark.parametrize("op", OPS)
def test_one_wrong_element_fails_every_case(op: str) -> None:
    checks = check_backend(broken(op, move_last), CPU, cases_of(op))
    assert [c.case for c in checks if c.passed] == []
    assert all(c.op == op and "1 of " in c.detail for c in checks)


@pytest.mark.parametrize("op", [op for op in OPS if any("state" in case.name for case in cases_of(op))])
def test_a_state_that_is_not_written_fails(op: str) -> None:
    right = getattr(REFERENCE, op)

    def wrong(*args: Any, state: Tensor | None = None, **named: Any) -> Tensor:
        return right(*args, state=None if state is None else state.clone(), **named)

    kernels = dataclasses.replace(REFERENCE, **{op: wrong})
    checks = [c for c in check_backend(kernels, CPU, cases_of(op)) if "state none" not in c.case]
    failed = [c for c in checks if not c.passed]
    assert len(failed) >= 4
    assert all("state: " in c.detail for c in failed)


FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nan": (lambda y: y.float() * float("nan"), "numbers are not finite"),
    "another dtype": (lambda y: y.double(), "result: it is float64, expected float32"),
    "another shape": (lambda y: y[..., :-1], "result: its shape is [1, 3], expected [1, 4]"),
    "nothing": (lambda y: None, "result: it is of type NoneType, expected a tensor"),
    "two results": (lambda y: (y, y), "it gave 2 results, expected 1"),
    "not written": (torch.empty_like, "4 of 4 numbers are not finite"),
    "zeros": (torch.zeros_like, "4 of 4 numbers are wrong, the first at [0, 0]: 0, expected"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_said(spoil: Callable[[Tensor], Any], message: str) -> None:
    case = Case("linear", "small", lambda d: ((d.floats(1, 8), d.floats(4, 8)), {}), 1e-5)
    (found,) = check_backend(broken("linear", spoil), CPU, [case])
    assert (found.op, found.case, found.passed) == ("linear", "small", False)
    assert message in found.detail


def test_codes_not_written_are_seen() -> None:
    case = next(c for c in cases_of("quantize") if c.name == "one row")
    (found,) = check_backend(broken("quantize", torch.empty_like), CPU, [case])
    assert not found.passed and ": 90, expected" in found.detail


def test_a_changed_input_is_seen() -> None:
    def wrong(x: Tensor, *args: Any, **named: Any) -> Tensor:
        y = REFERENCE.hadamard(x, *args, **named)
        x[..., 0] = 0
        return y

    kernels = dataclasses.replace(REFERENCE, hadamard=wrong)
    checks = check_backend(kernels, CPU, cases_of("hadamard"))
    assert {c.detail for c in checks} == {"it changed its inputs"}


def test_an_exception_is_one_line_and_the_rest_runs() -> None:
    def wrong(*args: Any, **named: Any) -> Tensor:
        raise RuntimeError("\nCUDA error: out of luck\nCompile with more luck.")

    checks = check_backend(dataclasses.replace(REFERENCE, rms_norm=wrong), CPU)
    failed = [c for c in checks if not c.passed]
    assert {(c.op, c.detail) for c in failed} == {("rms_norm", "RuntimeError: CUDA error: out of luck")}
    assert all(c.passed is not None for c in checks)


def test_nothing_runs_on_a_gpu_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **named: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(check, "is_usable", lambda device: False)
    checks = check_backend(dataclasses.replace(REFERENCE, rms_norm=wrong), CPU)
    first = next(i for i, c in enumerate(checks) if not c.passed)
    assert checks[first].passed is False and checks[first].op == "rms_norm"
    assert all(c.passed is True for c in checks[:first])
    assert all(c.passed is None and c.detail.startswith("not run") for c in checks[first + 1 :])
    assert len(checks) == len(all_cases("cpu"))


def test_a_code_may_go_either_way_only_near_a_tie() -> None:
    """Of 0.501 and 0.6 steps, the first may be 0."""

    def case(value: float) -> Case:
        return Case("quantize", "near", lambda d: ((torch.tensor([value]), torch.tensor(1.0)), {}), 1e-3)

    down = dataclasses.replace(REFERENCE, quantize=lambda x, scale: torch.zeros(1, dtype=torch.int8))
    assert [c.passed for c in check_backend(down, CPU, [case(0.501), case(0.6)])] == [True, False]


SCRIPT = """
import sys
import torch
from quamba.kernels.cases import all_cases
from quamba.kernels.check import check_backend
from quamba.kernels.registry import _kernels_of
cases = {}
for case in all_cases("cpu"):
    cases.setdefault(case.op, []).append(case)
some = [c for of_op in cases.values() for c in of_op[:3]]
checks = check_backend(_kernels_of("triton"), torch.device("cpu"), some)
failed = [c for c in checks if not c.passed]
print(len(checks), failed)
sys.exit(bool(failed) or len({c.op for c in checks}) != 14)
"""


@pytest.mark.slow
def test_the_triton_kernels_in_the_interpreter(repo_root: Path) -> None:
    """Three cases of each op; in a process of its own, since kernels ask for the interpreter when defined."""
    pytest.importorskip("triton", reason="triton is missing: pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repo_root / "src")}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
