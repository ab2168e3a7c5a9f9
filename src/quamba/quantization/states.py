"""Hidden states of the calibration set between two blocks: on the GPU, in memory, or in a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.quantization.memory import Place

_ITEM = torch.float32.itemsize


@dataclass(frozen=True)
class Shelf:
    """Where hidden states are put.

    place   "device", "memory", or "file"
    device  that they are given on
    folder  for "file"
    """

    place: Place
    device: torch.device
    folder: Path | None = None


class HiddenStates:
    """One float32 tensor (B, L, width) a batch; every shelf gives back the bits that were put there.

    In a file, only the batch that is read or written is mapped to memory.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int, shelf: Shelf, name: str) -> None:
        self.shapes = [(batch, length, width) for batch, length in shapes]
        self._shelf = shelf
        self._kept: list[Tensor | None] = [None] * len(shapes)
        self._file: Path | None = None
        sizes = [batch * length * width for batch, length, width in self.shapes]
        self._starts = [sum(sizes[:b]) for b in range(len(sizes) + 1)]
        if shelf.place == "file":
            assert shelf.folder is not None, "states in files need a folder"
            self._file = shelf.folder / f"{name}.states"
            _allocate(self._file, self._starts[-1] * _ITEM)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, b: int) -> Tensor:
        """The states of batch b on the shelf's device; not to be changed in place."""
        if self._file is not None:
            with self._mapped(b, "r") as window:
                return torch.from_numpy(np.array(window)).to(self._shelf.device)
        kept = self._kept[b]
        assert kept is not None, "nothing was put there"
        return kept.to(self._shelf.device)

    def __setitem__(self, b: int, states: Tensor) -> None:
        assert tuple(states.shape) == self.shapes[b]
        states = states.detach().to(torch.float32)
        if self._file is None:
            self._kept[b] = states if self._shelf.place == "device" else states.cpu()
            return
        with self._mapped(b, "r+") as window:
            window[...] = states.cpu().numpy()

    def pieces(self) -> Iterator[Tensor]:
        """All states in order, for ``WorkFolder.put_blob``."""
        return (self[b] for b in range(len(self)))

    def restore(self, blob: Path) -> None:
        """Take all states from what ``pieces`` gave."""
        for b, shape in enumerate(self.shapes):
            window = np.memmap(blob, np.float32, "r", self._starts[b] * _ITEM, shape)
            self[b] = torch.from_numpy(np.array(window)).to(self._shelf.device)

    def close(self) -> None:
        self._kept = []
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _mapped(self, b: int, mode: Literal["r", "r+"]) -> Iterator[np.ndarray]:
        assert self._file is not None
        window = np.memmap(self._file, np.float32, mode, self._starts[b] * _ITEM, self.shapes[b])
        try:
            yield window
        finally:
            del window


def states_bytes(shapes: Sequence[tuple[int, int]], width: int) -> int:
    return sum(batch * length for batch, length in shapes) * width * _ITEM


def _allocate(file: Path, size: int) -> None:
    """Take the bytes from the disk now: a full disk would end the process in the middle of a write."""
    with file.open("wb") as out:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), 0, max(1, size))
            out.truncate(max(1, size))
        except OSError as error:
            raise QuambaError(
                f"The work folder '{file.parent}' has no {size / 2**30:.1f} GiB for hidden states of the"
                f" calibration set ({error.strerror}); give one on a larger disk, or fewer samples."
            ) from None
