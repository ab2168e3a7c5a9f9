"""Weights written out: every bit of what the format defines."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.triton.unpack import has_whole_rows, unpack, unpack_whole

FORMATS = {
    "int8-channel": WeightFormat(8, "channel"),
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-group": WeightFormat(8, "group", 16),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 128),
    "int4-group-of-3": WeightFormat(4, "group", 3),
    "int4-two-level": WeightFormat(4, "two_level", 128),
}
DTYPES = [
    torch.int8,
    torch.float16,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="Triton's interpreter truncates floats to bfloat16: needs CUDA",
        ),
    ),
]


def random_weight(format: WeightFormat, features: int, inputs: int) -> QuantizedWeight:
    data = torch.randint(0, 256, format.data_shape((features, inputs)), dtype=torch.uint8)
    scale = torch.rand(format.scale_shape((features, inputs))) * 20 + 0.01
    row = torch.rand(features, 1) + 0.01 if format.granularity == "two_level" else None
    return QuantizedWeight(data.view(format.data_dtype), scale.to(format.scale_dtype), format, row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [384, 1536], ids=["in-a-tile", "several-tiles"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_bit(format: WeightFormat, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = random_weight(format, 29, inputs).to(device)
    expected = weight.integers()[0] if dtype == torch.int8 else weight.dequantize(dtype)
    found = unpack(weight, dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(unpack(weight, dtype, 7, 20), expected[7:20])
    assert unpack(weight, dtype, 7, 7).shape == (0, inputs)


def random_multiples(features: int, inputs: int, size: int) -> QuantizedWeight:
    """Every multiple from 1 to 16, of units that float16 holds with 7 bits."""
    format = WeightFormat(4, "group", size, multiples=16)
    data = torch.randint(0, 256, format.data_shape((features, inputs)), dtype=torch.uint8)
    unit = torch.randint(64, 128, (features, 1)).float() * 2.0**-18
    scale = torch.randint(1, 17, format.scale_shape((features, inputs))) * unit
    scale[:, 0] = unit[:, 0]
    return QuantizedWeight(data, scale.half(), format)


@pytest.mark.parametrize(
    ("inputs", "size"), [(384, 128), (2560, 128), (1024, 1024), (96, 8), (48, 16), (64, 128)], ids=str
)
def test_integers_of_whole_rows(inputs: int, size: int, device: torch.device) -> None:
    weight = random_multiples(29, inputs, size).to(device)
    unit = weight.row_unit()
    times = (weight.scale.float() / unit).round().to(torch.int32)
    codes = weight.codes().view(29, times.shape[1], -1).int()
    expected = (codes * times[:, :, None]).view(29, inputs).to(torch.int8)
    assert has_whole_rows(weight)
    found = unpack_whole(weight, unit)
    assert found.dtype == torch.int8 and torch.equal(found, expected)
    assert torch.equal(found.float() * unit, weight.dequantize())
    assert torch.equal(unpack_whole(weight, unit, 7, 20), expected[7:20])
    assert unpack_whole(weight, unit, 7, 7).shape == (0, inputs)


@pytest.mark.parametrize(("inputs", "size"), [(72, 24), (16, 4), (384, 384)], ids=str)
def test_groups_that_are_no_power_of_two_have_none(inputs: int, size: int) -> None:
    assert not has_whole_rows(random_multiples(3, inputs, size))
    assert not has_whole_rows(random_weight(FORMATS["int4-group"], 3, 384))
