"""The Mamba block (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023).

Letters as in the paper and upstream: d_inner = expand * d_model channels, d_state = N states a
channel, dt_rank = R. Activations are floats or int8 codes; the leaves know, the block does not ask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.formats.activation import Activation, split, with_one_scale
from quamba.models.cache import LayerCache
from quamba.models.config import MambaConfig
from quamba.modules.conv import CausalConv1d
from quamba.modules.linear import Linear
from quamba.modules.norm import UnitNorm
from quamba.modules.rotate import Rotate
from quamba.modules.ssm import SelectiveScan


class MambaMixer(nn.Module):
    """Section 3.4, figure 3: project, convolve, select (B, C, dt from the input), scan and gate, project."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        d_inner, dt_rank, d_state = config.d_inner, config.dt_rank, config.d_state
        self.in_proj_sizes = [d_inner, d_inner]
        self.x_proj_sizes = [dt_rank, d_state, d_state]
        self.in_proj = Linear(config.d_model, 2 * d_inner, config.bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, config.conv_bias)
        self.x_proj = Linear(d_inner, dt_rank + 2 * d_state)
        if config.bcdt_rms_eps is not None:  # Falcon Mamba
            self.dt_norm, self.B_norm, self.C_norm = (UnitNorm(config.bcdt_rms_eps) for _ in range(3))
        self.normalises_selection = config.bcdt_rms_eps is not None
        self.dt_proj = Linear(dt_rank, d_inner)  # its bias is ssm.dt_bias, added inside the scan
        self.ssm = SelectiveScan(d_inner, d_state)
        self.rotate = Rotate()
        self.out_proj = Linear(d_inner, config.d_model, config.bias)

    def forward(self, u: Activation, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """u (B, L, d_model) -> (B, L, d_model) float. The cache is read and advanced by L tokens."""
        x, z = split(self.in_proj(u), self.in_proj_sizes)
        x = self.conv1d(x, cache and cache.conv_state, mask)
        # x_proj's columns hold the scales of x where its channels do not share one.
        dt, B, C = split(self.x_proj(with_one_scale(x)), self.x_proj_sizes)
        if self.normalises_selection:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = self.dt_proj(with_one_scale(dt))
        y = self.ssm(x, dt, B, C, z, cache and cache.ssm_state, mask)
        return self.out_proj(self.rotate(y))

    def new_cache(self, batch: int, device: torch.device | str) -> LayerCache:
        return LayerCache(self.conv1d.new_state(batch, device), self.ssm.new_state(batch, device))
