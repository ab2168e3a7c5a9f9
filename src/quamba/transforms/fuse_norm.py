"""Fold the weights of the residual norms into the projections that read them."""

from __future__ import annotations

from torch import Tensor, nn

from quamba.models.lm import Block, MambaLM
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm


def fuse_norms(model: MambaLM) -> None:
    """W <- W diag(g), g <- 1, for every block's norm and in_proj, and for norm_f and the head; in place.

    The model computes the same function. The head is untied, since only it is scaled.
    (Quamba2, section 4; QuaRot, Ashkboos et al. 2024, section 4.)
    """
    model.untie()
    for block in model.blocks:
        fuse_block(block)
    _fuse(model.backbone.norm_f, model.lm_head)


def fuse_block(block: Block) -> None:
    """``fuse_norms`` for one block."""
    _fuse(block.norm, block.mixer.in_proj)


def folded(weight: Tensor, norm: Tensor) -> Tensor:
    """W diag(g) for rows of W (n, K) and the weight g (K,) of the norm before them, in the dtype of W."""
    return (weight.double() * norm.double()).to(weight.dtype)


def _fuse(norm: AddNorm, linear: Linear) -> None:
    if norm.weight is None:
        return
    linear.weight = nn.Parameter(folded(linear.float_weight, norm.weight), requires_grad=False)
    norm.weight = None
