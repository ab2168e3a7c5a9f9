"""Mamba1's selective scan: prompts in chunks, and one step of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba.formats.activation import Activation, as_float, rows, shape_of
from quamba.kernels.reference.state import read_state, spread_scale, write_state

# Steps of the inner loop. Longer chunks mean more Python steps, shorter ones more chunk states.
CHUNK = 32
# Tokens x channels x states worked on at once: on a CPU the three work buffers then stay in the caches,
# elsewhere each step is long enough to hide its launches.
CPU_TILE_ELEMENTS = 1 << 20
TILE_ELEMENTS = 1 << 26
# Tokens taken together; bounds the memory of a long prompt.
SEGMENT = 2048


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
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = (C_t . h_t + D u_t) * silu(z_t)

    delta = softplus(dt + dt_bias), 0 where masked (the state then stays as it is); softplus(v) is v for
    v > 20, as in the published kernels.
    u, dt, z  (B, L, Di) float or int8      A  (Di, N) float, negative
    B, C      (B, L, N) float or int8       D, dt_bias  (Di,) or None
    state     (B, Di, N) int8, float16 or float32, read and overwritten with the final state; None
              means zeros. int8 states have a state_scale broadcastable to (Di, N), or with
              state_group (Di,) one row of it a group of channels.
    mask      (B, L) bool or None
    returns   (B, L, Di) out_dtype; everything inside is float32 (float64 for float64 A)
    (Mamba paper, algorithm 2; Delta B in the Euler form that the published models use.)
    """
    compute = torch.float64 if A.dtype == torch.float64 else torch.float32
    batch, length, d_inner = shape_of(u)
    state_scale = spread_scale(state_scale, state_group, (d_inner,))
    h = (
        A.new_zeros(batch, d_inner, A.shape[1], dtype=compute)
        if state is None
        else read_state(state, state_scale, compute)
    )
    y = torch.empty(batch, length, d_inner, dtype=out_dtype, device=A.device)
    for start in range(0, length, SEGMENT):
        stop = min(start + SEGMENT, length)
        x_s, dt_s, B_s, C_s = (as_float(rows(t, start, stop, 1), compute) for t in (u, dt, B, C))
        delta = _delta(dt_s, dt_bias, None if mask is None else mask[:, start:stop])
        # The chunked scan works in place, so gradients go through the recurrence as it is written.
        scan = _in_order if torch.is_grad_enabled() and delta.requires_grad else _chunked
        out, h = scan(delta, delta * x_s, A.to(compute), B_s, C_s, h)
        if D is not None:
            out = out.addcmul_(x_s, D.to(compute))
        if z is not None:
            out = out * F.silu(as_float(rows(z, start, stop, 1), compute))
        y[:, start:stop] = out
    if state is not None:
        write_state(state, h, state_scale)
    return y


def selective_scan_step(
    u: Activation,
    dt: Activation,
    A: Tensor,
    B: Activation,
    C: Activation,
    D: Tensor | None,
    z: Activation | None,
    dt_bias: Tensor | None,
    *,
    state: Tensor,
    state_scale: Tensor | None = None,
    state_group: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The recurrence of ``selective_scan`` for one token: u, dt, z (B, Di), B, C (B, N), y (B, Di).

    y is computed from the new state before that is rounded to its stored format.
    """
    compute = torch.float64 if A.dtype == torch.float64 else torch.float32
    x, dt_f, B_f, C_f = (as_float(t, compute) for t in (u, dt, B, C))
    delta = _delta(dt_f, dt_bias, None)
    state_scale = spread_scale(state_scale, state_group, state.shape[1:-1])
    h = read_state(state, state_scale, compute) * torch.exp(delta[..., None] * A.to(compute))
    h += (delta * x)[..., None] * B_f[:, None, :]
    write_state(state, h, state_scale)
    y = torch.einsum("bdn,bn->bd", h, C_f)
    if D is not None:
        y = y + x * D.to(compute)
    if z is not None:
        y = y * F.silu(as_float(z, compute))
    return y.to(out_dtype)


def _delta(dt: Tensor, dt_bias: Tensor | None, mask: Tensor | None) -> Tensor:
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dt.dtype))
    return delta if mask is None else delta * mask[..., None].to(dt.dtype)


def _in_order(
    delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token, and differentiable: y (B, L, Di) and the final state."""
    outputs = []
    for t in range(delta.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + delta_u[:, t, :, None] * B[:, t, None, :]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(outputs, dim=1), h


def _chunked(
    delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """All chunks step together from a zero state; then the states that enter the chunks are added.

    Only products of decays exp(delta A) <= 1 appear, so nothing overflows however long the chunk.
    """
    batch, length, d_inner = delta.shape
    n_state = A.shape[1]
    if delta.numel() == 0:
        return torch.empty_like(delta), h
    n_chunks = -(-length // CHUNK)
    chunk = -(-length // n_chunks)
    pad = n_chunks * chunk - length

    def by_step(t: Tensor) -> Tensor:  # (B, L, F) -> (chunk, B * n_chunks, F); padding has delta = 0
        t = F.pad(t, (0, 0, 0, pad)).view(batch, n_chunks, chunk, t.shape[-1])
        return t.permute(2, 0, 1, 3).flatten(1, 2)

    delta_q, du_q = by_step(delta), by_step(delta_u)
    B_q = by_step(B).transpose(1, 2).unsqueeze(-1).contiguous()  # (chunk, N, B * n_chunks, 1)
    C_q = by_step(C).transpose(1, 2).unsqueeze(-1).contiguous()
    y = torch.empty(chunk, batch * n_chunks, d_inner, dtype=delta.dtype, device=delta.device)
    h_out = torch.empty_like(h)
    tile_elements = CPU_TILE_ELEMENTS if A.device.type == "cpu" else TILE_ELEMENTS
    tile = max(1, tile_elements // (batch * n_chunks * n_state))
    for d in range(0, d_inner, tile):
        cols = slice(d, min(d + tile, d_inner))
        A_t = A[cols].t().unsqueeze(1).contiguous()  # (N, 1, tile)
        h_out[:, cols] = _scan_tile(
            delta_q[..., cols].contiguous(),
            du_q[..., cols].contiguous(),
            A_t,
            B_q,
            C_q,
            h[:, cols],
            y[..., cols],
        )
    y = y.view(chunk, batch, n_chunks, d_inner).permute(1, 2, 0, 3).reshape(batch, n_chunks * chunk, d_inner)
    return y[:, :length], h_out


def _scan_tile(
    delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor, C: Tensor, h_in: Tensor, y: Tensor
) -> Tensor:
    """Some channels of ``_chunked``; the state axis leads so that the innermost axis is the channels.

    delta, delta_u (chunk, R, d), A (N, 1, d), B, C (chunk, N, R, 1), h_in (batch, d, N); fills
    y (chunk, R, d) and returns the final state (batch, d, N). R = batch * n_chunks.
    """
    chunk, n_rows, width = delta.shape
    n_state, batch = A.shape[0], h_in.shape[0]
    n_chunks = n_rows // batch
    h = torch.zeros(n_state, n_rows, width, dtype=delta.dtype, device=delta.device)
    work = torch.empty_like(h)
    for q in range(chunk):
        torch.mul(A, delta[q], out=work)
        h.mul_(work.exp_())
        torch.mul(B[q], delta_u[q], out=work)
        h.add_(work)
        torch.mul(C[q], h, out=work)
        y[q] = work.sum(0)

    total = delta.sum(0).view(batch, n_chunks, width)
    local = h.view(n_state, batch, n_chunks, width)
    entering = torch.empty_like(local)
    carry = h_in.permute(2, 0, 1)
    for c in range(n_chunks):
        entering[:, :, c] = carry
        carry = torch.exp(A * total[:, c]) * carry + local[:, :, c]
    if n_chunks > 1 or bool(h_in.any()):
        entering = entering.view(n_state, n_rows, width)
        since = delta.cumsum(0)
        for q in range(chunk):
            torch.mul(A, since[q], out=work)
            work.exp_().mul_(entering).mul_(C[q])
            y[q] += work.sum(0)
    return carry.permute(1, 2, 0)
