"""Tokenizers: texts round-trip, special ids come from the right file, absence is a sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from tiny_models import tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from quamba.checkpoints.tokenizer import FAMILY_TOKENIZER, load_tokenizer
from quamba.errors import QuambaError

DEMO_MODEL = Path(__file__).resolve().parents[2] / "assets" / "models" / "mamba-demo"
END, PAD = "<|endoftext|>", "<|padding|>"


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token a byte (ids 0 to 255 in the byte alphabet's order), special tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def put(folder: Path, backend: Tokenizer, **side: dict) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in side.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_texts_round_trip(tmp_path):
    tokenizer = load_tokenizer(put(tmp_path, byte_tokenizer(END)))
    texts = ["", "a", "Grüße, 世界\n\ttab", "x" * 500]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [len(ids) for ids in tokenizer.encode_batch(texts)] == [len(text.encode()) for text in texts]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_special_tokens_are_skipped_unless_asked_for(tmp_path):
    tokenizer = load_tokenizer(put(tmp_path, byte_tokenizer(END)))
    ids = tokenizer.encode(f"a{END}b")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(iter(ids), skip_special_tokens=False) == f"a{END}b"


def test_nothing_is_added_unless_the_file_says_so(tmp_path):
    backend = byte_tokenizer(END)
    plain = load_tokenizer(put(tmp_path, backend)).encode("a")
    assert len(plain) == 1
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])
    assert load_tokenizer(put(tmp_path, backend)).encode("a") == [256, *plain]


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_tokenizer(END)
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(put(tmp_path, backend))
    assert [len(ids) for ids in tokenizer.encode_batch(["abcdef", "a"])] == [6, 1]


def test_vocab_size_counts_added_tokens(tmp_path):
    assert load_tokenizer(put(tmp_path, byte_tokenizer(END, PAD))).vocab_size == 258


def test_fingerprint_and_files(tmp_path):
    put(tmp_path, byte_tokenizer(END), tokenizer_config={}, generation_config={}, config={})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(tmp_path)
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    assert [file.name for file in tokenizer.files] == names
    assert tokenizer.fingerprint() == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


SPECIAL = (END, PAD, "<end>", "<turn>")  # ids 256 to 259
EOS = [
    ({}, 256, {256}),
    ({"config": {"eos_token_id": 258}}, 258, {258}),
    ({"config": {"eos_token_id": [258, 259]}}, 258, {258, 259}),
    ({"config": {"eos_token_id": None}}, 256, {256}),
    ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": 258}}, 258, {258}),
    ({"config": {"eos_token_id": 0}, "tokenizer_config": {"eos_token": "<end>"}}, 258, {258}),
    ({"tokenizer_config": {"eos_token": {"content": "<end>"}}}, 258, {258}),
    ({"tokenizer_config": {"eos_token": "<not there>"}}, 256, {256}),
    ({"special_tokens_map": {"eos_token": "<turn>"}, "tokenizer_config": {"eos_token": None}}, 259, {259}),
    ({"tokenizer_config": {"eos_token": "<end>"}, "special_tokens_map": {"eos_token": "<turn>"}}, 258, {258}),
    (
        {"tokenizer_config": {"eos_token": "<end>"}, "generation_config": {"eos_token_id": [259, 258]}},
        258,
        {258, 259},
    ),
]


@pytest.mark.parametrize(("side", "first", "every"), EOS)
def test_where_the_end_of_text_comes_from(tmp_path, side, first, every):
    tokenizer = load_tokenizer(put(tmp_path, byte_tokenizer(*SPECIAL), **side))
    assert tokenizer.eos_token_id == first
    assert tokenizer.eos_token_ids == every


def test_no_end_of_text(tmp_path):
    tokenizer = load_tokenizer(put(tmp_path, byte_tokenizer()))
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (
        None,
        frozenset(),
        None,
    )


@pytest.mark.parametrize(
    ("special", "side", "pad"),
    [
        (SPECIAL, {}, 257),
        (SPECIAL, {"tokenizer_config": {"pad_token": "<end>"}}, 258),
        (SPECIAL, {"special_tokens_map": {"pad_token": {"content": "<turn>"}}}, 259),
        ((END, "<end>"), {}, 256),
        ((END, "<end>"), {"tokenizer_config": {"eos_token": "<end>"}}, 257),
    ],
)
def test_where_the_padding_comes_from(tmp_path, special, side, pad):
    assert load_tokenizer(put(tmp_path, byte_tokenizer(*special), **side)).pad_token_id == pad


def test_a_padding_id_of_0_is_an_id(tmp_path):
    first = sorted(pre_tokenizers.ByteLevel.alphabet())[0]
    side = {"tokenizer_config": {"pad_token": first}}
    assert load_tokenizer(put(tmp_path, byte_tokenizer(END), **side)).pad_token_id == 0


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    put(tmp_path, byte_tokenizer(END))
    load_tokenizer(tmp_path, tiny_config("mamba", vocab_size=257, pad_vocab_size_multiple=1))
    with pytest.raises(
        QuambaError, match=r"tokenizer of 'owner/name' has 257 ids, expected at most the 256 rows"
    ):
        load_tokenizer(tmp_path, tiny_config("mamba", vocab_size=250), source="owner/name")


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(QuambaError, match=r"is no tokenizer file") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [4096, 65024, 256000])
def test_another_vocabulary_gets_no_borrowed_tokenizer(tmp_path, offline, rows):
    with pytest.raises(
        QuambaError, match=rf"'{tmp_path}' has no tokenizer.json, and its {rows} embedding rows are not"
    ):
        load_tokenizer(tmp_path, tiny_config("mamba", vocab_size=rows))


@pytest.mark.parametrize("config", [None, tiny_config("mamba", vocab_size=50277)])
def test_offline_and_absent_says_which_file_goes_where(tmp_path, offline, config):
    sentence = rf"put the tokenizer.json of {FAMILY_TOKENIZER} into '{tmp_path}'\.$"
    with pytest.raises(QuambaError, match=sentence) as caught:
        load_tokenizer(tmp_path, config, source="state-spaces/mamba-130m")
    assert str(caught.value).startswith("'state-spaces/mamba-130m' has no tokenizer.json")


@pytest.mark.parametrize(("vocab_size", "multiple"), [(50277, 8), (50277, 16), (50280, 1), (50277, 256)])
def test_the_family_tokenizer_comes_from_the_cache(tmp_path, offline, vocab_size, multiple):
    repo = offline / f"models--{FAMILY_TOKENIZER.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)
    put(snapshot, byte_tokenizer(END))
    config = tiny_config("mamba", vocab_size=vocab_size, pad_vocab_size_multiple=multiple)
    tokenizer = load_tokenizer(tmp_path, config)
    assert tokenizer.eos_token_id == 256
    assert tokenizer.files == (snapshot / "tokenizer.json",)


def test_the_demo_tokenizer():
    if not (DEMO_MODEL / "tokenizer.json").is_file():
        pytest.skip("assets/models/mamba-demo is not in this checkout")
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (4096, 0, 1)
    text = "It is a truth universally acknowledged, that a single man...\n"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text
