"""Table lookups row by row."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference.embedding import embedding

pytestmark = pytest.mark.usefixtures("poison_empty")

FORMATS = [
    WeightFormat(8, "tensor"),
    WeightFormat(8, "channel"),
    WeightFormat(8, "group", 4),
    WeightFormat(4, "tensor"),
    WeightFormat(4, "channel"),
    WeightFormat(4, "group", 4),
    WeightFormat(4, "group", 128),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_quantized_table(format: WeightFormat, dtype: torch.dtype) -> None:
    codes = torch.randint(format.qmin, format.qmax + 1, (13, 12), dtype=torch.int8)
    scale = (torch.rand(format.scale_shape((13, 12))) + 0.01).to(format.scale_dtype)
    table = QuantizedWeight.from_codes(codes, scale, format)
    ids = torch.tensor([[0, 12, 5, 5], [7, 0, 1, 12]])
    y = embedding(ids, table, out_dtype=dtype)
    assert y.dtype == dtype
    width = 12 // scale.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for b in range(2):
        for t in range(4):
            row = int(ids[b, t])
            for d in range(12):
                step = scale[row if len(scale) > 1 else 0, d // width]
                assert y[b, t, d] == (step.to(wide) * codes[row, d].to(wide)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_float_table(dtype: torch.dtype) -> None:
    table = torch.randn(13, 12, dtype=dtype)
    ids = torch.tensor([[0, 12], [5, 5]])
    assert torch.equal(embedding(ids, table, out_dtype=torch.float64), table[ids].double())


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    table = QuantizedWeight.from_codes(
        torch.zeros(3, 4, dtype=torch.int8), torch.ones(3, 1), WeightFormat(4, "channel")
    )
    assert embedding(ids, table).shape == (*shape, 4)
    assert embedding(ids, torch.randn(3, 4)).shape == (*shape, 4)


def test_non_contiguous_ids() -> None:
    table = torch.randn(13, 4)
    ids = torch.arange(12).view(3, 4).T
    assert torch.equal(embedding(ids, table), table[ids.contiguous()])
