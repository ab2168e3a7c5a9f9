"""The tokenizer of a checkpoint, from its tokenizer.json or SentencePiece model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quamba.checkpoints.chat_template import named_template_file, read_chat_template
from quamba.checkpoints.sentencepiece_tokenizer import PUBLISHED_8B_FILE, SentencePieceBackend
from quamba.checkpoints.source import read_json
from quamba.errors import QuambaError
from quamba.models.config import ModelConfig

if TYPE_CHECKING:
    import tokenizers

#: The tokenizer of the published state-spaces models, which do not carry it.
FAMILY_TOKENIZER = "EleutherAI/gpt-neox-20b"
#: The chat model, whose quantized copies do not carry its tokenizer.
CHAT_TOKENIZER = "havenhq/mamba-chat"
_CHAT_NAMES = ("mamba-chat", "quamba-chat")
#: The ids of both, and the rows of the widest table padded for them (to a multiple of 256).
_FAMILY_VOCAB_SIZE, _FAMILY_MAX_ROWS = 50277, 50432

_TOKENIZER_FILE = "tokenizer.json"
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_END_OF_TEXT = "<|endoftext|>"


#: Ids before a text that decide whether it begins with a space; more than one, as some have no text.
_CONTEXT_IDS = 4


class Tokenizer:
    """Text to token ids and back, as ``tokenizer.json`` or the SentencePiece model says.

    BOS and EOS are added only where the post-processor of a ``tokenizer.json`` adds them. Truncation and
    padding that a file may have switched on are switched off: texts come back whole.

    eos_token_id   the first end-of-text id, or None
    eos_token_ids  every id that ends a generation
    pad_token_id   the padding id, the end-of-text id if there is none, or None
    bos_token_id   the id of the token that chat templates know as ``bos_token``, or None
    chat_template  Jinja text (``chat_template.py`` renders it), or None
    files          the files to copy when the model is saved, that of the vocabulary first
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | SentencePieceBackend,
        files: Iterable[Path],
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.files = tuple(files)
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else None
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_token(self) -> str | None:
        return self._text_of(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        return self._text_of(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        return self._text_of(self.pad_token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens False leaves out what the file's post-processor would add (a rendered chat)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Each text on its own; no padding."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that continue ``context``, with the space that some decoders drop at its start."""
        before = self.context(context)
        return self.decode([*before, *ids])[len(self.decode(before)) :] if before else self.decode(ids)

    def context(self, ids: Sequence[int]) -> list[int]:
        """The last of the ids before a text, as many as its decoding depends on; none for most tokenizers."""
        return list(ids[-_CONTEXT_IDS:]) if self._drops_first_space else []

    @functools.cached_property
    def _drops_first_space(self) -> bool:
        ids = self.encode("a b", add_special_tokens=False)
        return len(ids) > 1 and self.decode(ids) == "a b" and not self.decode(ids[1:]).startswith(" ")

    def fingerprint(self) -> str:
        """sha256 of the file of the vocabulary, in hex."""
        return hashlib.sha256(self.files[0].read_bytes()).hexdigest()

    def _text_of(self, index: int | None) -> str | None:
        return None if index is None else self.backend.id_to_token(index)


def load_tokenizer(folder: str | Path, config: ModelConfig | None = None, source: str = "") -> Tokenizer:
    """The tokenizer in a checkpoint folder, else the one of the state-spaces models or of mamba-chat.

    config  the model's, to check that every id has a row in the embedding
    source  what the user asked for, for messages and to know a mamba-chat; the folder if empty

    The 8B's SentencePiece model comes first, then tokenizer.json, then any other SentencePiece model.

    End-of-text ids of a tokenizer.json come from tokenizer_config.json or special_tokens_map.json, those of
    a SentencePiece model from itself; generation_config.json adds to both. Without any, config.json has
    them, else it is ``<|endoftext|>``, which a mamba-chat has first in any case. The padding id comes from
    the same files or the model itself, else it is ``<|padding|>``, else end-of-text.
    A mamba-chat without a chat template gets the built-in ``zephyr``.
    """
    folder = Path(folder)
    source = source or str(folder)
    is_chat = any(name in place for name in _CHAT_NAMES for place in _last_names(source, folder))
    file = _vocabulary_file(folder, config, source, CHAT_TOKENIZER if is_chat else FAMILY_TOKENIZER)
    backend = SentencePieceBackend(file) if file.suffix == ".model" else _backend(file)
    files = [file, *(folder / name for name in _SIDE_FILES if (folder / name).is_file())]
    template = read_chat_template(folder)
    if template is None and is_chat:
        files = [path for path in files if path.name != "chat_template.jinja"]
        files.append(named_template_file("zephyr"))
        template = files[-1].read_text(encoding="utf-8")
    bos, eos, pad = _special_ids(backend, folder, is_chat)
    tokenizer = Tokenizer(backend, files, eos, _first(pad), _first(bos), template)
    if config is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise QuambaError(
            f"The tokenizer of '{source}' has {tokenizer.vocab_size} ids, expected at most the "
            f"{config.padded_vocab_size} rows of the model's embedding."
        )
    return tokenizer


def _vocabulary_file(folder: Path, config: ModelConfig | None, source: str, borrowed: str) -> Path:
    for name in (PUBLISHED_8B_FILE, _TOKENIZER_FILE):
        if (folder / name).is_file():
            return folder / name
    models = sorted(path for path in folder.glob("*.model") if path.is_file())
    if len(models) > 1:
        names = ", ".join(path.name for path in models)
        raise QuambaError(
            f"'{source}' has no {_TOKENIZER_FILE} but {len(models)} SentencePiece models ({names}), "
            "expected one of them only."
        )
    return models[0] if models else _borrowed_file(borrowed, folder, config, source)


def _special_ids(
    backend: tokenizers.Tokenizer | SentencePieceBackend, folder: Path, is_chat: bool
) -> tuple[list[int], list[int], list[int]]:
    """The ids that begin a text, end one and pad one; of the first and the last, the first id counts."""
    side = {name: read_json(folder / name) for name in _SIDE_FILES if _is_json(folder / name)}
    if isinstance(backend, SentencePieceBackend):
        bos, eos, pad = backend.bos, backend.eos, backend.pad
    else:
        named = [side.get("tokenizer_config.json", {}), side.get("special_tokens_map.json", {})]
        bos, eos, pad = (_first_token(backend, named, key) for key in ("bos_token", "eos_token", "pad_token"))
    if is_chat and (end := _token(backend, _END_OF_TEXT)):
        eos, pad = end + eos, end
    eos = eos + _ids(side.get("generation_config.json", {}))
    if not eos and _is_json(folder / "config.json"):
        eos = _ids(read_json(folder / "config.json"))
    eos = list(dict.fromkeys(eos or _token(backend, _END_OF_TEXT)))
    return bos, eos, pad or _token(backend, "<|padding|>")


def _backend(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise QuambaError(f"'{file}' is no tokenizer file of the tokenizers library ({error}).") from error


def _borrowed_file(repo_id: str, folder: Path, config: ModelConfig | None, source: str) -> Path:
    rows = _FAMILY_VOCAB_SIZE if config is None else config.padded_vocab_size
    if not _FAMILY_VOCAB_SIZE <= rows <= _FAMILY_MAX_ROWS:
        raise QuambaError(
            f"'{source}' has no {_TOKENIZER_FILE}, and its {rows} embedding rows are not those of {repo_id}; "
            f"put the model's {_TOKENIZER_FILE} or SentencePiece file (*.model) into '{folder}'."
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, _TOKENIZER_FILE)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repo_id, _TOKENIZER_FILE))
    except Exception as error:  # the hub client lets errors of its HTTP library through, by version
        raise QuambaError(
            f"'{source}' has no {_TOKENIZER_FILE} and that of {repo_id} is neither in the hub cache "
            f"nor could it be downloaded; put the {_TOKENIZER_FILE} of {repo_id} into '{folder}'."
        ) from error


def _last_names(source: str, folder: Path) -> tuple[str, str]:
    """What the model is called: not the folders above it, nor the revision that a hub cache names it by."""
    return Path(source).name.lower(), folder.resolve().name.lower()


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _is_json(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def _token(backend: tokenizers.Tokenizer | SentencePieceBackend, content: str) -> list[int]:
    index = backend.token_to_id(content)
    return [] if index is None else [index]


def _first_token(backend: tokenizers.Tokenizer, named: list[dict[str, Any]], key: str) -> list[int]:
    """The id of a special token by the first file that names one in the vocabulary, as a list of 0 or 1."""
    for fields in named:
        value = fields.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and (found := _token(backend, content)):
            return found
    return []


def _ids(fields: dict[str, Any]) -> list[int]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
