"""The tensors inside a block that two models are compared at, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quamba.formats.activation import Activation, Quantized
from quamba.models.config import MambaConfig, ModelConfig

#: What a rewrite of the model changes at a site: the basis of the residual stream and of out_proj's input,
#: whether norm weights are in the projections, the order of heads and channels.
Need = Literal["rotation", "norms", "order"]


@dataclass(frozen=True)
class Site:
    """Channels [start, stop) of what a leaf of a block gives.

    stream  the residual stream that a norm gives beside its normalised output
    needs   what must be alike in two models whose values are compared here
    """

    name: str
    leaf: str
    start: int = 0
    stop: int | None = None
    stream: bool = False
    needs: tuple[Need, ...] = ()

    def take(self, output: object) -> Activation:
        """(B, L, stop - start), from everything that the leaf gives."""
        if isinstance(output, tuple) and not isinstance(output, Quantized):
            output = output[1 if self.stream else 0]
        channels = slice(self.start, self.stop)
        if isinstance(output, Quantized):
            scale = output.scale[channels] if output.scale.ndim else output.scale
            return Quantized(output.codes[..., channels], scale)
        assert isinstance(output, Tensor)
        return output[..., channels]


def block_sites(config: ModelConfig) -> tuple[Site, ...]:
    """The sites of a block in the order data meets them; names and meanings: docs/analyze.md."""
    d_inner = config.d_inner
    entrance = (
        Site("residual", "norm", stream=True, needs=("rotation",)),
        Site("norm", "norm", needs=("rotation", "norms")),
        Site("in_proj", "mixer.in_proj", needs=("order",)),
        Site("z", "mixer.in_proj", *_z_channels(config), needs=("order",)),
    )
    end = (
        Site("rotate", "mixer.rotate", needs=("rotation", "order")),
        Site("out_proj", "mixer.out_proj", needs=("rotation",)),
    )
    if isinstance(config, MambaConfig):
        return (*entrance, *_selection(config), Site("scan", "mixer.ssm"), *end)
    d_bc = config.ngroups * config.d_state
    return (
        *entrance,
        Site("dt", "mixer.in_proj", d_inner + config.conv_dim, needs=("order",)),
        Site("x", "mixer.conv1d", 0, d_inner, needs=("order",)),
        Site("B", "mixer.conv1d", d_inner, d_inner + d_bc),
        Site("C", "mixer.conv1d", d_inner + d_bc),
        Site("scan", "mixer.ssm", needs=("order",)),
        Site("gated", "mixer.norm", needs=("order",)),
        *end,
    )


def _z_channels(config: ModelConfig) -> tuple[int, int]:
    d_inner = config.d_inner
    return (d_inner, 2 * d_inner) if isinstance(config, MambaConfig) else (0, d_inner)


def _selection(config: MambaConfig) -> tuple[Site, ...]:
    """x, and what is made of it: B, C and dt."""
    start, d_state = config.dt_rank, config.d_state
    if config.bcdt_rms_eps is None:
        bc = (
            Site("B", "mixer.x_proj", start, start + d_state),
            Site("C", "mixer.x_proj", start + d_state),
        )
    else:
        bc = (Site("B", "mixer.B_norm"), Site("C", "mixer.C_norm"))
    return (Site("x", "mixer.conv1d"), Site("x_proj", "mixer.x_proj"), *bc, Site("dt", "mixer.dt_proj"))
