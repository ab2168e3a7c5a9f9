"""Put a Mamba2 block's heads and channels into the order that head grouping chose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.models.mamba2 import Mamba2Mixer
from quamba.transforms.head_grouping import ChannelOrder


def reorder(mixer: Mamba2Mixer, order: ChannelOrder) -> None:
    """Permute every tensor that has heads or channels of x and z (table in ``head_grouping``); in place.

    The block computes the same function. Comes before ``rotate``, which mixes out_proj's columns.
    """
    assert not mixer.rotate.enabled, "reorder comes before rotate"
    device = mixer.ssm.A_log.device
    channels, heads = order.channel_perm.to(device), order.head_perm.to(device)
    d_inner, d_bc = len(channels), mixer.conv_sizes[1]
    conv_rows = torch.cat([channels, torch.arange(d_inner, d_inner + 2 * d_bc, device=device)])
    in_rows = torch.cat([channels, d_inner + conv_rows, sum(mixer.in_proj_sizes[:2]) + heads])
    _take(mixer.in_proj, in_rows, "weight", "bias")
    _take(mixer.conv1d, conv_rows, "weight", "bias")
    _take(mixer.ssm, heads, "A_log", "dt_bias")
    _take(mixer.ssm, channels if mixer.ssm.D.shape[0] == d_inner else heads, "D")
    _take(mixer.norm, channels, "weight")
    _set(mixer.out_proj, "weight", mixer.out_proj.float_weight[:, channels])


def _take(module: nn.Module, rows: Tensor, *names: str) -> None:
    for name in names:
        value = getattr(module, name)
        if value is not None:
            _set(module, name, value[rows])


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))
