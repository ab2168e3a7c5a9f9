"""Hadamard rotation of the residual stream and of the scan output."""

from __future__ import annotations

from torch import Tensor, nn

from quamba.kernels.reference.hadamard import hadamard
from quamba.models.lm import MambaLM
from quamba.modules.linear import Linear


def rotate(model: MambaLM) -> None:
    """Work in the basis T x, T the orthonormal Hadamard-type matrix (``formats/hadamard.py``); in place.

    Residual stream, T of size d_model: embedding rows e <- T e; in_proj and head W <- W T^T;
    out_proj W <- T W. RMSNorm without weights commutes with T, so norms must be fused before.
    Scan output, T' of size d_inner: multiplied online by T' (the block's ``rotate`` leaf), undone in
    out_proj W <- W T'^T. The model computes the same function.
    """
    assert all(block.norm.weight is None for block in model.blocks), "fuse_norms comes first"
    embedding = model.backbone.embedding
    embedding.weight = _parameter(_rotate_rows(embedding.float_weight), embedding.float_weight)
    for block in model.blocks:
        _rotate_input(block.mixer.in_proj)
        _rotate_input(block.mixer.out_proj)
        _rotate_output(block.mixer.out_proj)
        block.mixer.rotate.enabled = True
    _rotate_input(model.lm_head)


def _rotate_input(linear: Linear) -> None:
    linear.weight = _parameter(_rotate_rows(linear.float_weight), linear.float_weight)


def _rotate_output(linear: Linear) -> None:
    weight = linear.float_weight
    linear.weight = _parameter(_rotate_rows(weight.t()).t().contiguous(), weight)
    if linear.bias is not None:
        linear.bias = _parameter(_rotate_rows(linear.bias), linear.bias)


def _rotate_rows(weight: Tensor) -> Tensor:
    return hadamard(weight.double())


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
