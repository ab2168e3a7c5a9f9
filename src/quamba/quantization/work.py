"""Results of the stages of a quantization on disk, so that nothing is computed twice.

A result lies under a key that says everything it depends on: whoever asks for the same thing finds it,
be it the same run after an interruption or another recipe for the same model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.errors import QuambaError

_TENSORS, _BLOB = ".safetensors", ".bin"
_OBJECTS, _SCRATCH = "objects", "scratch"


def key_of(*parts: Any, **named: Any) -> str:
    """A name for what follows from the parts alone: 64 hex digits. They are what JSON can say."""
    text = json.dumps([parts, named], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class WorkFolder:
    """A store of tensors by key.

    A result is there whole or not at all, whatever ends the process: it is written beside, brought to the
    disk and renamed. Several processes may share a folder. What is under a key never changes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise QuambaError(f"The work folder '{self.path}' is a file, expected a folder.")
        with self._writing():
            (self.path / _OBJECTS).mkdir(parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        return self._place(key, _TENSORS).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key, on the CPU and mapped from the file; None if there is nothing."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._place(key, _TENSORS), framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of any device. Raises QuambaError when the disk is full."""
        from safetensors.torch import save_file

        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(self._place(key, _TENSORS), lambda draft: save_file(found, draft))

    def has_blob(self, key: str) -> bool:
        return self._place(key, _BLOB).is_file()

    def blob(self, key: str) -> Path:
        """Where the bytes of ``put_blob`` are."""
        return self._place(key, _BLOB)

    def put_blob(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Keep the bytes of tensors one after another, one of them in memory at a time."""

        def write(draft: Path) -> None:
            with draft.open("wb") as out:
                for piece in pieces:
                    flat = piece.detach().cpu().contiguous().reshape(-1)
                    out.write(flat.view(torch.uint8).numpy().data)

        self._write(self._place(key, _BLOB), write)

    def drop(self, key: str) -> None:
        for suffix in (_TENSORS, _BLOB):
            self._place(key, suffix).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what this process alone needs; gone with the block."""
        with self._writing():
            for old in (self.path / _SCRATCH).glob("*"):  # of processes that were ended
                if not _is_running(old.name):
                    shutil.rmtree(old, ignore_errors=True)
            folder = self.path / _SCRATCH / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def clear(self) -> None:
        """Remove what this class has written, and the folder if nothing else is in it."""
        for name in (_OBJECTS, _SCRATCH):
            shutil.rmtree(self.path / name, ignore_errors=True)
        try:
            self.path.rmdir()
        except OSError:  # not ours alone
            return

    def _place(self, key: str, suffix: str) -> Path:
        return self.path / _OBJECTS / key[:2] / f"{key}{suffix}"

    def _write(self, place: Path, write: Callable[[Path], None]) -> None:
        if place.is_file():
            return
        with self._writing():
            place.parent.mkdir(parents=True, exist_ok=True)
            draft = place.with_name(f".{place.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
            try:
                write(draft)
                with draft.open("rb") as handle:
                    os.fsync(handle.fileno())
                draft.replace(place)
            finally:
                draft.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
            reason = "its disk is full" if full else str(error)
            raise QuambaError(
                f"The work folder '{self.path}' cannot be written ({reason}); give one on a larger disk, and"
                " the run goes on where it stopped if what is there is copied to it."
                if full
                else f"The work folder '{self.path}' cannot be written ({reason})."
            ) from error


def _is_running(name: str) -> bool:
    """Whether the process that a scratch folder is named after is there still."""
    pid = name.partition("-")[0]
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def file_identity(folder: Path) -> str:
    """What identifies the checkpoint in a folder: its config; names, sizes and times of its weight files."""
    weights = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin")]
    config = (folder / "config.json").read_text(encoding="utf-8")
    return key_of(config, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in weights])


def float_identity(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """What identifies a float model: its config, and the names, dtypes, shapes and bytes of its tensors."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for rows in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(rows.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
