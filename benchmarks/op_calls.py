"""The calls that a network makes of its kernels, and the same by torch's own. Run, it does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import as_float
from quamba.tuning.calls import OPS, Call, difference, recorded_calls

__all__ = ["OPS", "Call", "difference", "recorded_calls", "torch_equivalent"]


def torch_equivalent(
    call: Call, dtype: torch.dtype, copies: Callable[[int], int]
) -> list[Callable[[], object]] | None:
    """The same op on floats by torch's own functions, for each copy of its weight; None where it has none."""
    if call.op not in _TORCH:
        return None
    x = as_float(call.args[0], dtype) if call.op != "embedding" else call.args[0]
    if call.op not in ("linear", "causal_conv1d", "embedding"):
        return [_TORCH[call.op](call, x, None)]
    weight = torch.randn(*call.args[1].shape, dtype=dtype, device=x.device)
    number = 1 if call.op == "embedding" else copies(weight.nbytes)
    return [_TORCH[call.op](call, x, weight if i == 0 else weight.clone()) for i in range(number)]


def _torch_linear(call: Call, x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, weight)


def _torch_embedding(call: Call, ids: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: F.embedding(ids, weight)


def _torch_conv(call: Call, x: Tensor, weight: Tensor) -> Callable[[], object]:
    channels, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0)).contiguous()
    taps = weight[:, None]
    return lambda: F.silu(F.conv1d(padded, taps, groups=channels))


def _torch_add_norm(call: Call, x: Tensor, _: Tensor | None) -> Callable[[], object]:
    if call.args[1] is None:
        return lambda: F.rms_norm(x, x.shape[-1:])
    residual = call.args[1].to(x.dtype)
    return lambda: F.rms_norm(x + residual, x.shape[-1:])


def _torch_rms_norm(call: Call, x: Tensor, _: Tensor | None) -> Callable[[], object]:
    return lambda: F.rms_norm(x, x.shape[-1:])


def _torch_gated_norm(call: Call, y: Tensor, _: Tensor | None) -> Callable[[], object]:
    gate, size = as_float(call.args[1], y.dtype).contiguous(), call.kwargs["group_size"]
    return lambda: F.rms_norm((y * F.silu(gate)).unflatten(-1, (-1, size)), (size,))


_TORCH: dict[str, Callable[..., Callable[[], object]]] = {
    "linear": _torch_linear,
    "embedding": _torch_embedding,
    "causal_conv1d": _torch_conv,
    "add_norm": _torch_add_norm,
    "rms_norm": _torch_rms_norm,
    "gated_rms_norm": _torch_gated_norm,
}
