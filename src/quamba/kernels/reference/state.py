"""The cached SSM state: stored in int8, fp16 or fp32, worked on in float."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.kernels.reference.quantize import quantize


def read_state(state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state as floats. scale broadcasts to state and is given exactly for int8 storage."""
    return state.to(dtype) if scale is None else state.to(dtype) * scale.to(dtype)


def spread_scale(
    scale: Tensor | None, group: Tensor | None, channels: tuple[int, ...] | torch.Size
) -> Tensor | None:
    """The scales of an int8 state, broadcastable to it.

    scale     (K, N) or (K, 1) float32, one row a group; without group already broadcastable
    group     (product of channels,) int32, or None
    channels  the state's shape between batch and d_state
    """
    if scale is None or group is None:
        return scale
    return scale[group.long()].view(*channels, -1)


def write_state(state: Tensor, value: Tensor, scale: Tensor | None) -> None:
    """Store float ``value`` into ``state`` in place: int8 codes of ``scale``, or a cast that saturates."""
    if scale is not None:
        state.copy_(quantize(value, scale))
    elif state.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        state.copy_(value.clamp(-limit, limit))
    else:
        state.copy_(value)
