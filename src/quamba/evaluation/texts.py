"""Evaluation texts, by name or from a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quamba.calibration.reading import (
    DEFAULT_DATASET,
    DEFAULT_DATASET_FILE,
    JSONL_SUFFIXES,
    TEXT_SUFFIX,
    first_line,
    hub_file,
    import_datasets,
    no_such_path,
    read_jsonl,
    read_text,
)
from quamba.errors import QuambaError, nearest

# c4 and pile are long: the published figures score the start of the joined first documents.
_FIRST_DOCUMENTS = 1100
_FIRST_TOKENS = 256 * 2048


@dataclass(frozen=True)
class EvalText:
    """A text to score. max_tokens: only so many of its first tokens are meant, or None for all of it."""

    name: str
    text: str
    source: str
    max_tokens: int | None = None


def load_text(name_or_path: str | Path) -> EvalText:
    """A local file (.txt whole; .jsonl, .jsonl.zst, .jsonl.gz: texts joined by two newlines), or a name.

    wikitext2  WikiText-2 raw, test split, lines joined by two newlines
    ptb        Penn Treebank, validation split, sentences joined by two newlines
    c4         the first 1,100 validation documents joined by a space, of which the first 524,288 tokens
    pile       the same of the Pile's validation file
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return EvalText(path.name, _read_local(path), str(path))
    name = str(name_or_path)
    if name in _NAMED:
        return _NAMED[name]()
    if path.is_dir():
        raise QuambaError(
            f"The evaluation text '{name_or_path}' is a folder, expected a .txt or .jsonl file of it."
        )
    if path.parent != Path(".") or path.suffix:
        raise no_such_path(path, "a .txt or .jsonl file, or one of " + ", ".join(_NAMED))
    listed = ", ".join(repr(n) for n in _NAMED)
    raise QuambaError(
        f"The evaluation text {name!r} is neither a file nor one of {listed}.{nearest(name, _NAMED)}"
    )


def _read_local(path: Path) -> str:
    if path.suffix.lower() == TEXT_SUFFIX:
        return read_text(path)
    if path.name.lower().endswith(JSONL_SUFFIXES):
        return "\n\n".join(read_jsonl(path))
    raise QuambaError(f"{path} is no evaluation text: expected a .txt, .jsonl, .jsonl.zst or .jsonl.gz file.")


def _wikitext2() -> EvalText:
    repository, config = "Salesforce/wikitext", "wikitext-2-raw-v1"
    datasets = import_datasets("The evaluation text 'wikitext2'")
    try:
        lines = datasets.load_dataset(repository, config, split="test")["text"]
    except Exception as error:  # the errors of the library and of its network client
        raise _unavailable("wikitext2", repository, error) from error
    return EvalText("wikitext2", "\n\n".join(lines), f"{repository}/{config} test")


def _ptb() -> EvalText:
    # The repository holds a loading script, which the library no longer runs; the hub keeps a converted copy.
    repository = "ptb-text-only/ptb_text_only"
    datasets = import_datasets("The evaluation text 'ptb'")
    try:
        sentences = datasets.load_dataset(
            repository,
            data_files={"validation": "penn_treebank/validation/*.parquet"},
            revision="refs/convert/parquet",
            split="validation",
        )["sentence"]
    except Exception as error:  # the errors of the library and of its network client
        raise _unavailable("ptb", repository, error) from error
    return EvalText("ptb", "\n\n".join(sentences), f"{repository} validation")


def _c4() -> EvalText:
    return _first_documents("c4", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz")


def _pile() -> EvalText:
    return _first_documents("pile", DEFAULT_DATASET, DEFAULT_DATASET_FILE)


def _first_documents(name: str, repository: str, filename: str) -> EvalText:
    texts = itertools.islice(read_jsonl(hub_file(repository, filename)), _FIRST_DOCUMENTS)
    return EvalText(name, " ".join(texts), f"{repository}/{filename}", _FIRST_TOKENS)


def _unavailable(name: str, repository: str, error: BaseException) -> QuambaError:
    return QuambaError(
        f"The evaluation text '{name}' (hub dataset {repository}) is not in the cache and cannot be "
        f"downloaded ({first_line(error)}); give a local .txt or .jsonl file instead."
    )


_NAMED: dict[str, Callable[[], EvalText]] = {
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "c4": _c4,
    "pile": _pile,
}
