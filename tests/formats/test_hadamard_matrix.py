"""Hadamard matrices: orthonormal wherever promised, and sign for sign what checkpoints were rotated with."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch

from quamba.errors import QuambaError
from quamba.formats.hadamard import hadamard_factors, hadamard_matrix, paley_matrix, supported

MODEL_SIZES = [384, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192]

PALEY_12 = """
+-++++++++++
--+-+-+-+-+-
+++-++----++
+---+--+-++-
+++++-++----
+-+---+--+-+
++--+++-++--
+--++---+--+
++----+++-++
+--+-++---+-
++++----+++-
+-+--+-++---
"""


def legendre(a: int, q: int) -> int:
    """Euler's criterion."""
    return {0: 0, 1: 1, q - 1: -1}[pow(a, (q - 1) // 2, q)]


def paley_first(q: int) -> torch.Tensor:
    def entry(i: int, j: int) -> int:
        if j == 0:
            return 1
        if i == 0:
            return -1
        return 1 if i == j else legendre((i - j) % q, q)

    return torch.tensor([[entry(i, j) for j in range(q + 1)] for i in range(q + 1)], dtype=torch.float64)


def paley_second(q: int) -> torch.Tensor:
    blocks = {0: [[1, -1], [-1, -1]], 1: [[1, 1], [1, -1]], -1: [[-1, -1], [-1, 1]]}

    def conference(i: int, j: int) -> int:
        if i == j:
            return 0
        return 1 if 0 in (i, j) else legendre((i - j) % q, q)

    size = 2 * (q + 1)
    rows = [[blocks[conference(i // 2, j // 2)][i % 2][j % 2] for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


def signs(matrix: torch.Tensor) -> str:
    return "\n".join("".join("+" if value > 0 else "-" for value in row) for row in matrix.tolist())


@pytest.mark.parametrize("n", [n for n in range(1, 513) if supported(n)])
def test_orthonormal(n):
    t = hadamard_matrix(n)
    assert t.shape == (n, n) and t.dtype == torch.float64
    assert (t @ t.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13
    assert torch.equal(t.abs(), torch.full_like(t, n**-0.5))


def test_supported_sizes_are_exactly_these():
    expected = [
        1,
        2,
        4,
        8,
        12,
        16,
        20,
        24,
        28,
        32,
        36,
        40,
        44,
        48,
        56,
        60,
        64,
        68,
        72,
        76,
        80,
        84,
        88,
        96,
        104,
        108,
    ]
    assert [n for n in range(-4, 110) if supported(n)] == expected


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (1, (1, 0)),
        (2048, (1, 11)),
        (12, (12, 0)),
        (96, (12, 3)),
        (384, (12, 5)),
        (1536, (12, 7)),
        (20, (20, 0)),
        (40, (40, 0)),
        (80, (40, 1)),
        (320, (40, 3)),
        (2560, (40, 6)),
        (5120, (40, 7)),
        (28 * 256, (28, 8)),
        (36, (36, 0)),
        (88, (44, 1)),
        (60, (60, 0)),
        (3328, (104, 5)),
    ],
)
def test_factors(n, factors):
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", MODEL_SIZES + [28 << k for k in range(9)])
def test_sizes_of_models_are_supported(n):
    m, k = hadamard_factors(n)
    assert m << k == n


def test_paley_12_sign_for_sign():
    assert torch.equal(paley_matrix(12), paley_second(5))
    assert signs(paley_matrix(12)) == PALEY_12.strip()


def test_paley_20_and_40():
    a = paley_first(19)
    assert torch.equal(paley_matrix(20), a)
    assert torch.equal(paley_matrix(40), torch.cat([torch.cat([a, a], 1), torch.cat([a, -a], 1)]))


@pytest.mark.parametrize(("m", "q"), [(28, 13), (36, 17), (60, 29), (76, 37), (84, 41)])
def test_second_construction_where_it_exists(m, q):
    assert torch.equal(paley_matrix(m), paley_second(q))


@pytest.mark.parametrize(("m", "q"), [(44, 43), (68, 67), (104, 103)])
def test_first_construction_elsewhere(m, q):
    assert torch.equal(paley_matrix(m), paley_first(q))


@pytest.mark.parametrize("n", [1, 2, 64, 12, 96, 28, 56, 36, 60, 84])
def test_symmetric(n):
    t = hadamard_matrix(n)
    assert torch.equal(t, t.T)


@pytest.mark.parametrize("n", [20, 40, 80, 320, 44, 68])
def test_not_symmetric(n):
    t = hadamard_matrix(n)
    assert not torch.equal(t, t.T)


def test_sylvester_is_in_natural_order():
    expected = [[(-1) ** bin(i & j).count("1") / 4 for j in range(16)] for i in range(16)]
    assert torch.equal(hadamard_matrix(16), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("n", "m"), [(96, 12), (160, 40), (56, 28)])
def test_slow_index_is_that_of_the_paley_matrix(n, m):
    fast = n // m
    t = hadamard_matrix(n) * n**0.5
    assert (t[::fast, ::fast] - paley_matrix(m)).abs().max() < 1e-13
    assert (t[:fast, :fast] - hadamard_matrix(fast) * fast**0.5).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("n", "digest"),
    [
        (12, "a8b73b2d138b0c90"),
        (20, "52927d488d55a58e"),
        (28, "b2248878395765d7"),
        (36, "21e08f01cf6d9e5a"),
        (40, "8cd17c4fce4c2af2"),
        (44, "741b03b5500dcc16"),
        (60, "81b01de132848c5f"),
        (768, "e33dabf2aea470b4"),
    ],
)
def test_signs_never_change(n, digest):
    assert hashlib.sha256(signs(hadamard_matrix(n)).encode()).hexdigest()[:16] == digest


def test_dtype():
    assert torch.equal(hadamard_matrix(24, torch.float32), hadamard_matrix(24).float())


@pytest.mark.parametrize(
    ("n", "below", "above"),
    [(3, 2, 4), (6, 4, 8), (52, 48, 56), (92, 88, 96), (100, 96, 104), (0, 1, 2), (-5, 1, 2)],
)
def test_unsupported_size_names_the_nearest(n, below, above):
    assert not supported(n)
    with pytest.raises(
        QuambaError, match=re.escape(f"size {n}:") + f".*nearest supported sizes are {below} and {above}"
    ):
        hadamard_factors(n)
    with pytest.raises(QuambaError):
        hadamard_matrix(n)
