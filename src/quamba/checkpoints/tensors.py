"""The weight files of a checkpoint folder: safetensors or PyTorch pickles, one file or shards."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quamba.checkpoints.source import read_json
from quamba.errors import QuambaError, nearest

MAX_SHARD_BYTES = 5 * 10**9

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
#: In the order in which they are looked for.
WEIGHT_FILES = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _PICKLE, f"{_PICKLE}.index.json")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: Where tensors start that torch allocates. Files written here keep to it for all but odd sizes, since
#: matrix libraries are slower, and sum in another order, where memory that is mapped is not aligned.
ALIGNMENT_BYTES = 64


class TensorSource:
    """The tensors of a checkpoint by name, each read when it is asked for.

    files     the weight files, in order
    metadata  the string pairs in the safetensors headers (empty for pickles)
    values    what a pickle holds beside tensors: numbers, strings, None by name
    """

    def __init__(self, files: tuple[Path, ...], shards: Mapping[str, _Shard]) -> None:
        self.files = files
        self._shards = dict(shards)
        distinct = list({id(shard): shard for shard in self._shards.values()}.values())
        self.metadata = {key: value for shard in distinct for key, value in shard.metadata.items()}
        self.values = {key: value for shard in distinct for key, value in shard.values.items()}

    def keys(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def get(self, name: str) -> Tensor:
        """The tensor on the CPU, as stored."""
        return self._shard(name).get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Known from the file's header: no tensor is read."""
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shard(name).dtype(name)

    def size_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def _shard(self, name: str) -> _Shard:
        if name not in self._shards:
            folder = self.files[0].parent
            raise QuambaError(
                f"The weights in '{folder}' lack the tensor '{name}'.{nearest(name, self._shards)}"
            )
        return self._shards[name]


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to write that need never be whole in memory.

    blocks  gives its elements from first to last, in tensors of any shape; called once
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_tensors(folder: str | Path) -> TensorSource:
    """Open the weights of a folder: the first of ``WEIGHT_FILES`` that is there.

    Headers and indexes are checked, tensors are not read. Pickles are loaded with
    ``weights_only=True`` and mapped to memory where their format allows.
    A missing, truncated or foreign file, a pickle with code and a missing shard raise QuambaError.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            if name.endswith(".index.json"):
                return _open_index(folder / name)
            shard = _open_shard(folder / name)
            return TensorSource((folder / name,), {key: shard for key in shard.names()})
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    found = f", only {', '.join(others[:3])}" if others else ""
    raise QuambaError(
        f"'{folder}' has no weights: expected {_SAFETENSORS} or {_PICKLE} or their index{found}."
    )


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor | StreamedTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write ``model.safetensors``, or shards of at most ``max_shard_bytes`` with an index.

    A tensor larger than the limit gets a shard of its own. Returns the weight files.
    """
    shards = _split(tensors, max_shard_bytes)
    count = len(shards)
    files = [folder / _SAFETENSORS]
    if count > 1:
        files = [folder / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    header = {"format": "pt", **(metadata or {})}
    for file, names in zip(files, shards, strict=True):
        _write_safetensors(file, {name: tensors[name] for name in names}, header)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {
                name: file.name for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (folder / f"{_SAFETENSORS}.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return files


@contextmanager
def written_beside(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``folder``; rename it to ``folder`` once the block is done.

    If the block raises (Ctrl-C too), what it wrote is removed and ``folder`` is as it was. A folder
    that is there and not empty is an error before anything is written, unless ``overwrite``.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise QuambaError(f"'{folder}' is a file, expected a folder to write.")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite:
        raise QuambaError(f"'{folder}' exists and is not empty, expected a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    new, old = (folder.with_name(f".{folder.name}.{state}-{tag}") for state in ("new", "old"))
    new.mkdir()
    try:
        yield new
        _flush(new)
        if occupied:
            folder.rename(old)
        new.replace(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


class _Shard(Protocol):
    metadata: Mapping[str, str]
    values: Mapping[str, Any]

    def names(self) -> list[str]: ...
    def get(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


class _SafetensorsShard:
    values: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise QuambaError(f"{broken_file(path, 'safetensors file')} ({error}).") from None
        self.metadata: Mapping[str, str] = self._file.metadata() or {}

    def names(self) -> list[str]:
        return list(self._file.keys())

    def get(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise QuambaError(f"Tensor '{name}' in '{self.path}' cannot be read ({error}).") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._file.get_slice(name).get_dtype()
        return _DTYPES[stored] if stored in _DTYPES else self.get(name).dtype


class _PickleShard:
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        content = _unpickled(path)
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise QuambaError(f"'{path}' holds a {type(content).__name__}, expected tensors by name.")
        self._tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
        self.values: Mapping[str, Any] = {k: v for k, v in content.items() if k not in self._tensors}

    def names(self) -> list[str]:
        return list(self._tensors)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


def _open_shard(path: Path) -> _Shard:
    return _SafetensorsShard(path) if path.suffix == ".safetensors" else _PickleShard(path)


def _open_index(path: Path) -> TensorSource:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QuambaError(f"'{path}' has no 'weight_map', expected tensor names with their files.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise QuambaError(f"'{path}' names the file {file!r}, expected a file name in the same folder.")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise QuambaError(
            f"'{path.parent}' lacks {len(absent)} of the {len(names)} weight files of {path.name}: "
            f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}."
        )
    shards = {name: _open_shard(path.parent / name) for name in names}
    stored = {name: set(shard.names()) for name, shard in shards.items()}
    for key, file in weight_map.items():
        if key not in stored[file]:
            raise QuambaError(f"'{path.parent / file}' lacks the tensor '{key}' that {path.name} puts there.")
    owners = {key: shards[file] for key, file in weight_map.items()}
    for shard in shards.values():  # a tensor that the index forgot is still part of the checkpoint
        owners.update({key: shard for key in shard.names() if key not in owners})
    return TensorSource(tuple(path.parent / name for name in names), owners)


def _unpickled(path: Path) -> object:
    is_zip = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except MemoryError:
        raise
    except Exception as error:
        # A malformed pickle can raise anything: EOFError, KeyError, OSError, RuntimeError, UnpicklingError.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise QuambaError(
                f"'{path}' is refused: its pickle calls '{code[1]}', and only plain tensors are read from a "
                "pickle; save it as safetensors instead."
            ) from error
        raise QuambaError(f"{broken_file(path, 'PyTorch checkpoint')}.") from error


def broken_file(path: Path, kind: str) -> str:
    """Why a file is no ``kind`` ("safetensors file"), as the beginning of a sentence."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"'{path}' is a Git LFS pointer and not the weights; fetch them with 'git lfs pull'"
    return f"'{path}' is truncated or no {kind}"


def _split(tensors: Mapping[str, Tensor | StreamedTensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _write_safetensors(
    file: Path, tensors: Mapping[str, Tensor | StreamedTensor], metadata: Mapping[str, str]
) -> None:
    """Write the file in an order that ``ALIGNMENT_BYTES`` asks for, one tensor in memory at a time.

    The format allows no gaps, so tensors whose size is a multiple of the alignment come first: they
    all start at one. The safetensors library would sort by dtype and name, so that one scalar
    moves all that follows.
    """
    names = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT_BYTES != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT_BYTES)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            for block in tensor.blocks() if isinstance(tensor, StreamedTensor) else (tensor,):
                flat = block.detach().cpu().contiguous().reshape(-1)
                out.write(flat.view(torch.uint8).numpy().data)
        assert out.tell() == len(text) + 8 + end, f"{file.name}: a streamed tensor was not as announced"


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that the rename cannot overtake the content."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
