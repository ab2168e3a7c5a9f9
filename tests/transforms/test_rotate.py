"""The rotated model: the same function, in another basis."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import RMS_VARIANTS, random_ids

from quamba.formats.hadamard import hadamard_matrix
from quamba.models.config import ModelConfig
from quamba.transforms.fuse_norm import fuse_norms
from quamba.transforms.rotate import rotate

# 20 x 2^k is one of the sizes whose matrix is not symmetric: T and its transpose are told apart.
ASYMMETRIC = {
    "mamba-d40": tiny_config("mamba", d_model=40, bias=True),
    "mamba2-d40": tiny_config("mamba2", d_model=40, bias=True),
    "mamba2-d24": tiny_config("mamba2", d_model=24),
}


def check(config: ModelConfig) -> None:
    model = tiny_model(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    expected = model(ids)
    fuse_norms(model)
    rotate(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    cache = model.new_cache(2)
    steps = torch.cat([model(ids[:, t : t + 1], cache) for t in range(19)], dim=1)
    torch.testing.assert_close(steps, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RMS_VARIANTS)
def test_preserves_logits(name: str) -> None:
    check(RMS_VARIANTS[name])


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_preserves_logits_with_asymmetric_matrices(name: str) -> None:
    check(ASYMMETRIC[name])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_residual_stream_is_the_rotated_one(family: str) -> None:
    model = tiny_model(tiny_config(family, d_model=40), dtype=torch.float64)
    fuse_norms(model)
    ids = random_ids(model.config, 1, 5)
    streams = []
    model.blocks[1].norm.register_forward_hook(lambda module, args, output: streams.append(output[1]))
    model(ids)
    rotate(model)
    model(ids)
    before, after = streams
    torch.testing.assert_close(after, before @ hadamard_matrix(40).T, rtol=1e-10, atol=1e-10)


def test_norms_must_be_fused_before() -> None:
    with pytest.raises(AssertionError, match="fuse_norms comes first"):
        rotate(tiny_model(tiny_config("mamba")))
