"""The orthonormal Hadamard matrices T_n that rotations use, and the sizes for which there is one.

T_n = n^(-1/2) * (M_m (x) S_(2^k)),  n = m * 2^k,  index = slow index of M * 2^k + fast index of S

S_(2^k) is Sylvester's matrix in natural order, S[i, j] = (-1)^popcount(i & j). M_m is

- m = 1: [[1]];
- m = 40: [[A, A], [A, -A]] with A the Paley I matrix of order 20;
- any other m = odd * 2^j, j >= 2: Paley II if q = m/2 - 1 is a prime with q mod 4 = 1 (12, 28, 36, 60, ...;
  symmetric), else Paley I if q = m - 1 is a prime with q mod 4 = 3 (20, 44, 68, ...; not symmetric).

n = odd * 2^e decides m: 1 for odd = 1; 40 if odd = 5 and n is a multiple of 40; else the smallest
odd * 2^j for which there is an M. Quantized checkpoints store rotated weights, so neither the choice
nor a sign may change. For m of 1, 12 and 40 the matrices are those of Quamba's published checkpoints.
"""

from __future__ import annotations

import math

import torch

from quamba.errors import QuambaError


def hadamard_factors(n: int) -> tuple[int, int]:
    """(m, k) with T_n = n^(-1/2) * (M_m (x) S_(2^k)) and n = m * 2^k; k may be 0.

    QuambaError if n has no such form, with the nearest sizes that have.
    """
    factors = _factors(n)
    if factors is None:
        below, above = _nearest_supported(n)
        raise QuambaError(
            f"There is no Hadamard transform here for size {n}: it needs 2^k or m * 2^k with a Paley matrix "
            f"of order m (12, 20, 28, 36, 40, 44, ...); the nearest supported sizes are {below} and {above}."
        )
    return factors


def supported(n: int) -> bool:
    """Whether T_n exists here."""
    return n > 0 and _factors(n) is not None


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """T_n, [n, n] of dtype, orthonormal: T_n T_n^T = I. Entries are +-n^(-1/2), rounded once to dtype.

    Symmetric for m = 1 and Paley II, not for m = 20, 40 and the other Paley I sizes: rotate with T x.
    """
    m, k = hadamard_factors(n)
    signs = torch.kron(paley_matrix(m), sylvester_matrix(k))
    return (signs * n**-0.5).to(dtype)


def sylvester_matrix(k: int) -> torch.Tensor:
    """S_(2^k), float64 [2^k, 2^k] of +-1, symmetric: S_1 = [[1]], S_2m = [[S_m, S_m], [S_m, -S_m]]."""
    block = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(k):
        matrix = torch.kron(block, matrix)
    return matrix


def paley_matrix(m: int) -> torch.Tensor:
    """M_m, float64 [m, m] of +-1 with M M^T = m I, for an m that hadamard_factors gives."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m == 40:
        return torch.kron(sylvester_matrix(1), _paley_first(19))
    return _paley_second(m // 2 - 1) if _has_paley_second(m) else _paley_first(m - 1)


def _paley_first(q: int) -> torch.Tensor:
    """Order q + 1: first column 1, first row (1, -1, ..., -1), then 1 on the diagonal, else chi_q(i - j)."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = _jacobsthal(q) + torch.eye(q, dtype=torch.float64)
    return matrix


def _paley_second(q: int) -> torch.Tensor:
    """Order 2 (q + 1): the symmetric conference matrix C of order q + 1, with 0 replaced by
    [[1, -1], [-1, -1]] and +-1 by +-[[1, 1], [1, -1]]."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    at_zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(torch.eye(q + 1, dtype=torch.float64), at_zero) + torch.kron(
        conference, sylvester_matrix(1)
    )


def _jacobsthal(q: int) -> torch.Tensor:
    """Q[i, j] = chi_q(i - j), the Legendre symbol, for a prime q: 0 on the diagonal."""
    legendre = torch.full((q,), -1.0, dtype=torch.float64)
    index = torch.arange(q)
    legendre[index * index % q] = 1
    legendre[0] = 0
    return legendre[(index[:, None] - index[None, :]) % q]


def _factors(n: int) -> tuple[int, int] | None:
    """hadamard_factors, or None where there is none."""
    if n < 1:
        return None
    exponent = (n & -n).bit_length() - 1
    odd = n >> exponent
    if odd == 1:
        return 1, exponent
    if odd == 5 and exponent >= 3:
        return 40, exponent - 3
    for j in range(2, exponent + 1):
        m = odd << j
        if _has_paley_second(m) or _has_paley_first(m):
            return m, exponent - j
    return None


def _has_paley_first(m: int) -> bool:
    return m % 4 == 0 and _is_prime(m - 1)


def _has_paley_second(m: int) -> bool:
    q = m // 2 - 1
    return m % 4 == 0 and q % 4 == 1 and _is_prime(q)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _nearest_supported(n: int) -> tuple[int, int]:
    """The largest supported size below n (at least 1) and the smallest above."""
    n = max(n, 1)
    below = next((i for i in range(n - 1, 0, -1) if supported(i)), 1)
    above = n + 1
    while not supported(above):
        above += 1
    return below, above
