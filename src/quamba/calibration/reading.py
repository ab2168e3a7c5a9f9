"""Text documents from local files, folders and the hub."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quamba.errors import QuambaError, missing_extra, nearest

DEFAULT_DATASET = "monology/pile-uncopyrighted"
DEFAULT_DATASET_FILE = "val.jsonl.zst"
TEXT_SUFFIX = ".txt"
JSONL_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
# A hub dataset can be larger than a disk, so only its first documents are streamed, then shuffled.
STREAMED_DOCUMENTS = 20_000

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_EXPECTED = "a .txt, .jsonl, .jsonl.zst or .jsonl.gz file, a folder of those, or a hub dataset OWNER/NAME"


def resolve_source(data: str | Path | None) -> Path | str:
    """An existing path, or the name of a hub dataset."""
    if data is None or str(data) in ("pile", DEFAULT_DATASET):
        return DEFAULT_DATASET
    path = Path(data).expanduser()
    if path.exists():
        return path
    name = str(data)
    looks_local = (
        path.parent.is_dir() or name.startswith(".") or name.endswith((TEXT_SUFFIX, *JSONL_SUFFIXES))
    )
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise no_such_path(path)
    return name


def source_name(source: Path | str) -> str:
    """The source as reports and messages name it."""
    return f"{source} ({DEFAULT_DATASET_FILE})" if source == DEFAULT_DATASET else str(source)


def iter_documents(source: Path | str) -> Iterator[str]:
    """The documents of a local file, a folder, or a hub dataset, in their stored order.

    A .txt file is one document; a .jsonl line is one (field "text"); a folder is either one written by
    ``datasets.save_to_disk`` or gives the documents of its .txt and .jsonl files, by name.
    """
    if isinstance(source, str):
        yield from _iter_hub(source)
    elif source.is_dir():
        yield from _iter_folder(source)
    elif source.suffix.lower() == TEXT_SUFFIX:
        yield read_text(source)
    elif source.name.lower().endswith(JSONL_SUFFIXES):
        yield from read_jsonl(source)
    elif not source.exists():
        raise no_such_path(source)
    else:
        raise QuambaError(f"{source} is no text file that Quamba reads; expected {_EXPECTED}.")


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file, line ends as they are."""
    if not path.is_file():
        raise no_such_path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuambaError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise QuambaError(f"{path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise QuambaError(f"{path} is empty.")
    return text


def read_jsonl(path: Path) -> Iterator[str]:
    """The field "text" of every line of a .jsonl, .jsonl.zst or .gz file; blank lines are passed over."""
    if not path.is_file():
        raise no_such_path(path)
    number = 0
    found = False
    try:
        with path.open("rb") as file, _decompressed(path, file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    found = True
                    yield _text_of_line(line, f"Line {number} of {path}")
    except (OSError, EOFError, zlib.error) as error:
        raise QuambaError(f"{path} cannot be read after line {number}: {error}.") from error
    if not found:
        raise QuambaError(f"{path} is empty.")


def _text_of_line(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise QuambaError(f"{where} is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise QuambaError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise QuambaError(f'{where} is not a JSON object, expected one with the field "text".')
    if not isinstance(row.get("text"), str):
        raise QuambaError(f'{where} has no string field "text"; its fields are {sorted(row)}.')
    return row["text"]


def _decompressed(path: Path, file: BinaryIO) -> Any:
    """A context manager over the lines (bytes) of a plain, zstandard or gzip file."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix != ".zst":
        return file
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("zstandard", "data", f"Reading {path.name}") from error

    class Reader(io.RawIOBase):
        """zstandard's own error is no OSError, which is what a damaged file is for the caller."""

        def __init__(self) -> None:
            # The published files are many frames in a row.
            self._stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self._stream.readinto(buffer)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error

    return io.BufferedReader(Reader(), buffer_size=1 << 20)


def _iter_folder(folder: Path) -> Iterator[str]:
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        yield from _iter_saved_dataset(folder)
        return
    files = sorted(f for f in folder.iterdir() if f.name.lower().endswith((TEXT_SUFFIX, *JSONL_SUFFIXES)))
    if not files:
        raise QuambaError(f"The folder {folder} has no .txt, .jsonl, .jsonl.zst or .jsonl.gz file in it.")
    for file in files:
        yield from iter_documents(file)


def _iter_saved_dataset(folder: Path) -> Iterator[str]:
    datasets = import_datasets(f"Reading the dataset folder {folder}")
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, dict):
        data = data["train"] if "train" in data else next(iter(data.values()))
    yield from _text_column(data, str(folder))


def _iter_hub(name: str) -> Iterator[str]:
    if name == DEFAULT_DATASET:
        yield from read_jsonl(hub_file(DEFAULT_DATASET, DEFAULT_DATASET_FILE))
        return
    datasets = import_datasets(f"Calibrating on the hub dataset {name}")
    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        data = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        yield from _text_column(data.take(STREAMED_DOCUMENTS), name)
    except QuambaError:
        raise
    except Exception as error:  # the library raises a dozen kinds, those of its network client included
        raise QuambaError(
            f"The hub dataset {name} cannot be read ({first_line(error)}); expected {_EXPECTED}."
        ) from error


def _text_column(rows: Iterable[dict[str, Any]], name: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise QuambaError(f'The dataset {name} has no text column "text"; its columns are {sorted(row)}.')
        yield row["text"]


def hub_file(repository: str, filename: str) -> Path:
    """A file of a hub dataset, from the local cache or downloaded."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except Exception as error:  # the errors of the hub client and of its network client, which changes
        raise QuambaError(
            f"'{filename}' of the hub dataset {repository} is not in the cache and cannot be downloaded "
            f"({first_line(error)}); give a local .txt, .jsonl or .jsonl.zst file instead."
        ) from error


def import_datasets(purpose: str) -> Any:
    """The ``datasets`` library, or the sentence that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data", purpose) from error
    return datasets


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def no_such_path(path: Path, expected: str = _EXPECTED) -> QuambaError:
    """The error for a path that does not exist, with the nearest name in its folder."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return QuambaError(f"There is no '{path}'; expected {expected}.{nearest(path.name, siblings)}")
