"""How much arithmetic a prefill is, from the shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quamba.formats.activation import Quantized
from quamba.formats.hadamard import hadamard_factors
from quamba.formats.weight import QuantizedWeight
from quamba.models.lm import MambaLM
from quamba.modules.conv import CausalConv1d
from quamba.modules.leaf import Leaf, WeightedLeaf
from quamba.modules.linear import Linear
from quamba.modules.rotate import Rotate
from quamba.modules.ssm import SSD, Recurrence
from quamba.profiling.size import kind_of, leaves

# Per token and state element, an exponential counted as one operation.
# Mamba1: delta * A, exp, decay * h, (delta u) * B, their sum, C * h and its sum.
# Mamba2, whose decay is one number a head: decay * S, (delta x) * B, their sum, C * S and its sum.
_SELECTIVE_SCAN_OPS = 7
_SSD_OPS = 5


@dataclass(frozen=True)
class Operations:
    """Additions and multiplications of the definition, each counted as one, by kind of leaf.

    total    by kind: projections, conv, scan, rotation and head; what fast algorithms save or add is not
             counted, neither are the norms and single element-wise operations between them
    integer  the part of each that is on integers: products of int8 activations with quantized weights
    """

    total: dict[str, int]
    integer: dict[str, int]

    @property
    def count(self) -> int:
        return sum(self.total.values())

    @property
    def integer_share(self) -> float:
        return sum(self.integer.values()) / self.count

    def to_dict(self) -> dict[str, Any]:
        return {
            "operations": {**self.total, "total": self.count},
            "integer_operations": {**self.integer, "total": sum(self.integer.values())},
        }


@torch.inference_mode()
def prefill_operations(network: MambaLM, batch_size: int, prompt_len: int) -> Operations:
    """Of ``batch_size`` prompts of ``prompt_len`` tokens with logits of the last token only.

    Reads one token to see which leaves are given integers.
    """
    with _inputs_seen(network) as integer_inputs:
        network(torch.zeros(1, 1, dtype=torch.int64, device=network.device), last_only=True)
    total = dict.fromkeys(("projections", "conv", "scan", "rotation", "head"), 0)
    integer = dict.fromkeys(total, 0)
    for name, leaf in leaves(network).items():
        kind = kind_of(network, leaf)
        if kind not in total:
            continue
        tokens = batch_size * (1 if kind == "head" else prompt_len)
        operations = tokens * _operations_per_token(leaf, network.config.d_inner)
        total[kind] += operations
        if isinstance(leaf, WeightedLeaf) and isinstance(leaf.weight, QuantizedWeight):
            integer[kind] += operations if name in integer_inputs else 0
    return Operations(total, integer)


def _operations_per_token(leaf: Leaf, d_inner: int) -> int:
    if isinstance(leaf, Linear):
        return 2 * leaf.in_features * leaf.out_features
    if isinstance(leaf, CausalConv1d):
        return 2 * leaf.width * leaf.channels
    if isinstance(leaf, Recurrence):
        return (_SSD_OPS if isinstance(leaf, SSD) else _SELECTIVE_SCAN_OPS) * math.prod(leaf.state_shape)
    if isinstance(leaf, Rotate) and leaf.enabled:
        m, k = hadamard_factors(d_inner)  # a dense m x m factor of +-1, then k rounds of butterflies
        return d_inner * (m - 1 + k + 1)
    return 0


@contextmanager
def _inputs_seen(network: MambaLM) -> Iterator[set[str]]:
    """The names of the leaves whose first input was int8 codes during the block."""
    seen: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(inputs[0], Quantized):
                seen.add(name)

        return hook

    handles = [leaf.register_forward_pre_hook(watch(name)) for name, leaf in leaves(network).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
