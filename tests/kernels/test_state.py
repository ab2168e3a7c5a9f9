"""The formats of the cached SSM state."""

from __future__ import annotations

import pytest
import torch

from quamba.kernels.reference.state import read_state, spread_scale, write_state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_float_states_come_back(dtype: torch.dtype) -> None:
    value = torch.randn(2, 3, 4, dtype=torch.float64).to(dtype)
    state = torch.zeros(2, 3, 4, dtype=dtype)
    write_state(state, value.double(), None)
    assert torch.equal(state, value)
    assert torch.equal(read_state(state, None, torch.float64), value.double())


def test_fp16_saturates_instead_of_becoming_infinite() -> None:
    state = torch.zeros(3, dtype=torch.float16)
    write_state(state, torch.tensor([1e6, -1e6, 2.0]), None)
    assert state.tolist() == [65504.0, -65504.0, 2.0]


def test_int8_has_one_scale_a_state_index() -> None:
    scale = torch.tensor([[0.5, 0.25, 2.0]])
    state = torch.zeros(2, 1, 3, dtype=torch.int8)
    write_state(state, torch.tensor([[[1.0, 1.0, 1.0]], [[-3.25, 100.0, -1000.0]]]), scale)
    assert state.tolist() == [[[2, 4, 0]], [[-6, 127, -128]]]
    assert read_state(state, scale, torch.float32)[1].tolist() == [[-3.0, 31.75, -256.0]]


def test_int8_round_trip_is_exact() -> None:
    state = torch.arange(-128, 128, dtype=torch.int8).view(1, 16, 16)
    scale = torch.rand(16, 1) + 0.01
    copy = state.clone()
    write_state(copy, read_state(state, scale, torch.float32), scale)
    assert torch.equal(copy, state)


def test_writing_is_in_place() -> None:
    state = torch.zeros(2, 2)
    address = state.data_ptr()
    write_state(state, torch.ones(2, 2), None)
    assert state.data_ptr() == address


def test_scales_of_groups_are_spread_over_the_channels() -> None:
    table = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    assert spread_scale(None, None, (4, 3)) is None
    assert spread_scale(table, None, (4, 3)) is table
    spread = spread_scale(table, torch.tensor([0, 1] * 6, dtype=torch.int32), (4, 3))
    assert spread is not None and spread.shape == (4, 3, 2)
    assert spread.view(12, 2)[::2].unique(dim=0).tolist() == [[0.5, 1.0]]
    assert spread.view(12, 2)[1::2].unique(dim=0).tolist() == [[2.0, 4.0]]
