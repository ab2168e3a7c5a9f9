"""What the tests of the fused step share: its vectors and their real values, guarded outputs, bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.formats.activation import Quantized
from quamba.kernels.triton.decode.ssd import Part
from quamba.kernels.triton.decode.vectors import Vector

_POISON_BYTE = 0x5A


def split_rows(x: Tensor) -> Tensor:
    """The even elements of each row, then the odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def merge_rows(x: Tensor) -> Tensor:
    """What ``split_rows`` took apart."""
    half = x.shape[-1] // 2
    return torch.stack([x[..., :half], x[..., half:]], dim=-1).flatten(-2)


def natural(x: Vector) -> Tensor:
    """Its values in the order of the channels; of wide codes the integers."""
    values = x.values if x.wide_scale is None else x.values.to(torch.int32)
    if x.wide_scale is not None:
        values = values[:, 0] * 256 + values[:, 1]
    return merge_rows(values) if x.split else values


def real(x: Vector) -> Tensor:
    """float64 (B, C); of int8 codes the codes themselves."""
    values = natural(x).double()
    return values if x.wide_scale is None else values * x.wide_scale.double().repeat_interleave(32, dim=-1)


def guarded(batch: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A poisoned output (batch, columns) and what lies behind it, which must stay as it is."""
    poison = float("nan") if dtype.is_floating_point else _POISON_BYTE
    memory = torch.full((batch * columns + 128,), poison, dtype=dtype, device=device)
    return memory[: batch * columns].view(batch, columns), memory[batch * columns :]


def is_untouched(memory: Tensor) -> bool:
    poisoned = memory.isnan() if memory.is_floating_point() else memory == _POISON_BYTE
    return bool(poisoned.all())


def assert_as_accurate(found: Tensor, plain: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """|found - exact| <= 2 |plain - exact| + a few last bits, at the largest; plain is the reference's."""
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + floor * exact.abs().max()
    assert error <= allowed, f"off by {error.item():.3g}, allowed {allowed.item():.3g}"


def columns_of(
    drawn: dict[str, Tensor | Quantized],
) -> tuple[Tensor, dict[str, Part]]:
    """One buffer (B, C) of neighbouring parts, in the order given, and where each is in it."""
    parts, first = {}, 0
    for name, x in drawn.items():
        values, scale = (x.codes, x.scale) if isinstance(x, Quantized) else (x, None)
        parts[name] = Part(first, scale)
        first += values.shape[1]
    both = [x.codes if isinstance(x, Quantized) else x for x in drawn.values()]
    return torch.cat(both, dim=1), parts
