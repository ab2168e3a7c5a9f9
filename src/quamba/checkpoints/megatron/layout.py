"""Megatron's names of a Mamba2 model's tensors, and how tensor-parallel ranks share each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quamba.models.config import Mamba2Config

#: Megatron's names to those of the state-spaces format. In a name of Megatron's, "decoder" is the stack of
#: layers. Its fused layers keep the norm with the projection; its newest ones have no convolution module.
_RENAMED = (
    (r"^embedding\.word_embeddings\.", "backbone.embedding."),
    (r"^decoder\.final_norm\.", "backbone.norm_f."),
    (r"^output_layer\.", "lm_head."),
    (r"^decoder\.layers\.", "backbone.layers."),
    (r"\.mixer\.in_proj\.layer_norm_(weight|bias)$", r".norm.\1"),
    (r"\.mixer\.conv1d_(weight|bias)$", r".mixer.conv1d.\1"),
)


@dataclass(frozen=True)
class Split:
    """How ranks share a tensor.

    dim    which dimension is split
    parts  its size in the whole model, by part: each rank has its share of the first part, then its share
           of the second, and so on (z, x, B, C and dt of in_proj)
    """

    dim: int
    parts: tuple[int, ...]

    def local_size(self, ranks: int) -> int:
        return sum(self.parts) // ranks


def upstream_name(name: str) -> str:
    """The name in the state-spaces format of a tensor of Megatron's; names without one stay."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def split_of(name: str, config: Mamba2Config) -> Split | None:
    """How ranks share the tensor of this name (state-spaces); None: every rank has all of it."""
    bc = config.ngroups * config.d_state
    if name in ("backbone.embedding.weight", "lm_head.weight"):
        return Split(0, (config.padded_vocab_size,))
    match name.partition(".mixer.")[2]:
        case "in_proj.weight":
            return Split(0, (config.d_inner, config.d_inner, bc, bc, config.nheads))
        case "conv1d.weight" | "conv1d.bias":
            return Split(0, (config.d_inner, bc, bc))
        case "A_log" | "D" | "dt_bias":
            return Split(0, (config.nheads,))
        case "norm.weight":
            return Split(0, (config.d_inner,))
        case "out_proj.weight":
            return Split(1, (config.d_inner,))
    return None


def local_shape(shape: tuple[int, ...], split: Split | None, ranks: int) -> tuple[int, ...]:
    """The shape that one of the ranks has of a tensor."""
    if split is None:
        return shape
    return (*shape[: split.dim], split.local_size(ranks), *shape[split.dim + 1 :])
