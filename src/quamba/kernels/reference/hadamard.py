"""The Hadamard rotation of the last dimension, as a few small matrix products; and after the gated norm."""

from __future__ import annotations

import functools
import math

import torch

from quamba.formats.activation import Activation, Overflow, Rounding
from quamba.formats.hadamard import hadamard_factors, paley_matrix, sylvester_matrix
from quamba.kernels.reference.norm import gated_rms_norm
from quamba.kernels.reference.quantize import quantize

# What one more pass over the data costs, in multiply-adds per element. From timings on a 2-core AVX-512 CPU:
# two factors win up to n = 4096, three from 8192 on.
_PASS_COST = 80
_MAX_SYLVESTER_BITS = 7


def hadamard(x: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """y = T_n x on the last dimension, or T_n^T x; T_n is that of ``formats.hadamard``.

    x        [..., n] float16, bfloat16, float32 or float64
    returns  [..., n] in the dtype of x

    Sums of +-x in float64 for float64 and in float32 for all others, then one multiplication by n^(-1/2),
    and for the 16-bit types one rounding. QuambaError for a size without a T_n.
    """
    if not x.is_floating_point():
        raise TypeError(f"hadamard takes a float tensor, got {x.dtype}.")
    n = x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])
    y, inner = x.to(dtype), 1
    for factor in reversed(_kronecker_factors(n, dtype, x.device, transpose)):
        size = factor.shape[0]
        outer = rows * n // (size * inner)
        if inner == 1:
            y = y.reshape(outer, size) @ factor.T
        else:
            y = factor @ y.reshape(outer, size, inner)
        inner *= size
    return y.mul_(n**-0.5).reshape(x.shape).to(x.dtype)


def hadamard_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> torch.Tensor:
    """Int8 codes (``kernels/reference/quantize.py``) of T_n x, from its float32 or float64 sums.

    x      [..., n] float16, bfloat16, float32 or float64
    scale  () float32
    """
    # Rounding the sums to 16 bits first would move some codes to their neighbours.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return quantize(hadamard(wide), scale, rounding=rounding, overflow=overflow)


def gated_norm_hadamard(
    y: torch.Tensor,
    z: Activation,
    weight: torch.Tensor | None,
    *,
    eps: float,
    group_size: int,
    norm_before_gate: bool = False,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
) -> torch.Tensor:
    """T_n v, v = ``gated_rms_norm`` (``kernels/reference/norm.py``) of y, z and weight in out_dtype.

    returns  (..., n) int8 codes (``hadamard_quantize``) of out_scale () if given, else out_dtype

    A fast backend may keep v wider than out_dtype.
    """
    v = gated_rms_norm(
        y,
        z,
        weight,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        out_dtype=out_dtype,
    )
    if out_scale is None:
        return hadamard(v)
    return hadamard_quantize(v, out_scale, rounding=rounding, overflow=overflow)


@functools.lru_cache(maxsize=128)
def _kronecker_factors(
    n: int, dtype: torch.dtype, device: torch.device, transpose: bool
) -> tuple[torch.Tensor, ...]:
    """Matrices F of +-1 with F_1 (x) F_2 (x) ... = sqrt(n) T_n, or its transpose; the first holds M_m."""
    m, k = hadamard_factors(n)
    slow_bits, fast_bits = min(_splits(m, k), key=lambda split: _cost(m, *split))
    with torch.inference_mode(False):  # an inference tensor in the cache would break a later backward pass
        slow = torch.kron(paley_matrix(m), sylvester_matrix(slow_bits))
        slow = slow.T.contiguous() if transpose else slow
        factors = [slow, *(sylvester_matrix(bits) for bits in fast_bits)]
        return tuple(factor.to(device=device, dtype=dtype) for factor in factors)


def _splits(m: int, k: int) -> list[tuple[int, tuple[int, ...]]]:
    """Ways to write M_m (x) S_(2^k): Sylvester bits merged with M, and bits of each further factor, even."""
    splits = []
    for slow_bits in range(min(k, _MAX_SYLVESTER_BITS) + 1):
        rest = k - slow_bits
        count = -(-rest // _MAX_SYLVESTER_BITS)
        splits.append((slow_bits, tuple((rest + i) // count for i in range(count))))
    return splits


def _cost(m: int, slow_bits: int, fast_bits: tuple[int, ...]) -> int:
    """Time per element in units of one multiply-add."""
    return (m << slow_bits) + sum(1 << bits for bits in fast_bits) + _PASS_COST * (1 + len(fast_bits))
