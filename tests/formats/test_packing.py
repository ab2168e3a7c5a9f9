from __future__ import annotations

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.packing import pack_int4, unpack_int4


def test_byte_layout_by_hand():
    codes = torch.tensor([[-1, 7, -8, 0, 3, -5]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0x7F, 0x08, 0xB3]]


def test_every_pair_survives():
    values = torch.arange(-8, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(values, values)
    packed = pack_int4(codes)
    assert packed.shape == (256, 1) and packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), codes)


def test_every_byte_survives():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    codes = unpack_int4(packed)
    assert codes.shape == (2, 8, 32) and codes.dtype == torch.int8
    assert int(codes.min()) == -8 and int(codes.max()) == 7
    assert torch.equal(pack_int4(codes), packed)


def test_non_contiguous_and_empty():
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(codes.T.contiguous().T)), codes)
    strided = codes[:, ::5]
    assert torch.equal(unpack_int4(pack_int4(strided)), strided)
    assert unpack_int4(pack_int4(codes[:0])).shape == (0, 10)


def test_odd_length_is_refused():
    with pytest.raises(QuambaError, match="even, not 3"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match="int8"):
        pack_int4(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="uint8"):
        unpack_int4(torch.zeros(2, 4, dtype=torch.int8))
