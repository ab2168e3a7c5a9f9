from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.runtime.stream_text import TextStream, stop_index, stream_text

TEXT = "Grüße, 世界 🌍: plain again.\n"


@pytest.fixture
def bytes_tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    """One id a byte."""
    return load_tokenizer(tiny_tokenizer_folder)


def sentencepiece_like(dropped: int = 1) -> Tokenizer:
    """Words that carry their space, and bytes; a text loses up to ``dropped`` spaces at its start."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = ["<unk>", "▁one", "▁two", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=dropped, right=0),
        ]
    )
    return Tokenizer(backend, [])


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    return list(stream_text((torch.tensor([7, i]) for i in ids), tokenizer, stop, row=1))


def test_characters_come_whole_and_at_once(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode()) > len(TEXT)
    assert pieces(bytes_tokenizer, ids) == list(TEXT)
    text, out = TextStream(bytes_tokenizer), []
    for token in ids:
        out.append(text.push(token))
    assert [piece for piece in out if piece] == list(TEXT)
    assert out[2] == "" and out[3] == "ü", "with its last byte, no later"
    assert text.end() == ""


def test_a_broken_character_at_the_end_is_not_lost(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("a🌍")[:-1]
    assert pieces(bytes_tokenizer, ids) == ["a", "\ufffd"] == ["a", bytes_tokenizer.decode(ids)[1:]]


def assert_pieces_join(tokenizer: Tokenizer, ids: list[int]) -> None:
    text = tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)) == text, ids
    stop = ("x", "éé", "🌍x", "s one")
    assert "".join(pieces(tokenizer, ids, stop)) == text[: stop_index(text, stop)], ids


def test_pieces_of_bytes_join_to_the_decoded_ids(bytes_tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids: list[int] = []
        for _ in range(
            draw.randrange(8)
        ):  # random ids, which are mostly broken bytes, among whole characters
            whole = bytes_tokenizer.encode(draw.choice(["é", "世", "🌍", "x", "\ufffd"]))
            ids += draw.choice([whole, [draw.randrange(257)]])
        assert_pieces_join(bytes_tokenizer, ids)


@pytest.mark.parametrize("dropped", [1, 99])
def test_pieces_of_words_join_to_the_decoded_ids(dropped: int) -> None:
    tokenizer, draw = sentencepiece_like(dropped), random.Random(0)
    assert tokenizer.decode([1, 2, 3]) == "one twos"
    for _ in range(300):
        words = [draw.choice(["é", "世", "🌍", "x", 1, 2, 3, 4, 4]) for _ in range(draw.randrange(8))]
        ids = [i for w in words for i in ([w] if isinstance(w, int) else [5 + b for b in w.encode()])]
        assert_pieces_join(tokenizer, ids)


def test_an_id_may_end_one_character_and_begin_another() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    # Bytes as the byte-level alphabet spells them: C3 A9 is an e with an acute.
    backend = Backend(models.BPE(vocab={"a\u00c3": 0, "\u00a9": 1, "\u00a9a\u00c3": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert pieces(Tokenizer(backend, []), [0, 2, 2, 1, 0]) == ["a", "éa", "éa", "é", "a", "\ufffd"]


def test_the_cost_of_a_token_does_not_grow(
    bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest, decode = 0, bytes_tokenizer.decode

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(bytes_tokenizer, "decode", watched)
    assert "".join(pieces(bytes_tokenizer, bytes_tokenizer.encode(TEXT * 10))) == TEXT * 10
    assert longest <= 8, "a character and the one before it"


def test_stop_texts(bytes_tokenizer: Tokenizer) -> None:
    def printed(text: str, *stop: str) -> list[str]:
        return pieces(bytes_tokenizer, bytes_tokenizer.encode(text), stop)

    assert printed("ab\nUser: x", "\nUser:") == ["a", "b"], "across ids, nothing of it printed"
    assert printed("a\nUs b", "\nUser:") == ["a", "\nUs ", "b"], "held back until it is none"
    assert printed("ab\nUse", "\nUser:") == ["a", "b", "\nUse"], "given at the end"
    assert printed("xaab", "aab", "ab") == ["x"], "the first to begin wins"
    assert printed("xaaab", "aab") == ["x", "a"], "a beginning within a beginning"
    assert printed("xab", "abc", "b") == ["x", "a"]
    assert printed("b", "b") == []


def test_a_negative_id_ends_the_text(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("ab")
    assert pieces(bytes_tokenizer, [*ids, -1, *ids]) == ["a", "b"]


def test_bytes_need_no_context(bytes_tokenizer: Tokenizer) -> None:
    """A prompt may end inside a character; what follows is decoded alone."""
    ids = bytes_tokenizer.encode("a🌍 b")
    assert bytes_tokenizer.context(ids) == []
    assert bytes_tokenizer.decode_after(ids[:3], ids[3:]) == bytes_tokenizer.decode(ids[3:])
