"""Hadamard rotation of the residual stream and of the scan output."""

from __future__ import annotations

from torch import Tensor, nn

from quamba.kernels.reference.hadamard import hadamard
from quamba.models.lm import Block, MambaLM
from quamba.modules.linear import Linear


def rotate(model: MambaLM) -> None:
    """Work in the basis T x, T the orthonormal Hadamard-type matrix (``formats/hadamard.py``); in place.

    Residual stream, T of size d_model: embedding rows e <- T e; in_proj and head W <- W T^T;
    out_proj W <- T W. RMSNorm without weights commutes with T, so norms must be fused before.
    Scan output, T' of size d_inner: multiplied online by T' (the block's ``rotate`` leaf), undone in
    out_proj W <- W T'^T. The model computes the same function.
    """
    embedding = model.backbone.embedding
    embedding.weight = _parameter(rotate_rows(embedding.float_weight))
    for block in model.blocks:
        rotate_block(block)
    _rotate_input(model.lm_head)


def rotate_block(block: Block) -> None:
    """``rotate`` for one block."""
    assert block.norm.weight is None, "fuse_norms comes first"
    _rotate_input(block.mixer.in_proj)
    _rotate_input(block.mixer.out_proj)
    _rotate_output(block.mixer.out_proj)
    block.mixer.rotate.enabled = True


def rotate_rows(weight: Tensor) -> Tensor:
    """T w for each row w, computed in float64, in the dtype of the rows: the embedding's and the head's."""
    return hadamard(weight.double()).to(weight.dtype)


def _rotate_input(linear: Linear) -> None:
    linear.weight = _parameter(rotate_rows(linear.float_weight))


def _rotate_output(linear: Linear) -> None:
    linear.weight = _parameter(rotate_rows(linear.float_weight.t()).t().contiguous())
    if linear.bias is not None:
        linear.bias = _parameter(rotate_rows(linear.bias))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
