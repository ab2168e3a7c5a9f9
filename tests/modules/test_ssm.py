"""The recurrences' choice between scan and step, and the formats of their states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quamba.formats.activation import Quantized
from quamba.formats.parameter import QuantizedParameter
from quamba.modules.conv import CausalConv1d
from quamba.modules.ssm import SSD, Recurrence, SelectiveScan, is_step, only_token
from quamba.recipes.skeleton import set_parameter


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


def int8_ssd() -> SSD:
    """Four heads of three channels in two groups, with a scale for each state index."""
    leaf = ssd()
    leaf.state_dtype = torch.int8
    leaf.state_scale = torch.tensor([[0.5, 0.25], [2.0, 1.0]])
    leaf.state_group = torch.tensor([0, 1] * 6, dtype=torch.int32)
    return leaf


def test_states_of_float64_models_keep_their_codes() -> None:
    assert int8_ssd().double().new_state(1, "cpu").dtype == torch.int8


def test_an_int8_state_and_its_working_copy() -> None:
    leaf = int8_ssd()
    assert leaf.new_state(2, "cpu", working=True).dtype == torch.float32
    codes = torch.randint(-128, 128, (2, 4, 3, 2), dtype=torch.int8)
    floats = leaf.working(codes)
    for channel in range(12):
        expected = codes.view(2, 12, 2)[:, channel] * leaf.state_scale[channel % 2]
        assert torch.equal(floats.view(2, 12, 2)[:, channel], expected)
    assert torch.equal(leaf.stored(floats), codes)
    floats[0, 0, 0] = torch.tensor([0.76, -1e6])
    assert leaf.stored(floats)[0, 0, 0].tolist() == [2, -128]


def test_a_float16_state_and_its_working_copy() -> None:
    leaf = ssd()
    leaf.state_dtype = torch.float16
    halves = torch.randn(2, 4, 3, 2).half()
    assert torch.equal(leaf.working(halves), halves.float())
    assert torch.equal(leaf.stored(leaf.working(halves)), halves)
    assert leaf.stored(torch.tensor([1e9, -1e9, 1.0])).tolist() == [65504.0, -65504.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_is_never_rounded(dtype: torch.dtype) -> None:
    leaf = ssd().to(dtype)
    state = leaf.new_state(2, "cpu")
    assert state.dtype == leaf.new_state(2, "cpu", working=True).dtype == dtype
    assert leaf.stored(state) is state
    copy = leaf.working(state)
    copy += 1.0
    assert not state.any(), "a copy is a copy"


@pytest.mark.parametrize("length", [1, 5])
def test_a_working_state_is_not_rounded(length: int) -> None:
    """One pass from zeros differs only in how the final state is stored."""
    leaf = int8_ssd()
    for name in ("A_log", "D", "dt_bias"):
        getattr(leaf, name).data.normal_()
    inputs = [torch.randn(2, length, size) for size in (12, 4, 2, 2)]
    working, codes = leaf.new_state(2, "cpu", working=True), leaf.new_state(2, "cpu")
    assert torch.equal(leaf(*inputs, working, None), leaf(*inputs, codes, None))
    assert torch.equal(leaf.stored(working), codes) and codes.any()
    assert not torch.equal(leaf.working(codes), working)


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.float16), (torch.int8, torch.int8)])
def test_conv_windows(asked: torch.dtype | None, dtype: torch.dtype) -> None:
    leaf = CausalConv1d(6, 4, bias=False)
    leaf.compute_dtype, leaf.state_dtype = torch.float16, asked
    assert leaf.new_state(2, "cpu").shape == (2, 3, 6)
    assert leaf.new_state(2, "cpu").dtype == dtype


def in_both_formats(leaf: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """Makes the parameters int8; gives a copy that holds the same values as floats."""
    floats = copy.deepcopy(leaf)
    for name in names:
        value = QuantizedParameter.from_float(getattr(leaf, name))
        assert not torch.equal(value.dequantize(), getattr(leaf, name))
        getattr(floats, name).data = value.dequantize()
        set_parameter(leaf, name, value)
    return floats


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("length", [1, 5])
def test_int8_parameters_are_floats_of_their_real_values(
    family: str, length: int, dtype: torch.dtype
) -> None:
    leaf = SelectiveScan(12, 2) if family == "mamba" else ssd()
    leaf.compute_dtype = dtype
    names = ["A_log", "D", "dt_bias"]
    for name in names:
        getattr(leaf, name).data.normal_()
    floats = in_both_formats(leaf, names if family == "mamba" else names[:2])
    sizes = [12, 12, 2, 2, 12] if family == "mamba" else [12, 4, 2, 2]
    inputs = [torch.randn(2, length, size, dtype=dtype) for size in sizes]
    states = [module.new_state(2, "cpu") for module in (leaf, floats)]
    results = [module(*inputs, state, None) for module, state in zip((leaf, floats), states, strict=True)]
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1])
    assert states[0].any()
    assert torch.equal(states[0], states[1])


def test_an_int8_bias_of_a_convolution_is_a_float_of_its_real_value() -> None:
    leaf = CausalConv1d(6, 4, bias=True)
    leaf.weight.data.normal_()
    leaf.bias.data.normal_()
    floats = in_both_formats(leaf, ["bias"])
    x = torch.randn(2, 7, 6)
    assert torch.equal(leaf(x, None, None), floats(x, None, None))


def test_models_with_int8_parameters_are_wide_where_they_compute_in_float64() -> None:
    leaf = SelectiveScan(4, 2)
    for name in ("A_log", "D", "dt_bias"):
        set_parameter(leaf, name, QuantizedParameter.from_float(torch.randn(getattr(leaf, name).shape)))
    assert leaf.wide == torch.float32
    leaf.compute_dtype = torch.float16
    assert (leaf.wide, leaf.real_parameters()[0].dtype) == (torch.float32, torch.float32)
    leaf.compute_dtype = torch.float64
    assert (leaf.wide, leaf.real_parameters()[0].dtype) == (torch.float64, torch.float64)
    assert leaf.new_state(1, "cpu").dtype == torch.float64


def changed_in_place(leaf: Recurrence) -> None:
    leaf.A_log.add_(1.0)  # type: ignore[union-attr]


def replaced(leaf: Recurrence) -> None:
    leaf.A_log = torch.nn.Parameter(torch.full((4,), 0.5), requires_grad=False)


def made_integers(leaf: Recurrence) -> None:
    set_parameter(leaf, "A_log", QuantizedParameter.from_float(torch.linspace(-1, 1, 4)))


def given_other_data(leaf: Recurrence) -> None:
    leaf.A_log.data = torch.full((4,), 0.25)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [changed_in_place, replaced, made_integers, given_other_data])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_real_parameters_are_kept_until_one_changes(change: Any, mode: Any) -> None:
    leaf = ssd()
    for name in ("A_log", "D", "dt_bias"):
        setattr(leaf, name, torch.nn.Parameter(torch.randn(4), requires_grad=False))
    with mode():
        first = leaf.real_parameters()
        assert all(a is b for a, b in zip(leaf.real_parameters(), first, strict=True))
        assert not first[0].is_inference()
    with torch.no_grad():
        change(leaf)
    fresh = copy.deepcopy(leaf)
    assert fresh._real is None
    found = leaf.real_parameters()
    assert found[0] is not first[0]
    for a, b in zip(found, fresh.real_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_real_parameters_with_gradients_are_not_kept() -> None:
    leaf = ssd()
    for name in ("A_log", "D", "dt_bias"):
        setattr(leaf, name, torch.nn.Parameter(torch.randn(4), requires_grad=False))
    leaf.D.requires_grad_()  # type: ignore[union-attr]
    assert leaf.real_parameters()[0] is not leaf.real_parameters()[0]
