"""Bytes of a model by kind, of its cache, and of what one decode step must move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quamba.checkpoints.tensors import open_tensors
from quamba.checkpoints.upstream import canonical_name
from quamba.models.lm import MambaLM
from quamba.modules.conv import CausalConv1d
from quamba.modules.embedding import Embedding
from quamba.modules.leaf import Leaf
from quamba.modules.linear import Linear
from quamba.modules.norm import AddNorm, GatedNorm, UnitNorm
from quamba.modules.rotate import Rotate
from quamba.modules.ssm import Recurrence

_KIND_OF_LEAF: dict[str, tuple[type[Leaf], ...]] = {
    "embedding": (Embedding,),
    "projections": (Linear,),
    "conv": (CausalConv1d,),
    "scan": (Recurrence,),
    "norms": (AddNorm, GatedNorm, UnitNorm),
    "rotation": (Rotate,),
}
#: The head is a linear, but no projection of a block.
KINDS = (*_KIND_OF_LEAF, "head")


@dataclass(frozen=True)
class SizeReport:
    """All sizes in bytes.

    weights     by kind, every parameter and buffer: a scale counts with the leaf that holds it
    tied_head   the head is the embedding table, which counts as embedding
    conv_state  cached windows of the convolutions, one sequence
    ssm_state   cached states of the recurrences, one sequence
    batch_size  sequences that ``cache_bytes`` is for
    """

    weights: dict[str, int]
    tied_head: bool
    conv_state: int
    ssm_state: int
    batch_size: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def cache_bytes(self) -> int:
        """Caches of the whole batch."""
        return self.batch_size * (self.conv_state + self.ssm_state)

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights_bytes": {**self.weights, "total": self.weight_bytes},
            "tied_head": self.tied_head,
            "cache_bytes_per_sequence": {
                "conv": self.conv_state,
                "ssm": self.ssm_state,
                "total": self.conv_state + self.ssm_state,
            },
            "batch_size": self.batch_size,
            "cache_bytes": self.cache_bytes,
        }


def measure_size(network: MambaLM, batch_size: int = 1) -> SizeReport:
    """The sizes of a network as it is in memory, on any device, "meta" included."""
    owners = {name: kind_of(network, leaf) for name, leaf in leaves(network).items()}
    weights = dict.fromkeys(KINDS, 0)
    for name, tensor in network.named_tensors().items():
        weights[_owner(name, owners)] += tensor.nbytes
    caches = network.new_cache(1).layers
    return SizeReport(
        weights,
        network.tied,
        sum(layer.conv_state.nbytes for layer in caches),
        sum(layer.ssm_state.nbytes for layer in caches),
        batch_size,
    )


@dataclass(frozen=True)
class FileSize:
    """The weight files of a folder, in bytes.

    weights  the tensors by kind, as they are stored; "other" is of no leaf
    header   all that is no tensor
    """

    weights: dict[str, int]
    header: int

    @property
    def total_bytes(self) -> int:
        return sum(self.weights.values()) + self.header

    def to_dict(self) -> dict[str, Any]:
        weights = {**self.weights, "total": sum(self.weights.values())}
        return {"weights_bytes": weights, "header_bytes": self.header, "total_bytes": self.total_bytes}


def file_size(network: MambaLM, folder: Path) -> FileSize:
    """What the weight files that this network was read from hold; only their headers are read."""
    source = open_tensors(folder)
    owners = {name: kind_of(network, leaf) for name, leaf in leaves(network).items()}
    weights = dict.fromkeys((*KINDS, "other"), 0)
    for name in source:
        here = canonical_name(name, network.config.family)
        size = math.prod(source.shape(name)) * source.dtype(name).itemsize
        weights[_kind_of_name(here, owners) or "other"] += size
    total = sum(file.stat().st_size for file in source.files)
    return FileSize(weights, total - sum(weights.values()))


def step_bytes(network: MambaLM, batch_size: int = 1) -> int:
    """The least that one decode step reads and writes: all weights, and the state both ways.

    Of an embedding table that is not the head too, only the looked-up rows are read.
    """
    size = measure_size(network, batch_size)
    table = 0 if network.tied else size.weights["embedding"]
    row = table // network.config.padded_vocab_size
    return size.weight_bytes - table + batch_size * row + 2 * size.cache_bytes


def leaves(network: MambaLM) -> dict[str, Leaf]:
    return {name: module for name, module in network.named_modules() if isinstance(module, Leaf)}


def kind_of(network: MambaLM, leaf: Leaf) -> str:
    """One of ``KINDS``."""
    if leaf is network.lm_head:
        return "head"
    for kind, types in _KIND_OF_LEAF.items():
        if isinstance(leaf, types):
            return kind
    raise AssertionError(f"a leaf of unknown kind: {type(leaf).__name__}")


def _owner(tensor: str, kinds: dict[str, str]) -> str:
    """The kind of the leaf that holds a tensor of the network."""
    kind = _kind_of_name(tensor, kinds)
    assert kind is not None, f"a tensor of no leaf: {tensor}"
    return kind


def _kind_of_name(tensor: str, kinds: dict[str, str]) -> str | None:
    """The kind of the leaf whose name a tensor's begins with; None without one."""
    parts = tensor.split(".")
    found = (kinds.get(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1))
    return next((kind for kind in found if kind is not None), None)
