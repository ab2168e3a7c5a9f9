"""Norm weights inside the projections: the same function, to float64 rounding."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from variants import RMS_VARIANTS, random_ids

from quamba.transforms.fuse_norm import fuse_norms


@pytest.mark.parametrize("name", RMS_VARIANTS)
def test_preserves_logits(name: str) -> None:
    model = tiny_model(RMS_VARIANTS[name], dtype=torch.float64)
    ids = random_ids(model.config, 2, 19)
    expected = model(ids)
    table = model.backbone.embedding.float_weight.clone()
    fuse_norms(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    assert all(block.norm.weight is None for block in model.blocks)
    assert model.backbone.norm_f.weight is None
    assert not model.tied
    assert torch.equal(model.backbone.embedding.float_weight, table)


def test_scales_columns() -> None:
    model = tiny_model(RMS_VARIANTS["mamba2"])
    block = model.blocks[0]
    weight, gain = block.mixer.in_proj.float_weight.clone(), block.norm.weight.clone()
    fuse_norms(model)
    assert torch.equal(block.mixer.in_proj.float_weight, (weight.double() * gain.double()).float())


def test_twice_is_once() -> None:
    model = tiny_model(RMS_VARIANTS["mamba"])
    fuse_norms(model)
    tensors = {name: value.clone() for name, value in model.named_tensors().items()}
    fuse_norms(model)
    assert all(torch.equal(value, tensors[name]) for name, value in model.named_tensors().items())
