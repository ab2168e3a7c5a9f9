"""Mamba2's state space dual: prompts in chunks of matrix products, and one step of the recurrence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, as_float, rows, shape_of
from quamba.kernels.reference.state import read_state, spread_scale, write_state

# Largest chunk worked on at once: the (chunk x chunk) decay matrices of all heads then stay in the
# caches. A model's own chunk_size is honoured where it is smaller; the result is the same function.
MAX_CHUNK = 64


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
    chunk_size: int = MAX_CHUNK,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """S_t = exp(delta_t A_h) S_{t-1} + delta_t x_t B_t^T;  y_t = S_t C_t + D_h x_t

    delta = clamp(softplus(dt + dt_bias), dt_limit), 0 where masked (the state then stays as it is);
    softplus(v) is v for v > 20, as in the published kernels.
    x      (B, L, H * P) float or int8         dt  (B, L, H) float or int8
    B, C   (B, L, G * N) float or int8         A, dt_bias  (H,);  D  (H,) or (H * P,) or None
    state  (B, H, P, N) int8, float16 or float32, read and overwritten with the final state; None
           means zeros. int8 states have a state_scale broadcastable to (H, P, N), or with
           state_group (H * P,) one row of it a group of channels.
    mask   (B, L) bool or None
    returns  (B, L, H * P) out_dtype; everything inside is float32 (float64 for float64 A)
    (Mamba2 paper, section 6 and listing 1: inside a chunk a masked matrix product, between chunks
    the recurrence.)
    """
    compute = torch.float64 if A.dtype == torch.float64 else torch.float32
    batch, length, d_inner = shape_of(x)
    nheads = A.shape[0]
    d_state = shape_of(B)[-1] // ngroups
    state_scale = spread_scale(state_scale, state_group, (nheads, headdim))
    S = (
        A.new_zeros(batch, nheads, headdim, d_state, dtype=compute)
        if state is None
        else read_state(state, state_scale, compute)
    )
    y = torch.empty(batch, length, d_inner, dtype=out_dtype, device=A.device)
    chunk = min(chunk_size, MAX_CHUNK)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        x_c, dt_c, B_c, C_c = (as_float(rows(t, start, stop, 1), compute) for t in (x, dt, B, C))
        delta = _delta(dt_c, dt_bias, dt_limit, None if mask is None else mask[:, start:stop])
        out, S = _chunk(
            x_c.unflatten(-1, (ngroups, -1, headdim)),
            delta,
            (delta * A.to(compute)).double().cumsum(1),
            B_c.unflatten(-1, (ngroups, d_state)),
            C_c.unflatten(-1, (ngroups, d_state)),
            S,
        )
        if D is not None:
            out += x_c * _per_channel(D, d_inner).to(compute)
        y[:, start:stop] = out
    if state is not None:
        write_state(state, S, state_scale)
    return y


def ssd_step(
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
    state: Tensor,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The recurrence of ``ssd_scan`` for one token: x (B, H * P), dt (B, H), B, C (B, G * N).

    y (B, H * P) is computed from the new state before that is rounded to its stored format.
    """
    compute = torch.float64 if A.dtype == torch.float64 else torch.float32
    x_f, dt_f, B_f, C_f = (as_float(t, compute) for t in (x, dt, B, C))
    delta = _delta(dt_f, dt_bias, dt_limit, None)
    per_head = A.shape[0] // ngroups
    B_h = B_f.unflatten(-1, (ngroups, 1, -1)).expand(-1, -1, per_head, -1).flatten(1, 2)
    C_h = C_f.unflatten(-1, (ngroups, 1, -1)).expand(-1, -1, per_head, -1).flatten(1, 2)
    x_h = x_f.unflatten(-1, (-1, headdim)) * delta[..., None]
    state_scale = spread_scale(state_scale, state_group, state.shape[1:-1])
    S = read_state(state, state_scale, compute) * torch.exp(delta * A.to(compute))[..., None, None]
    S += x_h[..., None] * B_h[:, :, None, :]
    write_state(state, S, state_scale)
    y = (S * C_h[:, :, None, :]).sum(-1).flatten(1)
    if D is not None:
        y = y + x_f * _per_channel(D, x_f.shape[-1]).to(compute)
    return y.to(out_dtype)


def _delta(dt: Tensor, dt_bias: Tensor | None, limit: tuple[float, float], mask: Tensor | None) -> Tensor:
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dt.dtype))
    if limit != (0.0, math.inf):
        delta = delta.clamp(*limit)
    return delta if mask is None else delta * mask[..., None].to(dt.dtype)


def _per_channel(D: Tensor, d_inner: int) -> Tensor:
    """D as one value a channel, from one a head or (D_has_hdim) one a channel."""
    return D.repeat_interleave(d_inner // D.shape[0])


def _chunk(x: Tensor, delta: Tensor, decay: Tensor, B: Tensor, C: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of Q tokens.

    x (b, Q, G, H/G, P), delta and decay = cumsum(delta A) (b, Q, H), B, C (b, Q, G, N), S (b, H, P, N);
    decay is float64, the others of one dtype.
    Returns y (b, Q, H * P) and the state after the chunk.
    """
    batch, length, ngroups, per_head, headdim = x.shape
    d_state = B.shape[-1]
    x_delta = x * delta.unflatten(-1, (ngroups, per_head))[..., None]
    B_g, C_g = B.transpose(1, 2), C.transpose(1, 2)  # (b, G, Q, N)

    def to_head(t: Tensor) -> Tensor:  # (b, Q, H) -> (b, Q, G, H/G, 1)
        return t.to(x.dtype).unflatten(-1, (ngroups, per_head))[..., None]

    # Within the chunk: y_i = sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) delta_j x_j.
    # Differences of large sums lose digits, so they are taken of multiples of 2^-9 (exact in float32 up to
    # 2^14), and what is left of each sum multiplies y_i and x_j.
    coarse = (decay * 512).round() / 512
    rest = to_head(decay - coarse)
    by_head = coarse.to(x.dtype).transpose(1, 2)  # (b, H, Q)
    gap = by_head[..., :, None] - by_head[..., None, :]
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    mix = gap.masked_fill_(future, -math.inf).exp_().view(batch, ngroups, per_head, length, length)
    mix = mix * (C_g @ B_g.transpose(-1, -2))[:, :, None]
    y = (mix @ (x_delta * (-rest).exp()).permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)  # (b, Q, G, H/G, P)
    y = y * rest.exp()

    # From before the chunk: y_i += exp(decay_i) C_i S
    S_g = S.reshape(batch, ngroups, per_head * headdim, d_state)
    carried = (C_g @ S_g.transpose(-1, -2)).view(batch, ngroups, length, per_head, headdim).transpose(1, 2)
    y += carried * to_head(decay.exp())

    # The state after it: S <- exp(decay_Q) S + sum_j exp(decay_Q - decay_j) delta_j x_j B_j^T
    last = decay[:, -1:]
    entered = (x_delta * to_head((last - decay).exp())).flatten(3).permute(0, 2, 3, 1) @ B_g
    S = S * last.exp().to(x.dtype).transpose(1, 2)[..., None] + entered.reshape(S.shape)
    return y.flatten(2), S
