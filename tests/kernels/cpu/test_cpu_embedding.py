"""Compiled embedding lookup against the reference: the same numbers, always."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.cpu.embedding import embedding
from quamba.kernels.reference import embedding as reference

pytestmark = pytest.mark.usefixtures("instruction_set", "poison_empty")

OUT = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {
    "int8-tensor": WeightFormat(8, "tensor"),
    "int8-channel": WeightFormat(8, "channel"),
    "int8-group": WeightFormat(8, "group", 21),
    "int4-tensor": WeightFormat(4, "tensor"),
    "int4-channel": WeightFormat(4, "channel"),
    "int4-group": WeightFormat(4, "group", 14),
    "int4-group-float32": WeightFormat(4, "group", 42, scale_bits=32),
}


def table(format: WeightFormat, rows: int, columns: int) -> QuantizedWeight:
    codes = torch.randint(format.qmin, format.qmax + 1, (rows, columns), dtype=torch.int8)
    scale = torch.randn(format.scale_shape((rows, columns))).to(format.scale_dtype)
    return QuantizedWeight.from_codes(codes, scale, format)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("out_dtype", OUT)
def test_integer_tables(name: str, out_dtype: torch.dtype) -> None:
    weight = table(FORMATS[name], 37, 210)
    for shape in ((), (1,), (2, 5), (900,)):
        ids = torch.randint(0, 37, shape)
        given = embedding(ids, weight, out_dtype=out_dtype)
        assert torch.equal(given, reference.embedding(ids, weight, out_dtype=out_dtype))


@pytest.mark.parametrize("dtype", [*OUT, torch.float64])
@pytest.mark.parametrize("out_dtype", [*OUT, torch.float64])
def test_float_tables(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    weight = (torch.randn(37, 75) * 1000).to(dtype)
    ids = torch.randint(0, 37, (3, 8))[:, ::2]
    given = embedding(ids, weight, out_dtype=out_dtype)
    assert torch.equal(given, reference.embedding(ids, weight, out_dtype=out_dtype))


def test_refusals() -> None:
    weight = torch.randn(5, 8)
    for ids in ([0, 5], [-1, 2]):
        with pytest.raises(IndexError, match=r"the table has 5 rows"):
            embedding(torch.tensor(ids), weight)
    with pytest.raises(ValueError, match="not contiguous"):
        embedding(torch.tensor([0]), torch.randn(8, 5).t())
    two_level = table(WeightFormat(4, "two_level", 8), 5, 16)
    with pytest.raises(ValueError, match="two_level"):
        embedding(torch.tensor([0]), two_level)
    assert embedding(torch.empty(0, 2, dtype=torch.int64), weight).shape == (0, 2, 8)
