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

from quamba.checkpoints.chat_template import named_template, render_chat
from quamba.checkpoints.tokenizer import CHAT_TOKENIZER, FAMILY_TOKENIZER, load_tokenizer
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
    tokenizer = load_tokenizer(put(tmp_path, backend))
    assert tokenizer.encode("a") == [256, *plain]
    assert tokenizer.encode_batch(["a", "aa"]) == [[256, *plain], [256, *plain, *plain]]
    assert tokenizer.encode("a", add_special_tokens=False) == plain
    assert tokenizer.encode_batch(["a", ""], add_special_tokens=False) == [plain, []]


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


def cached_tokenizer(cache: Path, repo_id: str) -> Path:
    """The snapshot folder of a repository in the hub cache, with a tokenizer.json."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)
    return put(snapshot, byte_tokenizer(END))


@pytest.mark.parametrize(("vocab_size", "multiple"), [(50277, 8), (50277, 16), (50280, 1), (50277, 256)])
def test_the_family_tokenizer_comes_from_the_cache(tmp_path, offline, vocab_size, multiple):
    snapshot = cached_tokenizer(offline, FAMILY_TOKENIZER)
    config = tiny_config("mamba", vocab_size=vocab_size, pad_vocab_size_multiple=multiple)
    tokenizer = load_tokenizer(tmp_path, config)
    assert tokenizer.eos_token_id == 256
    assert tokenizer.files == (snapshot / "tokenizer.json",)


CHAT_PLACES = [
    ("revision", "havenhq/mamba-chat", True),
    ("revision", "ut-enyac/quamba-chat-w4a8", True),
    ("Mamba-Chat", "", True),
    ("my-quamba-chat-w8a8", "", True),
    ("revision", "state-spaces/mamba-130m", False),
    ("mamba-chat/mamba-130m", "", False),
]


@pytest.mark.parametrize(("folder", "source", "is_chat"), CHAT_PLACES, ids=range(len(CHAT_PLACES)))
def test_a_mamba_chat_is_known_by_its_name(tmp_path, offline, folder, source, is_chat):
    folder = tmp_path / folder
    folder.mkdir(parents=True)
    cached = {repo: cached_tokenizer(offline, repo) for repo in (CHAT_TOKENIZER, FAMILY_TOKENIZER)}
    tokenizer = load_tokenizer(folder, tiny_config("mamba", vocab_size=50277), source)
    assert tokenizer.files[0].parent == cached[CHAT_TOKENIZER if is_chat else FAMILY_TOKENIZER]
    assert tokenizer.chat_template == (named_template("zephyr") if is_chat else None)
    assert [file.name for file in tokenizer.files[1:]] == ["chat_template.jinja"] * is_chat


def test_a_mamba_chat_ends_and_pads_with_end_of_text(tmp_path):
    side = {"tokenizer_config": {"eos_token": "<end>", "pad_token": PAD}}
    put(tmp_path, byte_tokenizer(*SPECIAL), **side, generation_config={"eos_token_id": 259})
    tokenizer = load_tokenizer(tmp_path, source="havenhq/mamba-chat")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)
    assert tokenizer.eos_token_ids == {256, 258, 259}
    text = render_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    assert text == f"<|user|>\nHi{END}\n<|assistant|>\n"
    assert tokenizer.encode(text).count(256) == 1


def test_the_template_of_a_mamba_chat_comes_from_its_folder_if_there(tmp_path):
    put(tmp_path, byte_tokenizer(END), tokenizer_config={"chat_template": "own"})
    tokenizer = load_tokenizer(tmp_path, source="havenhq/mamba-chat")
    assert tokenizer.chat_template == "own"
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("empty", [False, True], ids=["without", "with-an-empty-template"])
def test_a_saved_mamba_chat_keeps_its_template_under_another_name(tmp_path, empty):
    first, second = tmp_path / "mamba-chat", tmp_path / "copy"
    first.mkdir()
    second.mkdir()
    put(first, byte_tokenizer(END))
    if empty:
        (first / "chat_template.jinja").touch()
    files = load_tokenizer(first).files
    assert len({file.name for file in files}) == len(files) == 2
    for file in files:
        (second / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer(second).chat_template == named_template("zephyr")


def test_a_mamba_chat_without_its_tokenizer(tmp_path, offline):
    with pytest.raises(QuambaError, match=rf"put the tokenizer.json of {CHAT_TOKENIZER} into '{tmp_path}'"):
        load_tokenizer(tmp_path, source="ut-enyac/quamba-chat-w4a8")


def test_special_tokens_as_text(tmp_path):
    side = {"tokenizer_config": {"bos_token": "<turn>", "eos_token": "<end>"}}
    tokenizer = load_tokenizer(put(tmp_path, byte_tokenizer(*SPECIAL), **side))
    assert (tokenizer.bos_token_id, tokenizer.bos_token) == (259, "<turn>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", PAD)
    put(tmp_path, byte_tokenizer(), tokenizer_config={})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, None, None)


def test_the_demo_tokenizer():
    if not (DEMO_MODEL / "tokenizer.json").is_file():
        pytest.skip("assets/models/mamba-demo is not in this checkout")
    tokenizer = load_tokenizer(DEMO_MODEL)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (4096, 0, 1)
    text = "It is a truth universally acknowledged, that a single man...\n"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text
