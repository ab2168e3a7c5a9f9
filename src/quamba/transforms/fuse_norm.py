"""Fold the weights of the residual norms into the projections that read them."""

from __future__ import annotations

from torch import nn

from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm


def fuse_norms(model: MambaLM) -> None:
    """W <- W diag(g), g <- 1, for every block's norm and in_proj, and for norm_f and the head; in place.

    The model computes the same function. The head is untied, since only it is scaled.
    (Quamba2, section 4; QuaRot, Ashkboos et al. 2024, section 4.)
    """
    model.untie()
    for block in model.blocks:
        _fuse(block.norm, block.mixer.in_proj)
    _fuse(model.backbone.norm_f, model.lm_head)


def _fuse(norm: AddNorm, linear: Linear) -> None:
    if norm.weight is None:
        return
    weight = linear.float_weight
    scaled = weight.double() * norm.weight.double()
    linear.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    norm.weight = None
