"""What leaves share: scales turn floats into codes, weights can be exchanged, float weights are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rounding import assert_codes

from quamba.formats.activation import Overflow, Quantized, Rounding
from quamba.formats.hadamard import hadamard_matrix
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.registry import REFERENCE
from quamba.modules.leaf import Leaf
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm, GatedNorm, UnitNorm
from quamba.modules.rotate import Rotate


def test_a_scale_makes_codes() -> None:
    leaf = Leaf()
    out = torch.ones(2, dtype=torch.int8)
    assert leaf.give(out) is out
    leaf.out_scale = torch.tensor(0.5)
    given = leaf.give(out)
    assert isinstance(given, Quantized)
    assert given.dequantize().tolist() == [0.5, 0.5]
    assert "out_scale" in leaf.state_dict()


def test_set_weight_exchanges_the_parameter() -> None:
    linear = Linear(4, 3, bias=True)
    assert linear.float_weight is linear.weight
    linear.set_weight(QuantizedWeight.empty((3, 4), WeightFormat(4, "channel")))
    assert set(linear.state_dict()) == {"weight.data", "weight.scale", "bias"}
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    with pytest.raises(AssertionError, match="quantized already"):
        _ = linear.float_weight


def test_leaves_run_on_the_kernels_they_hold() -> None:
    calls = []

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append("linear")
        return REFERENCE.linear(*args, **kwargs)

    linear = Linear(4, 3)
    linear.weight.data.zero_()
    linear.kernels = type(REFERENCE)(**{**vars(REFERENCE), "name": "counting", "linear": counted})
    linear(torch.zeros(2, 4))
    assert calls == ["linear"]


def test_rotate_quantizes_with_and_without_rotating() -> None:
    leaf, x = Rotate(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert leaf(x) is x
    leaf.out_scale = torch.tensor(1.0)
    assert leaf(x).codes.tolist() == [[1, 2, 3, 4]]
    leaf.enabled = True
    assert leaf(x).codes.tolist() == [[5, -1, -2, 0]]
    leaf.out_scale = None
    assert leaf(x).tolist() == [[5.0, -1.0, -2.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotate_rounds_sums_of_halves_once(dtype: torch.dtype) -> None:
    """Sums rounded to 16 bits before they are divided would move some codes to the next integer."""
    leaf, x = Rotate(), torch.randn(50, 64).to(dtype)
    leaf.enabled, leaf.out_scale, leaf.compute_dtype = True, torch.tensor(0.03), dtype
    exact = x.double() @ hadamard_matrix(64).T / leaf.out_scale.double()
    twice = (exact * 0.03).to(dtype).double() / leaf.out_scale.double()
    assert_codes(leaf(x).codes, exact)
    assert (twice.round().clamp(-128, 127) != leaf(x).codes.double()).any()


@pytest.mark.parametrize(
    ("rounding", "overflow", "codes"),
    [
        ("half_even", "saturate", [-128, 127, 0, 2]),
        ("half_away", "saturate", [-128, 127, 1, 3]),
        ("half_even", "wrap", [106, -56, 0, 2]),
        ("half_away", "wrap", [106, -56, 1, 3]),
    ],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_rotate_rounds_as_it_is_told(
    rounding: Rounding, overflow: Overflow, codes: list[int], rotated: bool
) -> None:
    wanted = torch.tensor([[-150.0, 200.0, 0.5, 2.5]])
    leaf = Rotate()
    leaf.enabled, leaf.out_scale = rotated, torch.tensor(1.0)
    leaf.rounding, leaf.overflow = rounding, overflow
    assert leaf(wanted @ hadamard_matrix(4, torch.float32) if rotated else wanted).codes.tolist() == [codes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_norms_give_the_compute_dtype_and_a_wide_residual(dtype: torch.dtype) -> None:
    norm = AddNorm(4, 1e-5)
    norm.weight.data.fill_(1.0)
    norm.compute_dtype = dtype
    y, residual = norm(torch.ones(2, 4, dtype=dtype), None)
    assert y.dtype == dtype
    assert residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norm.out_scale = torch.tensor(0.1)
    assert norm(torch.ones(2, 4, dtype=dtype), residual)[0].codes.unique().tolist() == [10]
    unit, gated = UnitNorm(1e-5), GatedNorm(4, 1e-5, ngroups=2, norm_before_gate=False)
    unit.compute_dtype = gated.compute_dtype = dtype
    gated.weight.data.fill_(1.0)
    assert unit(torch.ones(2, 4, dtype=dtype)).dtype == dtype
    assert gated(torch.ones(2, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("to_codes", [False, True])
def test_rotate_takes_the_norm_before_it_along(enabled: bool, to_codes: bool) -> None:
    """One op where it rotates, and the same numbers as of the two leaves."""
    norm, leaf, calls = GatedNorm(64, 1e-5, ngroups=2, norm_before_gate=True), Rotate(), []

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs)
        return REFERENCE.gated_norm_hadamard(*args, **kwargs)

    norm.weight.data.uniform_()
    norm.compute_dtype = leaf.compute_dtype = torch.float16
    leaf.enabled, leaf.rounding, leaf.overflow = enabled, "half_away", "wrap"
    leaf.out_scale = torch.tensor(0.01) if to_codes else None
    leaf.kernels = dataclasses.replace(REFERENCE, name="counting", gated_norm_hadamard=counted)
    y, z = (
        torch.randn(3, 64).half(),
        Quantized(torch.randint(-128, 128, (3, 64)).to(torch.int8), torch.tensor(0.02)),
    )
    given, wanted = leaf(y, z, norm), leaf(norm(y, z))
    assert type(given) is type(wanted)
    assert torch.equal(given.codes, wanted.codes) if to_codes else torch.equal(given, wanted)
    assert len(calls) == enabled
    norm.register_forward_hook(lambda module, args, output: calls.append({}))
    leaf(y, z, norm)
    assert calls[enabled:] == [{}]
