"""Small parameters in int8: what is stored, what comes back, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.formats.parameter import QuantizedParameter, as_tensor


def codes_of(value: Tensor, scale: float) -> list[int]:
    """Nearest integers in float32, as a list of Python numbers."""
    return [round(float(v / torch.tensor(scale))) for v in value.flatten()]


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1,)])
def test_one_scale(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape) * 3
    parameter = QuantizedParameter.from_float(value)
    assert parameter.scale.shape == ()
    assert float(parameter.scale) == float(value.abs().max() / 127)
    assert parameter.shape == parameter.data.shape == shape
    assert parameter.data.flatten().tolist() == codes_of(value, float(parameter.scale))
    assert int(parameter.data.abs().max()) == 127
    assert torch.equal(parameter.dequantize(), parameter.data.float() * parameter.scale)
    assert (parameter.dequantize() - value).abs().max() <= 0.5001 * parameter.scale


def test_a_scale_for_each_part() -> None:
    value = torch.cat([torch.randn(4) * 10, torch.randn(2) * 0.1, torch.zeros(3)])
    parameter = QuantizedParameter.from_float(value, (4, 2, 3))
    assert parameter.scale.shape == (9,)
    for part, codes, scale in zip(
        value.split([4, 2, 3]), parameter.data.split([4, 2, 3]), parameter.scale.split([4, 2, 3]), strict=True
    ):
        alone = QuantizedParameter.from_float(part)
        assert torch.equal(codes, alone.data)
        assert (scale == alone.scale).all()
    assert parameter.dequantize()[6:].tolist() == [0, 0, 0]


def test_zeros_have_a_positive_scale() -> None:
    parameter = QuantizedParameter.from_float(torch.zeros(3))
    assert float(parameter.scale) > 0
    assert parameter.dequantize().tolist() == [0, 0, 0]


def test_codes_are_made_in_float32() -> None:
    value = torch.randn(50)
    from_half = QuantizedParameter.from_float(value.half())
    assert from_half.scale.dtype == torch.float32
    assert torch.equal(from_half.data, QuantizedParameter.from_float(value.half().float()).data)


def test_state_dict_and_casts() -> None:
    leaf = torch.nn.Module()
    leaf.other, leaf.D = torch.nn.Parameter(torch.ones(2)), QuantizedParameter.from_float(torch.randn(4))
    assert set(leaf.state_dict()) == {"other", "D.data", "D.scale"}
    data, scale = leaf.D.data.clone(), leaf.D.scale.clone()
    for cast in (leaf.half, leaf.double, leaf.bfloat16, lambda: leaf.to("cpu", torch.float64)):
        cast()
        assert leaf.other.dtype != torch.float32
        assert torch.equal(leaf.D.data, data)
        assert leaf.D.scale.dtype == torch.float32
        assert torch.equal(leaf.D.scale, scale)


@pytest.mark.parametrize("per_channel", [False, True])
def test_empty_is_filled_from_a_state_dict(per_channel: bool) -> None:
    with torch.device("meta"):
        empty = QuantizedParameter.empty((3, 4), per_channel=per_channel)
    assert empty.scale.shape == ((4,) if per_channel else ())
    assert empty.data.is_meta
    assert empty.device.type == "meta"
    filled = QuantizedParameter.from_float(torch.randn(3, 4), (1, 3) if per_channel else None)
    empty.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), filled.dequantize())
    assert empty.to_empty(device="cpu").data.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_as_tensor(dtype: torch.dtype) -> None:
    value = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    assert as_tensor(value, dtype) is value
    parameter = QuantizedParameter.from_float(value)
    found = as_tensor(parameter, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, parameter.data.to(dtype) * parameter.scale.to(dtype))


WRONG = {
    "float codes": (torch.zeros(3), torch.tensor(1.0)),
    "half scale": (torch.zeros(3, dtype=torch.int8), torch.tensor(1.0).half()),
    "scale of another size": (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)),
    "scale of one": (torch.zeros(2, 3, dtype=torch.int8), torch.ones(1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_buffers_are_named(case: str) -> None:
    data, scale = WRONG[case]
    with pytest.raises(QuambaError, match="expected int8 codes and a float32 scale") as caught:
        QuantizedParameter(data, scale)
    message = str(caught.value)
    assert str(list(data.shape)) in message
    assert str(scale.dtype) in message
    assert message.endswith(".")
