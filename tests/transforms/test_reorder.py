"""Heads and channels in another order: the same function, and statistics that move along."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from variants import RMS_VARIANTS, calibration_set, fitting_groups, random_ids

from quamba.calibration.collect import Watch, collect
from quamba.calibration.observers import ChannelMean
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.transforms.fuse_norm import fuse_norms
from quamba.transforms.head_grouping import ChannelOrder, group_heads
from quamba.transforms.reorder import reorder
from quamba.transforms.rotate import rotate

MAMBA2 = {name: config for name, config in RMS_VARIANTS.items() if config.family == "mamba2"}


def random_order(config: ModelConfig, seed: int) -> ChannelOrder:
    shape = (config.ngroups, config.nheads // config.ngroups, config.headdim)
    stats = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    groups = fitting_groups(config)
    order = group_heads(stats, groups.heads, groups.channels)
    assert not torch.equal(order.channel_perm, torch.arange(config.d_inner))
    return order


def channel_means(model: MambaLM, layer: int) -> torch.Tensor:
    observer = ChannelMean(model.config.d_inner)
    path = f"backbone.layers.{layer}.mixer.conv1d"
    collect(
        model,
        calibration_set(model.config).batches(),
        [Watch(path, slice(0, model.config.d_inner), observer)],
    )
    return observer.value()


@pytest.mark.parametrize("name", MAMBA2)
def test_preserves_logits(name: str) -> None:
    model = tiny_model(MAMBA2[name], dtype=torch.float64)
    ids = random_ids(model.config, 2, 19)
    expected = model(ids)
    for i, block in enumerate(model.blocks):
        reorder(block.mixer, random_order(model.config, i))
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    fuse_norms(model)
    rotate(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAMBA2)
def test_moves_every_tensor_with_heads_or_channels(name: str) -> None:
    model = tiny_model(MAMBA2[name])
    mixer = model.blocks[0].mixer
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    reorder(mixer, random_order(model.config, 0))
    unmoved = {key for key, value in mixer.state_dict().items() if torch.equal(value, before[key])}
    only_heads = (
        {"ssm.A_log", "ssm.dt_bias", "ssm.D"} if model.config.nheads == model.config.ngroups else set()
    )
    assert unmoved - {"out_proj.bias"} == only_heads


@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups2", "mamba2-D-has-hdim"])
def test_statistics_are_permuted(name: str) -> None:
    """Grouping once and permuting what was seen equals permuting the model and looking again."""
    model = tiny_model(MAMBA2[name])
    order = random_order(model.config, 0)
    before = [channel_means(model, layer) for layer in range(2)]
    reorder(model.blocks[0].mixer, order)
    torch.testing.assert_close(channel_means(model, 0), before[0][order.channel_perm], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(channel_means(model, 1), before[1], rtol=1e-5, atol=1e-6)


def test_comes_before_rotation() -> None:
    model = tiny_model(MAMBA2["mamba2"])
    fuse_norms(model)
    rotate(model)
    with pytest.raises(AssertionError, match="before rotate"):
        reorder(model.blocks[0].mixer, random_order(model.config, 0))
