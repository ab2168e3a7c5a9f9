"""The step of one token in the fastest way that a model's kernels have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM

if TYPE_CHECKING:
    from quamba.runtime.fused_step import FusedStep
    from quamba.runtime.recorded_step import RecordedStep


def step_of(network: MambaLM, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """ids (B,) int64 -> logits (B, padded_vocab), advancing ``cache``: put together once, or leaf by leaf.

    The logits may be overwritten by the next step. To be called in inference mode.
    """
    step = _put_together(network, cache)
    if isinstance(step, str):
        return lambda ids: network(ids[:, None], cache, last_only=True)[:, 0]
    return step


def describe_step(network: MambaLM) -> str:
    """How a network on any device, "meta" too, would be decoded with its kernels: one line for people."""
    step = _put_together(network, network.new_cache(1))
    return f"op by op ({step.rstrip('.')})" if isinstance(step, str) else step.description


def _put_together(network: MambaLM, cache: MambaCache) -> FusedStep | RecordedStep | str:
    """The step without the leaves, or one sentence that says why there is none."""
    if network.kernels.name == "triton":
        from quamba.runtime.fused_step import fused_step

        return fused_step(network, cache)
    if network.kernels.name == "cpu":
        from quamba.runtime.recorded_step import recorded_step

        return recorded_step(network, cache)
    return f"the {network.kernels.name} kernels have no other way."
