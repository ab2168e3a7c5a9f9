"""SentencePiece models: the same interface, the model's own ids, streamed text, sentences for bad files."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from quamba.calibration.data import left_pad
from quamba.checkpoints.sentencepiece_tokenizer import PUBLISHED_8B_FILE
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError
from quamba.runtime.stream_text import stop_index, stream_text

sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")

# identity: spaces are kept as they are. nmt: SentencePiece's defaults, which fold runs of spaces.
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS = {
    "bpe": {"model_type": "bpe", **IDENTITY},
    "bpe-pad": {"model_type": "bpe", **IDENTITY, "pad_id": 3},
    "unigram": {"model_type": "unigram", **IDENTITY},
    "unigram-pad-first": {"model_type": "unigram", **IDENTITY, "pad_id": 0, "unk_id": 3},
    "nmt": {"model_type": "bpe", "byte_fallback": True},
    "nmt-no-bytes": {"model_type": "bpe"},
    "no-prefix": {"model_type": "bpe", **IDENTITY, "add_dummy_prefix": False},
    "no-special": {"model_type": "bpe", **IDENTITY, "bos_id": -1, "eos_id": -1},
}
WHOLE = [kind for kind, options in KINDS.items() if "normalization_rule_name" in options]
TEXTS = [
    "",
    " ",
    "It is a truth",
    "  two  and   three    spaces ",
    "Grüße, 世界 🌍: plain\n\n\tagain.\n",
    "if x:\n        return  y\n",
    "</s><s> <0x41> ▁ as text",
]


@pytest.fixture(scope="module")
def models(assets: Path) -> dict[str, bytes]:
    """Trained ``.model`` files of about 400 pieces by the names of ``KINDS``."""
    text = (assets / "data" / "heldout.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines()[:600] if line]
    trained = {}
    for kind, options in KINDS.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=400,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        trained[kind] = out.getvalue()
    return trained


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loaded(folder: Path, model: bytes, name: str = "tokenizer.model", **side: object) -> Tokenizer:
    (folder / name).write_bytes(model)
    for file, content in side.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_ids_are_those_of_sentencepiece(tmp_path: Path, models: dict[str, bytes], kind: str) -> None:
    tokenizer = loaded(tmp_path, models[kind])
    plain = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    expected = [plain.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == expected
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    assert [tokenizer.decode(iter(ids)) for ids in expected] == [plain.decode(ids) for ids in expected]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.vocab_size == plain.get_piece_size() == 400


@pytest.mark.parametrize("kind", WHOLE)
def test_texts_round_trip(tmp_path: Path, models: dict[str, bytes], kind: str) -> None:
    tokenizer = loaded(tmp_path, models[kind])
    texts = [text for text in TEXTS if "▁" not in text]  # SentencePiece itself takes this for a space
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize(
    ("kind", "bos", "eos", "pad"),
    [
        ("bpe", 1, 2, 2),
        ("bpe-pad", 1, 2, 3),
        ("unigram-pad-first", 1, 2, 0),
        ("no-special", None, None, None),
    ],
)
def test_special_ids(
    tmp_path: Path,
    models: dict[str, bytes],
    kind: str,
    bos: int | None,
    eos: int | None,
    pad: int | None,
) -> None:
    tokenizer = loaded(tmp_path, models[kind])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (bos, eos, pad)
    assert tokenizer.eos_token_ids == (frozenset() if eos is None else {eos})
    assert (tokenizer.bos_token, tokenizer.eos_token) == ((None, None) if eos is None else ("<s>", "</s>"))


def test_side_files_add_ends_but_do_not_rename_the_model_s_own(
    tmp_path: Path, models: dict[str, bytes]
) -> None:
    named = {"eos_token": "<unk>", "pad_token": "<unk>", "bos_token": "<unk>"}
    side = {"tokenizer_config": named, "generation_config": {"eos_token_id": [7, 2]}}
    tokenizer = loaded(tmp_path, models["bpe"], **side, config={"eos_token_id": 9})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.eos_token_ids == {2, 7}


def test_config_json_has_the_end_if_the_model_has_none(tmp_path: Path, models: dict[str, bytes]) -> None:
    tokenizer = loaded(tmp_path, models["no-special"], config={"eos_token_id": 9})
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (9, 9)


def test_special_tokens_are_skipped_unless_asked_for(tmp_path: Path, models: dict[str, bytes]) -> None:
    tokenizer = loaded(tmp_path, models["bpe"])
    ids = [1, *tokenizer.encode("a  b"), 2, *tokenizer.encode(" c"), 2, *tokenizer.encode("é"), 2]
    assert tokenizer.decode(ids) == "a  b  c é"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> a  b</s>  c</s> é</s>"
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == "a  b</s>  c</s> é</s>"


def test_ids_without_a_piece_decode_to_nothing(tmp_path: Path, models: dict[str, bytes]) -> None:
    tokenizer = loaded(tmp_path, models["bpe"])
    assert tokenizer.decode([400, -1, *tokenizer.encode("ab"), 10**6]) == "ab"
    assert tokenizer.backend.id_to_token(400) is None


def test_a_padded_batch_by_the_caller(tmp_path: Path, models: dict[str, bytes]) -> None:
    """The published wrapper pads with the model's pad id, which is -1 here."""
    tokenizer = loaded(tmp_path, models["bpe"])
    short, long = tokenizer.encode_batch(["a", "a b c d"])
    ids, mask = left_pad([torch.tensor(short), torch.tensor(long)])
    assert mask is not None
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == [short, long]
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    return list(stream_text((torch.tensor([i]) for i in ids), tokenizer, stop))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streamed_pieces_join_to_the_text(
    tmp_path: Path, models: dict[str, bytes], kind: str, text: str
) -> None:
    tokenizer = loaded(tmp_path, models[kind])
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)) == whole
    stop = ("and", " p", "世界", "  y")
    assert "".join(pieces(tokenizer, ids, stop)) == whole[: stop_index(whole, stop)]
    assert "\ufffd" not in whole


def test_streamed_pieces_of_any_ids_join(tmp_path: Path, models: dict[str, bytes], kind: str) -> None:
    """Runs of spaces, control ids, unknown ids and whole characters in bytes, in any order."""
    tokenizer, draw = loaded(tmp_path, models[kind]), random.Random(0)
    space = tokenizer.backend.token_to_id("▁")
    assert space is not None
    parts = [[space], [space], [0], [1], [2], *([i] for i in range(300, 340))]
    parts += [tokenizer.encode(character) for character in "é世🌍"]
    for _ in range(200):
        ids = [i for _ in range(draw.randrange(10)) for i in draw.choice(parts)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_a_character_in_bytes_streams_whole(tmp_path: Path, models: dict[str, bytes]) -> None:
    tokenizer = loaded(tmp_path, models["no-prefix"])
    ids = tokenizer.encode("世🌍é")
    assert len(ids) == len("世🌍é".encode())
    assert pieces(tokenizer, ids) == ["世", "🌍", "é"]
    assert pieces(tokenizer, ids[:5]) == ["世", "\ufffd\ufffd"], "what there is of the second, at the end"


def test_the_published_file_goes_before_tokenizer_json(
    tmp_path: Path, models: dict[str, bytes], tiny_tokenizer_folder: Path
) -> None:
    shutil.copy(tiny_tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / PUBLISHED_8B_FILE).write_bytes(models["bpe"])
    tokenizer = loaded(tmp_path, models["nmt"], name="spiece.model", tokenizer_config={})
    assert [file.name for file in tokenizer.files] == [PUBLISHED_8B_FILE, "tokenizer_config.json"]
    assert tokenizer.fingerprint() == hashlib.sha256(models["bpe"]).hexdigest()
    (tmp_path / PUBLISHED_8B_FILE).unlink()
    assert load_tokenizer(tmp_path).files[0].name == "tokenizer.json", "and that before another model"
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).files[0].name == "spiece.model"


def test_what_is_saved_loads_again(tmp_path: Path, models: dict[str, bytes]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    tokenizer = loaded(first, models["bpe"], PUBLISHED_8B_FILE, generation_config={"eos_token_id": 7})
    for file in tokenizer.files:
        shutil.copy(file, second / file.name)
    again = load_tokenizer(second)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.encode("a  b"), again.eos_token_ids) == (tokenizer.encode("a  b"), {2, 7})


def test_two_models_are_ambiguous(tmp_path: Path, models: dict[str, bytes]) -> None:
    (tmp_path / "a.model").write_bytes(models["bpe"])
    with pytest.raises(
        QuambaError, match=r"no tokenizer.json but 2 SentencePiece models \(a.model, b.model\)"
    ):
        loaded(tmp_path, models["bpe"], "b.model")


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path, models: dict[str, bytes]) -> None:
    loaded(tmp_path, models["bpe"])
    load_tokenizer(tmp_path, tiny_config("mamba2", vocab_size=400, pad_vocab_size_multiple=1))
    with pytest.raises(QuambaError, match=r"'owner/8b' has 400 ids, expected at most the 384 rows"):
        load_tokenizer(
            tmp_path, tiny_config("mamba2", vocab_size=384, pad_vocab_size_multiple=1), source="owner/8b"
        )


@pytest.mark.parametrize(
    "content",
    [
        lambda model: b"",
        lambda model: b"version https://git-lfs.github.com/spec/v1\n",
        lambda model: model[: len(model) // 2],
        lambda model: model[:-1],
    ],
    ids=["empty", "a-pointer", "half", "all-but-a-byte"],
)
def test_a_file_that_is_no_model(tmp_path: Path, models: dict[str, bytes], content) -> None:
    with pytest.raises(
        QuambaError, match=r"'.*x\.model' is no SentencePiece model, or not all of it"
    ) as caught:
        loaded(tmp_path, content(models["bpe"]), "x.model")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(
    tmp_path: Path, models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        QuambaError, match=r"needs the package 'sentencepiece'.*pip install 'quamba\[sentencepiece\]'"
    ):
        loaded(tmp_path, models["bpe"], PUBLISHED_8B_FILE)


def test_a_continuation_keeps_its_first_space(tmp_path: Path, models: dict[str, bytes], kind: str) -> None:
    """Decoded alone it would lose it: the prompt's ids say that it does not begin a text."""
    tokenizer = loaded(tmp_path, models[kind])
    ids = tokenizer.encode("It is a truth universally known")
    cut = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]) == "It is")
    prompt, rest = ids[:cut], ids[cut:]
    assert tokenizer.decode(rest).startswith("a") == (kind != "no-prefix")
    assert tokenizer.decode_after(prompt, rest) == " a truth universally known"
    steps = [torch.tensor([i]) for i in rest]
    assert "".join(stream_text(steps, tokenizer, context=prompt)) == " a truth universally known"
    assert "".join(stream_text(steps, tokenizer, (" univ",), context=prompt)) == " a truth"
    assert tokenizer.decode_after([], rest) == tokenizer.decode(rest)
