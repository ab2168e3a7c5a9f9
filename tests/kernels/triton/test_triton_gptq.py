"""The solver's loops as Triton kernels: the codes of the definition, up to ties of float32."""

from __future__ import annotations

import pytest
import torch
from gptq_columns import SHAPES, block, descended, rounded
from torch import Tensor

from quamba.kernels.triton.gptq import descend_columns, round_columns

pytestmark = pytest.mark.usefixtures("poison_empty")

RANGES = [(-8, 7), (-127, 127)]


def assert_codes(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Equal, or in few rows different from where a number lay in the middle between two integers.

    exact  the real numbers that were rounded, given the expected codes before them
    """
    wrong = found.cpu().double() != expected
    first = wrong & (wrong.cumsum(0) == 1)
    middle = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    assert bool((middle | ~first).all())
    assert int(first.sum()) <= 0.001 * expected.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_rounding_with_feedback(
    shape: tuple[int, int], one_step: bool, qmin: int, qmax: int, device: torch.device
) -> None:
    given = block(*shape, one_step=one_step, qmax=qmax, dtype=torch.float32)
    codes, errors = round_columns(*(t.to(device) for t in given), qmin=qmin, qmax=qmax)
    assert_codes(codes, *rounded(*given, qmin, qmax))
    _, target, _, steps = given
    torch.testing.assert_close(errors.cpu(), target - codes.cpu() * steps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_descent(shape: tuple[int, int], one_step: bool, qmin: int, qmax: int, device: torch.device) -> None:
    slope, _, matrix, steps = block(*shape, one_step=one_step, qmax=qmax, dtype=torch.float32)
    before = torch.randint(qmin, qmax + 1, shape).float()
    given = (slope, before, matrix, steps)
    codes, moved = descend_columns(*(t.to(device) for t in given), qmin=qmin, qmax=qmax)
    assert_codes(codes, *descended(*given, qmin, qmax))
    torch.testing.assert_close(moved.cpu(), (before - codes.cpu()) * steps, rtol=0, atol=1e-5)


def test_ties_go_to_the_even_code(device: torch.device) -> None:
    wanted = torch.tensor([[-9.5, -8.5, -7.5, -2.5, -0.5, 0.5, 1.5, 6.5, 7.5, 300.0]], device=device)
    one = torch.ones(1, 1, device=device)
    codes, _ = round_columns(wanted, wanted, one, one, qmin=-8, qmax=7)
    assert codes.tolist() == [[-8, -8, -8, -2, 0, 0, 2, 6, 7, 7]]


def test_blocks_of_larger_matrices(device: torch.device) -> None:
    """Rows further apart than they are long, as the solver slices them; upper triangles are not read."""
    wanted, target, matrix, steps = (t.to(device) for t in block(24, 20, dtype=torch.float32))

    def inside(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0] + 5, t.shape[1] + 9), torch.nan, device=device)
        wide[3 : 3 + t.shape[0], 4 : 4 + t.shape[1]] = t
        return wide[3 : 3 + t.shape[0], 4 : 4 + t.shape[1]]

    above = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    hidden = inside(matrix.masked_fill(above, torch.nan))
    for op in (round_columns, descend_columns):
        expected = op(wanted, target, matrix, steps, qmin=-8, qmax=7)
        found = op(inside(wanted), inside(target), hidden, inside(steps), qmin=-8, qmax=7)
        turned = op(wanted, target, matrix, steps.T.contiguous().T, qmin=-8, qmax=7)
        for a, b, c in zip(found, expected, turned, strict=True):
            assert torch.equal(a, b) and torch.equal(c, b)


def test_nothing_to_do(device: torch.device) -> None:
    for columns, rows in ((0, 3), (3, 0)):
        empty, matrix = torch.zeros(columns, rows, device=device), torch.eye(columns, device=device)
        for op in (round_columns, descend_columns):
            codes, passed = op(empty, empty, matrix, empty, qmin=-8, qmax=7)
            assert codes.shape == passed.shape == (columns, rows)


def test_what_is_refused(device: torch.device) -> None:
    wanted, target, matrix, steps = (t.to(device) for t in block(4, 6, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"wanted is torch.float64, expected float32"):
        round_columns(wanted.double(), target, matrix, steps, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match=r"codes has stride 4 in its last dimension, expected 1"):
        descend_columns(wanted, target.T.contiguous().T, matrix, steps, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match=r"feedback has 3 columns, expected 4"):
        round_columns(wanted, target, matrix[:3], steps, qmin=-8, qmax=7)
