"""Kernels that start early wait in time; where they may not start early they do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quamba.kernels.triton as package
from quamba.kernels.triton.dependency import dependent_launch

FOLDER = Path(package.__file__).parent
#: What kernels before may have written.
WRITTEN = {"x", "z", "u", "dt", "B", "C", "y", "ids", "mask", "residual", "squares", "sums", "state"}
#: Kernels of a fused step, whose first launch is an ordinary one, read the states of their layer early.
STATES = {"state", "window"}
WAIT = "wait_for_inputs"


def early_kernels(folder: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions with a parameter EARLY, but for the two that are told by it what to do."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []
            if isinstance(node, ast.FunctionDef) and "EARLY" in names and path.stem != "dependency":
                yield f"{path.relative_to(folder).with_suffix('')}.{node.name}", node


KERNELS = dict(early_kernels(FOLDER))


def called(node: ast.AST) -> str:
    """The name of the function that an expression calls, '' for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def faults(kernel: ast.FunctionDef, written: set[str]) -> list[str]:
    """What a kernel does wrong: the start of the next comes first, the wait before anything of ``written``
    (or at a pointer made of it) is read and before anything is stored, on every path."""
    steps = [s for s in kernel.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    names = [called(s.value) if isinstance(s, ast.Expr) else "" for s in steps]
    found = [] if names[:1] == ["let_next_start"] else ["does not begin with let_next_start"]
    if WAIT not in names:
        return [*found, "does not wait on every path"]
    written = set(written)
    for step in steps[: names.index(WAIT)]:
        for node in ast.walk(step):
            if isinstance(node, ast.Return):
                found.append("may return before it waits")
            if called(node) in ("store", "atomic_add"):
                found.append("stores before it waits")
            if called(node).strip("_").startswith(("load", "read")):
                found += [f"reads {name} before it waits" for name in sorted(names_in(node) & written)]
            if isinstance(node, ast.Assign) and names_in(node.value) & written:
                written |= names_in(ast.Tuple(node.targets))
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_wait(name: str) -> None:
    assert faults(KERNELS[name], WRITTEN - STATES if name.startswith("decode/") else WRITTEN) == []


@pytest.mark.parametrize(
    "name",
    [
        "conv._conv_kernel",
        "conv_words._word_kernel",
        "embedding._embedding_kernel",
        "gemm._tiles",
        "hadamard._hadamard_kernel",
        "linear._int_words",
        "norm._add_norm_kernel",
        "quantize._quantize_kernel",
        "rotate_tiles._tile_kernel",
        "selective_scan._step_kernel",
        "ssd._step_kernel",
    ],
)
def test_kernels_of_a_step_start_early(name: str) -> None:
    assert name in KERNELS


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("let_next_start(EARLY)\n    wait_for_inputs(EARLY)\n    tl.store(y, tl.load(x))", None),
        ("wait_for_inputs(EARLY)", "does not begin with let_next_start"),
        ("let_next_start(EARLY)\n    if x: wait_for_inputs(EARLY)", "does not wait on every path"),
        (
            "let_next_start(EARLY)\n    v = tl.load(x + 1)\n    wait_for_inputs(EARLY)",
            "reads x before it waits",
        ),
        (
            "let_next_start(EARLY)\n    at = x + 1\n    v = read(at)\n    wait_for_inputs(EARLY)",
            "reads at before it waits",
        ),
        ("let_next_start(EARLY)\n    tl.store(y, 1)\n    wait_for_inputs(EARLY)", "stores before it waits"),
        ("let_next_start(EARLY)\n    if x: return\n    wait_for_inputs(EARLY)", "may return before it waits"),
    ],
    ids=["none", "late", "maybe", "read", "pointer", "store", "return"],
)
def test_faults_are_found(body: str, fault: str | None) -> None:
    kernel = ast.parse(f"def kernel(x, y, EARLY):\n    {body}\n").body[0]
    assert isinstance(kernel, ast.FunctionDef)
    assert faults(kernel, WRITTEN) == ([] if fault is None else [fault])


@pytest.mark.parametrize(("major", "early"), [(8, False), (9, True), (12, True)])
def test_early_where_the_gpu_can(major: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    dependent_launch.cache_clear()
    try:
        named = dependent_launch(torch.device("cuda", 0))
    finally:
        dependent_launch.cache_clear()
    assert named == ({"EARLY": True, "launch_pdl": True} if early else {"EARLY": False})


def test_never_on_a_cpu() -> None:
    assert dependent_launch(torch.device("cpu")) == {"EARLY": False}
