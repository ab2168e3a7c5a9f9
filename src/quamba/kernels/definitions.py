"""What every op means, once more: slow, in float64, on a CPU, with no code of the kernels that it checks.

Each function takes the arguments of its namesake in ``Kernels`` and gives what it should return, then what it
should leave in ``state``; it changes nothing itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, Overflow, Quantized, Rounding
from quamba.formats.hadamard import hadamard_factors, paley_matrix
from quamba.formats.weight import QuantizedWeight

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Wanted:
    """One output before it is rounded.

    real   float64
    dtype  what it is stored in; int8 are codes of ``scale``, a number or broadcastable to real
    """

    name: str
    real: Tensor
    dtype: torch.dtype
    scale: Tensor | float = 1.0
    rounding: Rounding = "half_even"
    overflow: Overflow = "saturate"

    @property
    def steps(self) -> Tensor:
        """real / scale, float64."""
        return self.real / (self.scale.double() if isinstance(self.scale, Tensor) else self.scale)

    def codes(self) -> Tensor:
        """int8, as if nothing but the last step had rounded."""
        x = self.steps
        half_away = x.sign() * (x.abs() + 0.5).floor()
        whole = x.round() if self.rounding == "half_even" else half_away
        if self.overflow == "wrap":
            return ((whole + 128).remainder(256) - 128).to(torch.int8)
        return whole.clamp(-128, 127).to(torch.int8)


def real_values(x: Activation) -> Tensor:
    return x.codes.double() * x.scale.double() if isinstance(x, Quantized) else x.double()


def real_weight(weight: Tensor | QuantizedWeight) -> Tensor:
    """float64 [N, K]; with two levels of scales the codes times the inner ones are integers first."""
    if not isinstance(weight, QuantizedWeight):
        return weight.double()
    codes, scale = weight.codes().double(), weight.scale.double()
    value = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    if weight.channel_scale is None:
        return value
    return value.round().clamp(-128, 127) * weight.channel_scale.double()


def _given(name: str, real: Tensor, scale: Tensor | None, dtype: torch.dtype, **how: Any) -> Wanted:
    """Codes if there is a scale, else floats."""
    return Wanted(name, real, dtype) if scale is None else Wanted(name, real, torch.int8, scale, **how)


def quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> list[Wanted]:
    return [Wanted("result", x.double(), torch.int8, scale, rounding, overflow)]


def embedding(
    ids: Tensor, weight: Tensor | QuantizedWeight, *, out_dtype: torch.dtype = torch.float32
) -> list[Wanted]:
    return [Wanted("result", real_weight(weight)[ids], out_dtype)]


def linear(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    input_scale_folded: bool = False,
) -> list[Wanted]:
    values = x.codes.double() if isinstance(x, Quantized) and input_scale_folded else real_values(x)
    y = values @ real_weight(weight).t()  # int64 would give the same: sums of codes stay far below 2^53
    return [_given("result", y if bias is None else y + bias.double(), out_scale, out_dtype)]


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Wanted]:
    stored = residual_dtype or (x.dtype if residual is None else residual.dtype)
    r = (x.double() if residual is None else x.double() + residual.double()).to(stored).double()
    v = r - r.mean(-1, keepdim=True) if center else r
    y = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return [_given("result", y, out_scale, out_dtype), Wanted("residual", r, stored)]


def rms_norm(
    x: Activation, *, eps: float, out_scale: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> list[Wanted]:
    v = real_values(x)
    return [_given("result", v / (v.square().mean(-1, keepdim=True) + eps).sqrt(), out_scale, out_dtype)]


def gated_rms_norm(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> list[Wanted]:
    gate = F.silu(real_values(z))
    v = (y.double() if norm_before_gate else y.double() * gate).unflatten(-1, (-1, group_size))
    v = (v / (v.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    v = v if weight is None else v * weight.double()
    return [Wanted("result", v * gate if norm_before_gate else v, out_dtype)]


def causal_conv1d(
    x: Activation,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
) -> list[Wanted]:
    stored = x.codes if isinstance(x, Quantized) else x
    kept = torch.ones(stored.shape[:2]) if mask is None else mask
    taps, length = real_weight(weight), stored.shape[1]
    before = torch.zeros(stored.shape[0], taps.shape[1] - 1, stored.shape[2]) if state is None else state
    window = torch.cat([before.double(), stored.double() * kept.double()[..., None]], dim=1)
    real = window * (x.scale.double() if isinstance(x, Quantized) else 1.0)
    y = sum((real[:, w : w + length] * taps[:, w] for w in range(taps.shape[1])), torch.zeros(()))
    y = F.silu(y if bias is None else y + bias.double()) * kept.double()[..., None]
    outputs = [_given("result", y, out_scale, out_dtype, rounding=rounding)]
    return outputs if state is None else [*outputs, Wanted("state", window[:, length:], stored.dtype)]


def selective_scan(
    u: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    z: Activation | None,
    dt_bias: Tensor | None,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Wanted]:
    x, B_f, C_f = real_values(u), real_values(B), real_values(C)
    delta = _delta(dt, dt_bias, mask)
    scale = _state_scale(state_scale, state_group, x.shape[2:])
    h = torch.zeros(x.shape[0], *A.shape, dtype=torch.float64) if state is None else state.double() * scale
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A.double()) * h
        h = h + (delta[:, t] * x[:, t])[:, :, None] * B_f[:, t, None, :]
        outputs.append((h * C_f[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    y = y if D is None else y + D.double() * x
    y = y if z is None else y * F.silu(real_values(z))
    return [Wanted("result", y, out_dtype), *_final_state(h, state, state_scale, scale)]


def selective_scan_step(
    u: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    z: Activation | None,
    dt_bias: Tensor | None,
    **carried: Any,
) -> list[Wanted]:
    u, dt, B, C = (_as_prompt(t) for t in (u, dt, B, C))
    gate = None if z is None else _as_prompt(z)
    return _of_one_token(selective_scan(u, dt, A, B, C, D, gate, dt_bias, **carried))


def ssd_scan(
    x: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    headdim: int,
    ngroups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 256,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Wanted]:
    """All tokens with all tokens: y_i = sum_(j <= i) exp(sum of delta A after j) (C_i . B_j) delta_j x_j."""
    nheads = A.shape[0]
    by_head = real_values(x).unflatten(-1, (nheads, headdim)).transpose(1, 2)  # (b, H, L, P)
    B_h, C_h = (
        real_values(t).unflatten(-1, (ngroups, -1)).transpose(1, 2).repeat_interleave(nheads // ngroups, 1)
        for t in (B, C)
    )
    delta = _delta(dt, dt_bias, mask, dt_limit).transpose(1, 2)  # (b, H, L)
    decay = (delta * A.double()[:, None]).cumsum(-1)
    mix = torch.exp((decay[..., :, None] - decay[..., None, :]).clamp(max=0.0)).tril()
    driven = by_head * delta[..., None]
    scale = _state_scale(state_scale, state_group, torch.Size((nheads, headdim)))
    shape = (by_head.shape[0], nheads, headdim, B_h.shape[-1])
    start = torch.zeros(shape, dtype=torch.float64) if state is None else state.double() * scale
    y = (mix * (C_h @ B_h.mT)) @ driven + (C_h @ start.mT) * decay.exp()[..., None]
    if D is not None:
        y = y + by_head * D.double().view(nheads, 1, -1)
    last = decay[..., -1:]
    final = start * last.exp()[..., None] + (driven * (last - decay).exp()[..., None]).mT @ B_h
    outputs = [Wanted("result", y.transpose(1, 2).flatten(2), out_dtype)]
    return outputs + _final_state(final, state, state_scale, scale)


def ssd_step(
    x: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    dt_bias: Tensor | None,
    **carried: Any,
) -> list[Wanted]:
    x, dt, B, C = (_as_prompt(t) for t in (x, dt, B, C))
    return _of_one_token(ssd_scan(x, dt, A, B, C, D, dt_bias, **carried))


def hadamard(x: Tensor, transpose: bool = False) -> list[Wanted]:
    return [Wanted("result", _rotated(x, transpose), x.dtype)]


def hadamard_quantize(
    x: Tensor, scale: Tensor, *, rounding: Rounding = "half_even", overflow: Overflow = "saturate"
) -> list[Wanted]:
    return [Wanted("result", _rotated(x, False), torch.int8, scale, rounding, overflow)]


def gated_norm_hadamard(
    y: Tensor,
    z: Activation,
    weight: Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> list[Wanted]:
    (normed,) = gated_rms_norm(
        y, z, weight, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )
    real = _rotated(normed.real, False)
    return [_given("result", real, out_scale, out_dtype, rounding=rounding, overflow=overflow)]


def _rotated(x: Tensor, transpose: bool) -> Tensor:
    """Sums and differences of neighbours at distance 1, 2, 4, ..., then the Paley matrix."""
    n = x.shape[-1]
    m, bits = hadamard_factors(n)
    v = x.double().reshape(-1, n)
    for bit in range(bits):
        pairs = v.view(-1, 2, 1 << bit)
        v = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1, n)
    slow = paley_matrix(m)
    v = torch.einsum("ij,rjk->rik", slow.t() if transpose else slow, v.view(-1, m, 1 << bits))
    return (v / math.sqrt(n)).reshape(x.shape)


def _delta(
    dt: Activation, bias: Tensor | None, mask: Tensor | None, limit: tuple[float, float] = (0.0, math.inf)
) -> Tensor:
    v = real_values(dt) if bias is None else real_values(dt) + bias.double()
    delta = torch.where(v > 20, v, torch.log1p(torch.exp(v.clamp(max=20)))).clamp(*limit)
    return delta if mask is None else delta * mask.double()[..., None]


def _state_scale(scale: Tensor | None, group: Tensor | None, channels: torch.Size) -> Tensor:
    if scale is None:
        return torch.ones((), dtype=torch.float64)
    return scale.double() if group is None else scale.double()[group.long()].view(*channels, -1)


def _final_state(h: Tensor, state: Tensor | None, given: Tensor | None, scale: Tensor) -> list[Wanted]:
    """Nothing where no state was given; float16 saturates."""
    if state is None:
        return []
    if state.dtype == torch.float16:
        h = h.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return [Wanted("state", h, state.dtype) if given is None else Wanted("state", h, torch.int8, scale)]


def _as_prompt(x: Activation) -> Activation:
    return Quantized(x.codes[:, None], x.scale) if isinstance(x, Quantized) else x[:, None]


def _of_one_token(outputs: list[Wanted]) -> list[Wanted]:
    y, *state = outputs
    return [Wanted(y.name, y.real[:, 0], y.dtype), *state]
