"""The tokenizer of a checkpoint, from its tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quamba.checkpoints.source import read_json
from quamba.errors import QuambaError
from quamba.models.config import ModelConfig

if TYPE_CHECKING:
    import tokenizers

#: The tokenizer of the published state-spaces models, which do not carry it.
FAMILY_TOKENIZER = "EleutherAI/gpt-neox-20b"
#: Its ids, and the rows of the widest table padded for it (to a multiple of 256).
_FAMILY_VOCAB_SIZE, _FAMILY_MAX_ROWS = 50277, 50432

_TOKENIZER_FILE = "tokenizer.json"
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer:
    """Text to token ids and back, as ``tokenizer.json`` says.

    BOS and EOS are added only where the file's own post-processor adds them. Truncation and padding
    that a file may have switched on are switched off: texts come back whole.

    eos_token_id   the first end-of-text id, or None
    eos_token_ids  every id that ends a generation
    pad_token_id   the padding id, the end-of-text id if there is none, or None
    files          the files to copy when the model is saved, ``tokenizer.json`` first
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        files: Iterable[Path],
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.files = tuple(files)
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else None
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text on its own; no padding."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=True)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def fingerprint(self) -> str:
        """sha256 of ``tokenizer.json``, in hex."""
        return hashlib.sha256(self.files[0].read_bytes()).hexdigest()


def load_tokenizer(folder: str | Path, config: ModelConfig | None = None, source: str = "") -> Tokenizer:
    """The tokenizer in a checkpoint folder, else the one of the state-spaces models.

    config  the model's, to check that every id has a row in the embedding
    source  what the user asked for, for messages; the folder if empty

    End-of-text ids come from tokenizer_config.json or special_tokens_map.json, then
    generation_config.json (these add up), else config.json, else ``<|endoftext|>``. The padding id
    comes from tokenizer_config.json or special_tokens_map.json, else ``<|padding|>``, else end-of-text.
    """
    folder = Path(folder)
    source = source or str(folder)
    file = folder / _TOKENIZER_FILE
    if not file.is_file():
        file = _family_file(folder, config, source)
    backend = _backend(file)
    side = {name: read_json(folder / name) for name in _SIDE_FILES if _is_json(folder / name)}
    files = [file, *(folder / name for name in _SIDE_FILES if (folder / name).is_file())]
    named = [side.get("tokenizer_config.json", {}), side.get("special_tokens_map.json", {})]
    eos = _first_token(backend, named, "eos_token") + _ids(side.get("generation_config.json", {}))
    if not eos and _is_json(folder / "config.json"):
        eos = _ids(read_json(folder / "config.json"))
    if not eos:
        eos = _token(backend, "<|endoftext|>")
    pad = _first_token(backend, named, "pad_token") or _token(backend, "<|padding|>")
    tokenizer = Tokenizer(backend, files, list(dict.fromkeys(eos)), pad[0] if pad else None)
    if config is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise QuambaError(
            f"The tokenizer of '{source}' has {tokenizer.vocab_size} ids, expected at most the "
            f"{config.padded_vocab_size} rows of the model's embedding."
        )
    return tokenizer


def _backend(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for a file that it cannot read
        raise QuambaError(f"'{file}' is no tokenizer file of the tokenizers library ({error}).") from error


def _family_file(folder: Path, config: ModelConfig | None, source: str) -> Path:
    rows = _FAMILY_VOCAB_SIZE if config is None else config.padded_vocab_size
    if not _FAMILY_VOCAB_SIZE <= rows <= _FAMILY_MAX_ROWS:
        raise QuambaError(
            f"'{source}' has no {_TOKENIZER_FILE}, and its {rows} embedding rows are not those of "
            f"{FAMILY_TOKENIZER}; put the model's {_TOKENIZER_FILE} into '{folder}'."
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(FAMILY_TOKENIZER, _TOKENIZER_FILE)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(FAMILY_TOKENIZER, _TOKENIZER_FILE))
    except (
        Exception
    ) as error:  # the hub client lets errors of its HTTP library through, which differs by version
        raise QuambaError(
            f"'{source}' has no {_TOKENIZER_FILE} and that of {FAMILY_TOKENIZER} is neither in the hub cache "
            f"nor could it be downloaded; put the {_TOKENIZER_FILE} of {FAMILY_TOKENIZER} into '{folder}'."
        ) from error


def _is_json(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def _token(backend: tokenizers.Tokenizer, content: str) -> list[int]:
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
