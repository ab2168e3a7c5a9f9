"""The tensors of all ranks, read from mappings that are given back as they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.checkpoints.megatron.layout import Split, upstream_name
from quamba.checkpoints.megatron.locate import missing_rank
from quamba.checkpoints.megatron.unpickle import RankContent, read_rank
from quamba.errors import QuambaError

#: Pages of a file that were read stay in this process until the file is unmapped: after so many bytes.
MAPPED_BYTES = 512 * 2**20
#: Rows are given in blocks of at most so many bytes.
BLOCK_BYTES = 64 * 2**20


class Ranks:
    """The files of the ranks of one checkpoint.

    files      in the order of the ranks
    arguments  of the training run, as the first file has them
    iteration  or None
    shapes     of the first rank's tensors, by name in the state-spaces format
    dtypes     likewise
    names      the same names to those in the files

    Raises QuambaError where the files are not the ranks of one checkpoint: other iterations, names, shapes or
    dtypes, or fewer files than there were ranks.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._open: dict[int, RankContent] = {}
        self._used = 0
        first = self._content(0)
        self.arguments: Mapping[str, Any] = first.arguments
        self.iteration = first.iteration
        self.names = _names(first.tensors, self.files[0])
        self.shapes = {name: tuple(first.tensors[own].shape) for name, own in self.names.items()}
        self.dtypes = {name: first.tensors[own].dtype for name, own in self.names.items()}
        self._check_count()
        for rank in range(1, len(self.files)):
            self._check_alike(rank)

    def __len__(self) -> int:
        return len(self.files)

    def blocks(self, name: str, split: Split | None) -> Iterator[Tensor]:
        """The whole tensor from its first row to its last."""
        if split is None:
            yield self._same(name)
        elif split.dim == 0:
            yield from self._rows_of_parts(name, split)
        else:
            for start, stop in _steps(0, self.shapes[name][0], len(self) * self._row_bytes(name)):
                pieces = [self._rows(rank, name, start, stop) for rank in range(len(self))]
                yield torch.cat(pieces, split.dim) if len(pieces) > 1 else pieces[0]

    def _rows_of_parts(self, name: str, split: Split) -> Iterator[Tensor]:
        first = 0
        for part in split.parts:
            share = part // len(self)
            for rank in range(len(self)):
                for start, stop in _steps(first, first + share, self._row_bytes(name)):
                    yield self._rows(rank, name, start, stop)
            first += share

    def _same(self, name: str) -> Tensor:
        """A tensor that every rank has."""
        whole = self._rows(0, name)
        for rank in range(1, len(self)):
            if not torch.equal(self._rows(rank, name), whole):
                raise QuambaError(
                    f"'{self.names[name]}' differs between '{self.files[0]}' and '{self.files[rank]}', "
                    "expected the ranks of one checkpoint, which have it in common."
                )
        return whole

    def _row_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name][1:]) * self.dtypes[name].itemsize

    def _rows(self, rank: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self._content(rank).tensors[self.names[name]][start:stop]
        self._used += rows.nbytes
        return rows

    def _content(self, rank: int) -> RankContent:
        if self._used > MAPPED_BYTES:
            self._open.clear()
            self._used = 0
        if rank not in self._open:
            self._open[rank] = read_rank(self.files[rank])
        return self._open[rank]

    def _check_count(self) -> None:
        """Refuse stages of a pipeline, and fewer files than ranks."""
        # A checkpoint that was merged may still say how it was trained: then its tensors are whole.
        stages = self.arguments.get("pipeline_model_parallel_size") or 1
        if stages != 1 and not {"backbone.embedding.weight", "backbone.norm_f.weight"} <= self.shapes.keys():
            raise QuambaError(
                f"'{self.files[0]}' is one of {stages} pipeline stages, expected a checkpoint saved with "
                "pipeline size 1."
            )
        count = self.arguments.get("tensor_model_parallel_size") or len(self.files)
        rows = self.shapes.get("backbone.embedding.weight", (0,))[0] * len(self.files)
        if count == len(self.files) or rows == self.arguments.get("padded_vocab_size"):
            return
        if isinstance(count, int) and count > len(self.files):
            folder = self.files[0].parent.parent
            raise missing_rank(folder / f"mp_rank_{len(self.files):02d}" / self.files[0].name, count)
        raise QuambaError(
            f"'{self.files[0]}' was saved by {count} tensor-parallel ranks, expected {len(self.files)}: "
            "there are so many files."
        )

    def _check_alike(self, rank: int) -> None:
        content = self._content(rank)
        if content.iteration != self.iteration:
            raise QuambaError(
                f"'{self.files[rank]}' is of iteration {content.iteration}, but '{self.files[0]}' of "
                f"{self.iteration}, expected the ranks of one checkpoint."
            )
        names = _names(content.tensors, self.files[rank])
        for name in sorted(names.keys() | self.names.keys()):
            own = content.tensors.get(names.get(name, ""))
            if own is None or names.get(name) != self.names.get(name):
                raise QuambaError(f"'{name}' is in some ranks of '{self.files[rank].parent.parent}' only.")
            if (tuple(own.shape), own.dtype) != (self.shapes[name], self.dtypes[name]):
                raise QuambaError(
                    f"'{names[name]}' is {list(own.shape)} {own.dtype} in '{self.files[rank]}' and "
                    f"{list(self.shapes[name])} {self.dtypes[name]} in the first rank, expected equal shares."
                )


def _names(tensors: Mapping[str, Tensor], file: Path) -> dict[str, str]:
    """Names in the state-spaces format to those of the file."""
    names: dict[str, str] = {}
    for own in tensors:
        name = upstream_name(own)
        if name in names:
            raise QuambaError(f"'{file}' holds '{names[name]}' and '{own}', which are the same tensor.")
        names[name] = own
    return names


def _steps(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for at in range(start, stop, step):
        yield at, min(at + step, stop)
