"""Byte layouts of the published checkpoints, to and from the canonical packing of ``formats/packing.py``.

A packed word is an int32 of eight 4-bit fields; field b is bits 4b .. 4b + 3. The canonical form is also
eight nibbles to a word, seen as four bytes: nibble x is column 8d + x of a row. So both directions are moves
of nibbles between words, and codes are never held wider than four bits. Signed codes q are stored as
u = q + 8 or in two's complement; the two differ in the top bit of the nibble.

Words are taken as little-endian, which is how they are in the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from quamba.errors import QuambaError, one_of

Layout = Literal["w4a16", "w4a8_group", "w4a8_channel"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

#: Rows of input features and columns of output features in one tile, and words of one tile row.
TILE_ROWS, TILE_COLUMNS, TILE_WORDS = 16, 64, 128

#: Field b holds element _INTERLEAVED[b] of eight.
_INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
_INTERLEAVED_CHANNEL = (4, 0, 5, 1, 6, 2, 7, 3)

# The top bit of each nibble: flips between q + 8 and two's complement. 0x88888888 as an int32.
_FLIP_SIGNS = 0x88888888 - 2**32
# A slab is 1 MiB of packed words: its five buffers stay near the caches, its calls are few.
_SLAB_WORDS = 2**18


class _Move(NamedTuple):
    """Field ``field`` of the words of lane ``tau`` is nibble ``nibble`` of word ``word`` of half ``half``."""

    tau: int
    field: int
    half: int
    word: int
    nibble: int


def padded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def unpack_tiles(packed: Tensor, layout: Layout) -> Tensor:
    """The canonical codes of a packed linear weight, padding columns included.

    Field b of ``packed[r, 128 B + 4 (4 g + tau) + j]``, with ``4 h + i`` the element in that field, is the
    code of output feature ``64 B + 16 j + 8 h + g`` and input feature ``16 r + rho(tau, i)``, where
    ``rho = 2 tau + i % 2 + 8 (i // 2)`` for w4a16 and ``4 tau + i`` for w4a8.

    packed   (K // 16, 2 N) int32, N a multiple of 64
    layout   "w4a16" or "w4a8_group" (codes stored as q + 8), "w4a8_channel" (two's complement)
    returns  (N, K // 2) uint8, contiguous: codes q in [-8, 7], as ``pack_int4`` packs them
    Raises QuambaError for another layout, dtype or shape. Works in slabs: a few MiB beside the result.
    """
    moves = _moves(layout)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] % TILE_WORDS:
        raise _unfit(
            "A packed 4-bit weight",
            packed,
            "int32 with shape (in_features / 16, 2 * out_features), out_features a multiple of 64",
        )
    rows, blocks = packed.shape[0], packed.shape[1] // TILE_WORDS
    canonical = torch.empty(blocks * TILE_COLUMNS, rows * 2, dtype=torch.int32, device=packed.device)
    canonical_tiles = canonical.view(blocks, 4, 2, 8, rows, 2)
    for row, block in _slabs(rows, blocks):
        slab = packed[row, block.start * TILE_WORDS : block.stop * TILE_WORDS]
        lanes = slab.contiguous().t().contiguous().view(-1, 8, 4, 4, len(slab))  # (B, g, tau, j, r)
        lanes = lanes.permute(2, 0, 3, 1, 4).contiguous()  # (tau, B, j, g, r)
        words = lanes.new_zeros(2, 2, *lanes.shape[1:])  # (h, word, B, j, g, r)
        scratch = torch.empty_like(lanes[0])
        for move in moves:
            _or_nibble(words[move.half, move.word], move.nibble, lanes[move.tau], move.field, scratch)
        if layout != "w4a8_channel":
            words ^= _FLIP_SIGNS
        canonical_tiles[block, :, :, :, row] = words.permute(2, 3, 0, 4, 5, 1)
    return canonical.view(torch.uint8)


def pack_tiles(canonical: Tensor, layout: Layout) -> Tensor:
    """Inverse of ``unpack_tiles``.

    canonical  (N, K // 2) uint8, N a multiple of 64 and K of 16: codes q in [-8, 7]
    returns    (K // 16, 2 N) int32, contiguous
    Raises QuambaError for another layout, dtype or shape. Works in slabs: a few MiB beside the result.
    """
    moves = _moves(layout)
    fits = canonical.dtype == torch.uint8 and canonical.dim() == 2
    if not fits or canonical.shape[0] % TILE_COLUMNS or canonical.shape[1] % (TILE_ROWS // 2):
        raise _unfit(
            "A 4-bit weight",
            canonical,
            "uint8 with shape (out_features, in_features / 2),"
            " out_features a multiple of 64 and in_features of 16",
        )
    rows, blocks = canonical.shape[1] * 2 // TILE_ROWS, canonical.shape[0] // TILE_COLUMNS
    packed = torch.empty(rows, blocks * TILE_WORDS, dtype=torch.int32, device=canonical.device)
    for row, block in _slabs(rows, blocks):
        slab = canonical[block.start * TILE_COLUMNS : block.stop * TILE_COLUMNS, row.start * 8 : row.stop * 8]
        words = _as_words(slab).view(-1, 4, 2, 8, row.stop - row.start, 2)  # (B, j, h, g, r, word)
        words = words.permute(2, 5, 0, 1, 3, 4).contiguous()  # (h, word, B, j, g, r)
        if layout != "w4a8_channel":
            words ^= _FLIP_SIGNS
        lanes = words.new_zeros(4, *words.shape[2:])  # (tau, B, j, g, r)
        scratch = torch.empty_like(lanes[0])
        for move in moves:
            _or_nibble(lanes[move.tau], move.field, words[move.half, move.word], move.nibble, scratch)
        lanes = lanes.permute(1, 3, 0, 2, 4).contiguous().flatten(0, 3)  # (B g tau j, r)
        packed[row, block.start * TILE_WORDS : block.stop * TILE_WORDS] = lanes.t().contiguous()
    return packed


def unpack_embedding(packed: Tensor) -> Tensor:
    """The canonical codes of a packed embedding: element x of eight is in field (0, 4, 1, 5, 2, 6, 3, 7)[x].

    packed   (V, D // 8) int32, codes stored as q + 8
    returns  (V, D // 2) uint8, contiguous: codes q in [-8, 7], as ``pack_int4`` packs them
    Raises QuambaError for another dtype or number of dimensions.
    """
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise _unfit("A packed 4-bit embedding", packed, "int32 with shape (vocab_size, d_model / 8)")
    canonical = torch.empty(packed.shape, dtype=torch.int32, device=packed.device)
    for row in _row_slabs(*packed.shape):
        fields = packed[row].contiguous()
        words, scratch = torch.zeros_like(fields), torch.empty_like(fields)
        for field, element in enumerate(_INTERLEAVED):
            _or_nibble(words, element, fields, field, scratch)
        canonical[row] = words.bitwise_xor_(_FLIP_SIGNS)
    return canonical.view(torch.uint8)


def pack_embedding(canonical: Tensor) -> Tensor:
    """Inverse of ``unpack_embedding``.

    canonical  (V, D // 2) uint8, D a multiple of 8: codes q in [-8, 7]
    returns    (V, D // 8) int32, contiguous
    Raises QuambaError for another dtype or shape.
    """
    if canonical.dtype != torch.uint8 or canonical.dim() != 2 or canonical.shape[1] % 4:
        raise _unfit(
            "A 4-bit embedding",
            canonical,
            "uint8 with shape (vocab_size, d_model / 2), d_model a multiple of 8",
        )
    vocab_size, words_per_row = canonical.shape[0], canonical.shape[1] // 4
    packed = torch.empty(vocab_size, words_per_row, dtype=torch.int32, device=canonical.device)
    for row in _row_slabs(vocab_size, words_per_row):
        words = _as_words(canonical[row]).bitwise_xor_(_FLIP_SIGNS)
        fields, scratch = torch.zeros_like(words), torch.empty_like(words)
        for field, element in enumerate(_INTERLEAVED):
            _or_nibble(fields, field, words, element, scratch)
        packed[row] = fields
    return packed


def unpermute_group_scale(stored: Tensor) -> Tensor:
    """``stored[:, 64 B + 8 x + y] -> out[:, 64 B + x + 8 y]``, x and y in 0 .. 7

    stored   (groups, N), N a multiple of 64, any dtype
    returns  the same shape and dtype, contiguous
    Raises QuambaError for another shape.
    """
    runs = _runs("A group scale", stored, TILE_COLUMNS).unflatten(2, (8, 8))
    return runs.transpose(2, 3).reshape(stored.shape)


def permute_group_scale(scale: Tensor) -> Tensor:
    """Inverse of ``unpermute_group_scale``: a transpose of 8 x 8 is its own inverse."""
    return unpermute_group_scale(scale)


def unpermute_channel_scale(stored: Tensor) -> Tensor:
    """``stored[:, 32 a + 8 x + 2 z + p] -> out[:, 32 a + 2 x + 8 z + p]``, x and z in 0 .. 3, p in 0 .. 1

    stored   (1, N), N a multiple of 32, any dtype
    returns  the same shape and dtype, contiguous
    Raises QuambaError for another shape.
    """
    runs = _runs("A channel scale", stored, 32).unflatten(2, (4, 4, 2))
    return runs.transpose(2, 3).reshape(stored.shape)


def permute_channel_scale(scale: Tensor) -> Tensor:
    """Inverse of ``unpermute_channel_scale``: a transpose of 4 x 4 pairs is its own inverse."""
    return unpermute_channel_scale(scale)


@cache
def _moves(layout: Layout) -> tuple[_Move, ...]:
    """Where each nibble of the four lanes of a tile row goes: 4 lanes x 8 fields."""
    if layout not in LAYOUTS:
        raise one_of("The layout of packed weights", layout, LAYOUTS)
    moves = []
    for tau in range(4):
        for field, element in enumerate(_INTERLEAVED_CHANNEL if layout == "w4a8_channel" else _INTERLEAVED):
            half, i = divmod(element, 4)
            feature = 2 * tau + i % 2 + 8 * (i // 2) if layout == "w4a16" else 4 * tau + i
            moves.append(_Move(tau, field, half, feature // 8, feature % 8))
    return tuple(moves)


def _or_nibble(target: Tensor, to: int, source: Tensor, at: int, scratch: Tensor) -> None:
    """Puts nibble ``at`` of each source word into nibble ``to`` of target, which is zero there.

    target, source, scratch  int32 of one shape
    """
    distance = 4 * (to - at)
    if distance >= 0:
        torch.bitwise_left_shift(source, distance, out=scratch)
    else:
        torch.bitwise_right_shift(source, -distance, out=scratch)
    mask = 15 << 4 * to
    target.bitwise_or_(scratch.bitwise_and_(mask - 2**32 if to == 7 else mask))


def _slabs(rows: int, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Slices of tile rows and of 64-column blocks that cover all tiles, at most _SLAB_WORDS words each."""
    row_step = max(1, min(rows, _SLAB_WORDS // TILE_WORDS))
    block_step = _SLAB_WORDS // (TILE_WORDS * row_step)
    for block in range(0, blocks, block_step):
        for row in range(0, rows, row_step):
            yield slice(row, min(row + row_step, rows)), slice(block, min(block + block_step, blocks))


def _row_slabs(rows: int, words_per_row: int) -> Iterator[slice]:
    step = max(1, _SLAB_WORDS // max(1, words_per_row))
    for row in range(0, rows, step):
        yield slice(row, min(row + step, rows))


def _as_words(codes: Tensor) -> Tensor:
    """A copy of uint8 (n, 4 m) as int32 (n, m), whatever the strides and the alignment of codes."""
    words = torch.empty(codes.shape[0], codes.shape[1] // 4, dtype=torch.int32, device=codes.device)
    words.view(torch.uint8).copy_(codes)
    return words


def _runs(what: str, scale: Tensor, length: int) -> Tensor:
    """The last dimension of a matrix cut into runs: (rows, N) to (rows, N // length, length)."""
    if scale.dim() != 2 or scale.shape[1] % length:
        raise _unfit(what, scale, f"two dimensions, the second a multiple of {length}")
    return scale.unflatten(1, (scale.shape[1] // length, length))


def _unfit(what: str, tensor: Tensor, expected: str) -> QuambaError:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return QuambaError(f"{what} is {dtype} with shape {tuple(tensor.shape)}, expected {expected}.")
