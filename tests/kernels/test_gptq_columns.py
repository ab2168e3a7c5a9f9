"""The solver's loops against a definition of one row in plain numbers."""

from __future__ import annotations

import pytest
import torch
from gptq_columns import SHAPES, block, descended, rounded

from quamba.kernels.reference.gptq import descend_columns, round_columns
from quamba.kernels.registry import REFERENCE_SOLVER, choose_solver_kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (-127, 127)])
def test_rounding_with_feedback(shape: tuple[int, int], one_step: bool, qmin: int, qmax: int) -> None:
    wanted, target, matrix, steps = block(*shape, one_step=one_step, qmax=qmax)
    codes, errors = round_columns(wanted, target, matrix, steps, qmin=qmin, qmax=qmax)
    expected, _ = rounded(wanted, target, matrix, steps, qmin, qmax)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(errors, target - expected * steps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (-127, 127)])
def test_descent(shape: tuple[int, int], one_step: bool, qmin: int, qmax: int) -> None:
    slope, _, matrix, steps = block(*shape, one_step=one_step, qmax=qmax)
    before = torch.randint(qmin, qmax + 1, shape).double()
    codes, moved = descend_columns(slope, before, matrix, steps, qmin=qmin, qmax=qmax)
    expected, _ = descended(slope, before, matrix, steps, qmin, qmax)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(moved, (before - expected) * steps, rtol=0, atol=1e-12)


def test_inputs_stay_as_they_are_and_upper_triangles_are_not_read() -> None:
    wanted, target, matrix, steps = block(9, 5)
    given = [t.clone() for t in (wanted, target, matrix, steps)]
    for op, diagonal in ((round_columns, 0), (descend_columns, 1)):
        hidden = matrix.masked_fill(torch.ones(9, 9).triu(diagonal).bool(), torch.nan)
        expected = op(wanted, target, matrix, steps, qmin=-8, qmax=7)
        found = op(wanted, target, hidden, steps, qmin=-8, qmax=7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((wanted, target, matrix, steps), given, strict=True))


def test_a_cpu_solves_with_the_reference() -> None:
    assert choose_solver_kernels(torch.zeros(2, 2)) is REFERENCE_SOLVER
    assert choose_solver_kernels(torch.zeros(2, 2, dtype=torch.float64)) is REFERENCE_SOLVER
