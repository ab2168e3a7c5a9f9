"""The Mamba-2 block (Dao and Gu, "Transformers are SSMs", 2024).

Letters as in the paper and upstream: nheads = H heads of headdim = P channels, ngroups = G pairs of
B and C, d_state = N. Activations are floats or int8 codes; the leaves know, the block does not ask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.formats.activation import Activation, split
from quamba.models.cache import LayerCache
from quamba.models.config import Mamba2Config
from quamba.modules.conv import CausalConv1d
from quamba.modules.linear import Linear
from quamba.modules.norm import GatedNorm
from quamba.modules.rotate import Rotate
from quamba.modules.ssm import SSD


class Mamba2Mixer(nn.Module):
    """Section 7.1, figure 6: one projection gives z, x, B, C, dt; then convolve, SSD, gate and norm."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        d_inner, d_bc = config.d_inner, config.ngroups * config.d_state
        self.in_proj_sizes = [d_inner, config.conv_dim, config.nheads]
        self.conv_sizes = [d_inner, d_bc, d_bc]
        self.in_proj = Linear(config.d_model, sum(self.in_proj_sizes), config.bias)
        self.conv1d = CausalConv1d(config.conv_dim, config.d_conv, config.conv_bias)
        self.ssm = SSD(
            config.nheads,
            config.headdim,
            config.d_state,
            ngroups=config.ngroups,
            chunk_size=config.chunk_size,
            dt_limit=config.dt_limit,
            D_has_hdim=config.D_has_hdim,
        )
        self.norm = GatedNorm(
            d_inner, config.norm_eps, ngroups=config.ngroups, norm_before_gate=config.norm_before_gate
        )
        self.rotate = Rotate()
        self.out_proj = Linear(d_inner, config.d_model, config.bias)

    def forward(self, u: Activation, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """u (B, L, d_model) -> (B, L, d_model) float. The cache is read and advanced by L tokens."""
        z, xBC, dt = split(self.in_proj(u), self.in_proj_sizes)
        xBC = self.conv1d(xBC, cache and cache.conv_state, mask)
        x, B, C = split(xBC, self.conv_sizes)
        y = self.ssm(x, dt, B, C, cache and cache.ssm_state, mask)
        return self.out_proj(self.rotate(y, z, self.norm))

    def new_cache(self, batch: int, device: torch.device | str) -> LayerCache:
        return LayerCache(self.conv1d.new_state(batch, device), self.ssm.new_state(batch, device))
