"""The recurrences' choice between scan and step, and the formats of their states."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.activation import Quantized
from quamba.modules.conv import CausalConv1d
from quamba.modules.ssm import SSD, Recurrence, SelectiveScan, is_step, only_token


def ssd() -> SSD:
    return SSD(4, 3, 2, ngroups=1, chunk_size=8, dt_limit=(0.0, 1.0), D_has_hdim=False)


def test_a_step_is_one_unmasked_token_with_a_state() -> None:
    one, state = torch.zeros(2, 1, 3), torch.zeros(2, 3, 2)
    mask = torch.ones(2, 1, dtype=torch.bool)
    assert is_step(one, state, None)
    assert is_step(Quantized(one.to(torch.int8), torch.tensor(1.0)), state, None)
    assert not is_step(one, None, None)
    assert not is_step(one, state, mask)
    assert not is_step(torch.zeros(2, 2, 3), state, None)


def test_only_token_keeps_the_scale() -> None:
    codes, scale = torch.arange(6, dtype=torch.int8).view(2, 1, 3), torch.rand(3)
    found = only_token(Quantized(codes, scale))
    assert found.codes.shape == (2, 3)
    assert found.scale is scale


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("leaf", [SelectiveScan(12, 2), ssd()], ids=["mamba", "mamba2"])
def test_new_states(leaf: Recurrence, dtype: torch.dtype) -> None:
    leaf.state_dtype = dtype
    state = leaf.new_state(5, "cpu")
    assert state.shape == ((5, 12, 2) if isinstance(leaf, SelectiveScan) else (5, 4, 3, 2))
    assert state.dtype == dtype
    assert not state.any()


def test_states_of_float64_models_stay_float64() -> None:
    leaf = SelectiveScan(4, 2).double()
    assert leaf.new_state(1, "cpu").dtype == torch.float64


def test_scales_of_groups_are_spread_over_the_channels() -> None:
    leaf = ssd()
    assert leaf.scale_like_state() is None
    leaf.state_scale = torch.tensor([[0.5, 1.0]])
    assert leaf.scale_like_state() is leaf.state_scale
    leaf.state_scale = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    leaf.state_group = torch.tensor([0, 1] * 6, dtype=torch.int32)
    spread = leaf.scale_like_state()
    assert spread.shape == (4, 3, 2)
    assert spread.view(12, 2)[::2].unique(dim=0).tolist() == [[0.5, 1.0]]
    assert spread.view(12, 2)[1::2].unique(dim=0).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.float16), (torch.int8, torch.int8)])
def test_conv_windows(asked: torch.dtype | None, dtype: torch.dtype) -> None:
    leaf = CausalConv1d(6, 4, bias=False)
    leaf.compute_dtype, leaf.state_dtype = torch.float16, asked
    assert leaf.new_state(2, "cpu").shape == (2, 3, 6)
    assert leaf.new_state(2, "cpu").dtype == dtype
