"""The layouts against a scalar reading of their index formulas, worked examples, and files where present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_fixtures import zoo_path

from quamba.checkpoints.zoo import packing
from quamba.checkpoints.zoo.packing import (
    LAYOUTS,
    Layout,
    pack_embedding,
    pack_tiles,
    padded,
    permute_channel_scale,
    permute_group_scale,
    unpack_embedding,
    unpack_tiles,
    unpermute_channel_scale,
    unpermute_group_scale,
)
from quamba.errors import QuambaError
from quamba.formats.packing import pack_int4, unpack_int4

ILV = (0, 2, 4, 6, 1, 3, 5, 7)
ILV_CHANNEL = (4, 0, 5, 1, 6, 2, 7, 3)
SHAPES = [(384, 320), (128, 192), (16, 64), (80, 128)]  # (in_features, out_features)
SHAPE_IDS = [f"{k}x{n}" for k, n in SHAPES]
ZOO_MODELS = {"quamba2-demo2-w4a8": "w4a8_group", "quamba2-demo2-w4a16": "w4a16"}


def field_source(layout: str, r: int, c: int, b: int) -> tuple[int, int]:
    """The (k, n) of field b of ``P[r][c]``."""
    block, rest = divmod(c, 128)
    t, j = divmod(rest, 4)
    e = (ILV_CHANNEL if layout == "w4a8_channel" else ILV)[b]
    h, i = e // 4, e % 4
    tau = t % 4
    rho = 2 * tau + (i % 2) + 8 * (i // 2) if layout == "w4a16" else 4 * tau + i
    return 16 * r + rho, 64 * block + 16 * j + 8 * h + t // 4


def code_place(layout: str, k: int, n: int) -> tuple[int, int, int]:
    """The (r, c, b) that holds the code of (k, n)."""
    kappa, nu = k % 16, n % 64
    j, h, gamma = nu // 16, (nu % 16) // 8, nu % 8
    if layout == "w4a16":
        tau, i = (kappa % 8) // 2, (kappa % 2) + 2 * (kappa // 8)
    else:
        tau, i = kappa // 4, kappa % 4
    b = (ILV_CHANNEL if layout == "w4a8_channel" else ILV).index(4 * h + i)
    return k // 16, 128 * (n // 64) + 4 * (4 * gamma + tau) + j, b


def field_of(layout: str, code: int) -> int:
    return code & 15 if layout == "w4a8_channel" else code + 8


def as_int32(words: list[list[int]]) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def random_codes(n: int, k: int, seed: int = 0) -> Tensor:
    """(n, k) int8 in [-8, 7]"""
    return torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def scalar_pack(codes: Tensor, layout: str) -> Tensor:
    """Word by word, by the forward formula. codes (N, K) int8."""
    rows = codes.tolist()
    packed = []
    for r in range(codes.shape[1] // 16):
        packed.append([])
        for c in range(2 * codes.shape[0]):
            word = 0
            for b in range(8):
                k, n = field_source(layout, r, c, b)
                word += field_of(layout, rows[n][k]) << 4 * b
            packed[-1].append(word)
    return as_int32(packed)


def scalar_unpack(packed: Tensor, layout: str) -> Tensor:
    """Code by code, by the inverse formula; (N, K) int8."""
    words = (packed.to(torch.int64) % 2**32).tolist()
    codes = []
    for n in range(packed.shape[1] // 2):
        codes.append([])
        for k in range(packed.shape[0] * 16):
            r, c, b = code_place(layout, k, n)
            field = words[r][c] // 16**b % 16
            codes[-1].append((field ^ 8) - 8 if layout == "w4a8_channel" else field - 8)
    return torch.tensor(codes, dtype=torch.int8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n"), SHAPES, ids=SHAPE_IDS)
def test_tiles_follow_both_formulas(layout: Layout, k: int, n: int, poison_empty: None) -> None:
    codes = random_codes(n, k, seed=k + n)
    packed = scalar_pack(codes, layout)
    assert torch.equal(pack_tiles(pack_int4(codes), layout), packed)
    assert torch.equal(unpack_tiles(packed, layout), pack_int4(codes))
    words = random_words(k // 16, 2 * n, seed=k + n)
    assert torch.equal(unpack_int4(unpack_tiles(words, layout)), scalar_unpack(words, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("k", "n"), [*SHAPES, (1536, 3392)], ids=[*SHAPE_IDS, "1536x3392"])
def test_tiles_round_trip(layout: Layout, k: int, n: int, poison_empty: None) -> None:
    packed = random_words(k // 16, 2 * n)
    canonical = unpack_tiles(packed, layout)
    assert (canonical.shape, canonical.dtype) == ((n, k // 2), torch.uint8) and canonical.is_contiguous()
    again = pack_tiles(canonical, layout)
    assert torch.equal(again, packed) and again.is_contiguous()
    canonical = pack_int4(random_codes(n, k))
    assert torch.equal(unpack_tiles(pack_tiles(canonical, layout), layout), canonical)


@pytest.mark.parametrize("slab_words", [128, 2 * 128, 3 * 128, 7 * 128])
@pytest.mark.parametrize(("k", "n"), [(80, 192), (16, 320)], ids=["80x192", "16x320"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_do_not_depend_on_slabs(
    layout: Layout, k: int, n: int, slab_words: int, monkeypatch: pytest.MonkeyPatch, poison_empty: None
) -> None:
    packed = random_words(k // 16, 2 * n)
    canonical = unpack_tiles(packed, layout)
    monkeypatch.setattr(packing, "_SLAB_WORDS", slab_words)
    assert torch.equal(unpack_tiles(packed, layout), canonical)
    assert torch.equal(pack_tiles(canonical, layout), packed)


def test_slabs_are_bounded_and_cover_every_tile_once() -> None:
    for rows, blocks in [(1, 1), (256, 300), (5000, 3), (1, 70000), (0, 2), (2, 0)]:
        covered = 0
        for row, block in packing._slabs(rows, blocks):
            tiles = (row.stop - row.start) * (block.stop - block.start)
            assert 0 < tiles * packing.TILE_WORDS <= 2**18
            assert row.stop <= rows and block.stop <= blocks
            covered += tiles
        assert covered == rows * blocks
    for rows, words_per_row in [(50288, 320), (3, 2**19), (5, 0), (0, 5)]:
        slices = list(packing._row_slabs(rows, words_per_row))
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(rows))
        assert all(s.stop - s.start == 1 or (s.stop - s.start) * words_per_row <= 2**18 for s in slices)


@pytest.mark.parametrize(
    ("layout", "first_word", "place_of_13_41"),
    [
        ("w4a16", [(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)], (26, 7)),
        ("w4a8_group", [(0, 0), (2, 0), (0, 8), (2, 8), (1, 0), (3, 0), (1, 8), (3, 8)], (30, 6)),
        ("w4a8_channel", [(0, 8), (0, 0), (1, 8), (1, 0), (2, 8), (2, 0), (3, 8), (3, 0)], (30, 2)),
    ],
)
def test_worked_examples(
    layout: Layout, first_word: list[tuple[int, int]], place_of_13_41: tuple[int, int]
) -> None:
    """One field set at a time, in a tile where the code 0 is a zero field."""
    zero = 0 if layout == "w4a8_channel" else -8
    for place, (k, n) in [*(((0, b), kn) for b, kn in enumerate(first_word)), (place_of_13_41, (13, 41))]:
        codes = torch.full((64, 16), zero, dtype=torch.int8)
        codes[n, k] = zero + 1
        packed = pack_tiles(pack_int4(codes), layout)
        c, b = place
        assert packed.count_nonzero() == 1
        assert int(packed[0, c]) % 2**32 == 1 << 4 * b


@pytest.mark.parametrize(("layout", "word"), [("w4a16", 0x19910880), ("w4a8_group", 0xB931A820)])
def test_words_of_k_plus_n(layout: Layout, word: int) -> None:
    codes = (torch.arange(64).view(64, 1) + torch.arange(16)) % 16 - 8
    packed = pack_tiles(pack_int4(codes.to(torch.int8)), layout)
    assert [w % 2**32 for w in packed[0, :4].tolist()] == [word] * 4


def test_sign_bits_are_the_only_difference_of_offset_codes() -> None:
    """A zero word is -8 where codes are stored as q + 8, and 0 in two's complement."""
    packed = torch.zeros(1, 128, dtype=torch.int32)
    assert unpack_tiles(packed, "w4a16").unique().tolist() == [0x88]
    assert unpack_tiles(packed, "w4a8_group").unique().tolist() == [0x88]
    assert unpack_tiles(packed, "w4a8_channel").unique().tolist() == [0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_any_strides_and_alignment(layout: Layout) -> None:
    packed = random_words(8, 256)
    canonical = unpack_tiles(packed, layout)
    assert torch.equal(unpack_tiles(packed.t().contiguous().t(), layout), canonical)
    assert torch.equal(pack_tiles(canonical.t().contiguous().t(), layout), packed)
    shifted = torch.zeros(canonical.numel() + 1, dtype=torch.uint8)[1:].view_as(canonical).copy_(canonical)
    assert torch.equal(pack_tiles(shifted, layout), packed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_tiles(layout: Layout) -> None:
    for rows, n in [(0, 64), (4, 0), (0, 0)]:
        packed = torch.zeros(rows, 2 * n, dtype=torch.int32)
        canonical = unpack_tiles(packed, layout)
        assert canonical.shape == (n, rows * 8)
        assert pack_tiles(canonical, layout).shape == packed.shape


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (torch.zeros(2, 192, dtype=torch.int32), r"int32 with shape \(2, 192\)"),
        (torch.zeros(256, dtype=torch.int32), r"int32 with shape \(256,\)"),
        (torch.zeros(2, 128, dtype=torch.int64), r"int64 with shape \(2, 128\)"),
    ],
    ids=["columns", "dimensions", "dtype"],
)
def test_unfit_packed_weights_are_refused(stored: Tensor, found: str) -> None:
    with pytest.raises(QuambaError, match=f"is {found}, expected int32 .*out_features a multiple of 64"):
        unpack_tiles(stored, "w4a16")


@pytest.mark.parametrize(
    ("canonical", "found"),
    [
        (torch.zeros(64, 12, dtype=torch.uint8), r"uint8 with shape \(64, 12\)"),
        (torch.zeros(96, 16, dtype=torch.uint8), r"uint8 with shape \(96, 16\)"),
        (torch.zeros(1, 64, 16, dtype=torch.uint8), r"uint8 with shape \(1, 64, 16\)"),
        (torch.zeros(64, 16, dtype=torch.int8), r"int8 with shape \(64, 16\)"),
    ],
    ids=["in_features", "out_features", "dimensions", "dtype"],
)
def test_unfit_codes_are_refused(canonical: Tensor, found: str) -> None:
    with pytest.raises(
        QuambaError, match=f"is {found}, expected uint8 .*multiple of 64 and in_features of 16"
    ):
        pack_tiles(canonical, "w4a8_group")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(QuambaError, match=r"'w4a8', expected one of 'w4a16', .* Did you mean"):
        unpack_tiles(torch.zeros(1, 128, dtype=torch.int32), "w4a8")  # type: ignore[arg-type]
    with pytest.raises(QuambaError, match="'int4', expected one of"):
        pack_tiles(torch.zeros(64, 8, dtype=torch.uint8), "int4")  # type: ignore[arg-type]


def test_group_scale_order() -> None:
    columns = torch.arange(192, dtype=torch.float16).view(1, 192)
    stored = permute_group_scale(columns)
    expected = [0.0] * 192
    for run in range(3):
        for x in range(8):
            for y in range(8):
                expected[64 * run + 8 * x + y] = float(64 * run + x + 8 * y)
    assert stored[0].tolist() == expected
    assert stored[0, :8].tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert torch.equal(unpermute_group_scale(stored), columns)


def test_channel_scale_order() -> None:
    columns = torch.arange(192, dtype=torch.float32).view(1, 192)
    stored = permute_channel_scale(columns)
    expected = [0.0] * 192
    for run in range(6):
        for x in range(4):
            for m in range(8):
                expected[32 * run + 8 * x + m] = float(32 * run + 2 * x + (m % 2) + 8 * (m // 2))
    assert stored[0].tolist() == expected
    assert stored[0, :16].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    for o in range(32):
        assert stored[0, 8 * ((o % 8) // 2) + 2 * (o // 8) + o % 2] == o
    assert torch.equal(unpermute_channel_scale(stored), columns)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_scales_keep_rows_dtype_and_any_strides(rows: int) -> None:
    scale = torch.arange(rows * 128, dtype=torch.float16).view(rows, 128)
    group, channel = unpermute_group_scale(scale), unpermute_channel_scale(scale)
    assert group.shape == channel.shape == scale.shape and group.dtype == channel.dtype == torch.float16
    assert torch.equal(permute_group_scale(group), scale) and torch.equal(
        permute_channel_scale(channel), scale
    )
    strided = scale.t().contiguous().t()
    assert torch.equal(unpermute_group_scale(strided), group) and group.is_contiguous()
    for row in range(rows):
        assert torch.equal(group[row : row + 1], unpermute_group_scale(scale[row : row + 1]))


def test_scales_are_copies() -> None:
    scale = torch.ones(1, 64)
    unpermute_group_scale(scale).zero_()
    unpermute_channel_scale(scale).zero_()
    assert scale.unique().tolist() == [1]


def test_unfit_scales_are_refused() -> None:
    with pytest.raises(QuambaError, match=r"group scale is float16 with shape \(2, 96\), .*multiple of 64"):
        unpermute_group_scale(torch.zeros(2, 96, dtype=torch.float16))
    with pytest.raises(QuambaError, match=r"channel scale is float32 with shape \(64,\), .*multiple of 32"):
        unpermute_channel_scale(torch.zeros(64))


def test_embedding_word_of_0_to_7() -> None:
    codes = torch.arange(8, dtype=torch.int8).view(1, 8) - 8
    packed = pack_embedding(pack_int4(codes))
    assert packed.tolist() == [[0x75316420]]
    assert torch.equal(unpack_embedding(packed), pack_int4(codes))


@pytest.mark.parametrize(("vocab_size", "d_model"), [(7, 96), (1, 8), (50, 40)], ids=["7x96", "1x8", "50x40"])
@pytest.mark.parametrize("slab_words", [1, 24, 2**18])
def test_embedding_follows_the_formula(
    vocab_size: int, d_model: int, slab_words: int, monkeypatch: pytest.MonkeyPatch, poison_empty: None
) -> None:
    monkeypatch.setattr(packing, "_SLAB_WORDS", slab_words)
    codes = random_codes(vocab_size, d_model)
    packed = as_int32(
        [
            [sum(row[8 * d + ILV[b]] + 8 << 4 * b for b in range(8)) for d in range(d_model // 8)]
            for row in codes.tolist()
        ]
    )
    assert torch.equal(pack_embedding(pack_int4(codes)), packed)
    assert torch.equal(unpack_embedding(packed), pack_int4(codes))
    words = random_words(vocab_size, d_model // 8)
    assert torch.equal(pack_embedding(unpack_embedding(words)), words)


def test_embedding_of_any_strides_and_empty() -> None:
    packed = random_words(6, 4)
    canonical = unpack_embedding(packed)
    assert canonical.is_contiguous() and canonical.shape == (6, 16)
    assert torch.equal(unpack_embedding(packed.t().contiguous().t()), canonical)
    assert torch.equal(pack_embedding(canonical.t().contiguous().t()), packed)
    assert pack_embedding(unpack_embedding(packed[:0])).shape == (0, 4)


def test_packing_leaves_its_input_alone() -> None:
    packed, canonical = random_words(2, 128), pack_int4(random_codes(64, 32))
    before = packed.clone(), canonical.clone()
    for layout in LAYOUTS:
        unpack_tiles(packed, layout)
        pack_tiles(canonical, layout)
    unpack_embedding(packed)
    pack_embedding(canonical)
    assert torch.equal(packed, before[0]) and torch.equal(canonical, before[1])


def test_unfit_embeddings_are_refused() -> None:
    with pytest.raises(QuambaError, match=r"is int8 with shape \(2, 4\), expected int32"):
        unpack_embedding(torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(QuambaError, match=r"is uint8 with shape \(2, 6\), .*d_model a multiple of 8"):
        pack_embedding(torch.zeros(2, 6, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("n", "multiple", "expected"),
    [(0, 64, 0), (1, 64, 64), (64, 64, 64), (3352, 256, 3584), (50280, 16, 50288)],
)
def test_padded(n: int, multiple: int, expected: int) -> None:
    assert padded(n, multiple) == expected


def read_zoo_model(repo_root: Path, name: str) -> dict[str, Any]:
    file = zoo_path(repo_root, name) / "pytorch_model.bin"
    return dict(torch.load(file, map_location="cpu", weights_only=True))


@pytest.mark.parametrize(("name", "layout"), ZOO_MODELS.items(), ids=list(ZOO_MODELS))
def test_every_4_bit_tensor_of_a_file_survives(name: str, layout: Layout, repo_root: Path) -> None:
    state = read_zoo_model(repo_root, name)
    weights = {k: v for k, v in state.items() if k.endswith(".weight") and v.dtype == torch.int32}
    assert len(weights) == 6  # the embedding, the head, in_proj and out_proj of two layers
    embedding = weights.pop("backbone.embedding.weight")
    assert torch.equal(pack_embedding(unpack_embedding(embedding)), embedding)
    for packed in weights.values():
        assert torch.equal(pack_tiles(unpack_tiles(packed, layout), layout), packed)


def test_the_head_is_the_same_in_both_files(repo_root: Path) -> None:
    """Both files quantize one float head alike, so the layouts, once undone, show the same numbers."""
    w4a8, w4a16 = (read_zoo_model(repo_root, name) for name in ZOO_MODELS)
    codes = unpack_tiles(w4a8["lm_head.weight"], "w4a8_group")
    assert torch.equal(codes, unpack_tiles(w4a16["lm_head.weight"], "w4a16"))
    channel = unpermute_channel_scale(w4a8["lm_head.s_channel"])
    # s_group is rounded to float16: half a step is 2**-11 of it.
    group = unpermute_group_scale(w4a8["lm_head.s_group"]).float() * channel
    torch.testing.assert_close(
        group, unpermute_group_scale(w4a16["lm_head.scale"]).float(), rtol=2**-11 * 1.01, atol=0
    )


def test_padding_of_files_is_at_the_end(repo_root: Path) -> None:
    out_features = 2 * 768 + 2 * 128 + 12  # z and x, B and C, dt
    w4a8, w4a16 = (read_zoo_model(repo_root, name) for name in ZOO_MODELS)
    key = "backbone.layers.0.mixer.in_proj"
    channel = unpermute_channel_scale(w4a8[f"{key}.s_channel"])[0]
    assert channel.numel() == padded(out_features, 64)
    assert bool((channel[out_features:] == torch.tensor(1e-6)).all())
    assert bool((channel[:out_features] > 1e-5).all())
    for scale, codes in (
        (w4a8[f"{key}.s_group"], unpack_tiles(w4a8[f"{key}.weight"], "w4a8_group")),
        (w4a16[f"{key}.scale"], unpack_tiles(w4a16[f"{key}.weight"], "w4a16")),
    ):
        assert codes[out_features:].unique().tolist() == [0x88]
        empty = (unpermute_group_scale(scale) == 0).all(0).nonzero().flatten()
        assert empty.tolist() == list(range(out_features, scale.shape[1]))
