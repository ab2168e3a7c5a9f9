"""The Triton embedding gives the floats of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.kernels.reference import embedding as reference
from quamba.kernels.triton.embedding import embed, embedding

pytestmark = pytest.mark.usefixtures("poison_empty")

FORMATS = [
    WeightFormat(8, "tensor"),
    WeightFormat(8, "channel"),
    WeightFormat(8, "channel", scale_bits=16),
    WeightFormat(8, "group", 16),
    WeightFormat(4, "channel"),
    WeightFormat(4, "group", 16),
    WeightFormat(4, "group", 16, scale_bits=32),
]
VOCABULARY = 37


def table(columns: int, format: WeightFormat) -> QuantizedWeight:
    codes = torch.randint(format.qmin, format.qmax + 1, (VOCABULARY, columns), dtype=torch.int8)
    scale = torch.rand(format.scale_shape((VOCABULARY, columns))) * 0.02 - 0.002
    return QuantizedWeight.from_codes(codes, scale.to(format.scale_dtype), format)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.bits}-{f.granularity}-{f.scale_dtype}")
@pytest.mark.parametrize("columns", [16, 48, 1040])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_quantized(columns: int, format: WeightFormat, out_dtype: torch.dtype, device: torch.device) -> None:
    weight, ids = table(columns, format), torch.randint(VOCABULARY, (2, 3))
    expected = reference.embedding(ids, weight, out_dtype=out_dtype)
    given = embedding(ids.to(device), weight.to(device), out_dtype=out_dtype)
    assert given.dtype == out_dtype
    assert torch.equal(given.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)], ids=str)
def test_float(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    weight, ids = torch.randn(VOCABULARY, 70).to(dtype), torch.randint(VOCABULARY, shape)
    given = embedding(ids.to(device), weight.to(device))
    assert torch.equal(given.cpu(), reference.embedding(ids, weight))


@pytest.mark.parametrize("rounds_to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("four_bits", [False, True])
def test_into_a_residual(four_bits: bool, rounds_to: torch.dtype, device: torch.device) -> None:
    """float32 of what the lookup gives in another type; ids on both sides of it are not written."""
    if rounds_to == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16")
    weight = table(48, WeightFormat(4, "group", 16)) if four_bits else torch.randn(VOCABULARY, 48)
    ids = torch.randint(VOCABULARY, (3,))
    out = torch.full((5, 48), 7.0, device=device)
    expected = reference.embedding(ids, weight, out_dtype=rounds_to).float()
    embed(ids.to(device), weight.to(device), out[1:4], rounds_to)
    assert torch.equal(out[1:4].cpu(), expected)
    assert (out[0] == 7).all() and (out[4] == 7).all()


def test_strided_ids_and_table(device: torch.device) -> None:
    weight, ids = torch.randn(VOCABULARY, 20), torch.randint(VOCABULARY, (3, 8))
    given = embedding(ids.to(device)[:, ::2], weight.to(device)[:, 3:17])
    assert torch.equal(given.cpu(), reference.embedding(ids[:, ::2], weight[:, 3:17]))


def test_an_id_outside_the_table_is_nan(device: torch.device) -> None:
    given = embedding(torch.tensor([1, VOCABULARY, -1], device=device), torch.randn(VOCABULARY, 9).to(device))
    assert given.isnan().all(1).tolist() == [False, True, True]


def test_refusals(device: torch.device) -> None:
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="weight has stride 3 in its last dimension"):
        embedding(ids, torch.randn(4, 3, device=device).T)
    with pytest.raises(ValueError, match="two_level"):
        embedding(ids, QuantizedWeight.empty((8, 16), WeightFormat(4, "two_level", 16), device=device))
