"""The job: a Megatron checkpoint and its tokenizer in, a folder that the float loader reads out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quamba.checkpoints.megatron.layout import Split, split_of
from quamba.checkpoints.megatron.locate import rank_files
from quamba.checkpoints.megatron.ranks import Ranks
from quamba.checkpoints.megatron.sizes import model_config, stored_shapes
from quamba.checkpoints.sentencepiece_tokenizer import SentencePieceBackend
from quamba.checkpoints.tensors import MAX_SHARD_BYTES, StreamedTensor, write_tensors, written_beside
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.checkpoints.upstream import config_to_state_spaces
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config

#: What is left for the config, the tokenizer and the file system itself.
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint that was looked at, not read.

    config      with the vocabulary of the tokenizer, padded to the rows of the embedding
    vocabulary  the SentencePiece model
    """

    ranks: Ranks
    config: Mamba2Config
    vocabulary: Path

    @property
    def size_bytes(self) -> int:
        """Of the weights to be written."""
        return sum(
            math.prod(shape) * self.ranks.dtypes[name].itemsize
            for name, shape in stored_shapes(self.config).items()
        )


def open_megatron(checkpoint: str | Path, vocabulary: str | Path) -> MegatronCheckpoint:
    """Find and check everything that can be checked without reading weights.

    checkpoint  as ``rank_files`` takes it
    vocabulary  the tokenizer's SentencePiece model
    Raises QuambaError in one sentence, as the modules of this package say; nothing of the files is run.
    """
    file = Path(vocabulary).expanduser()
    if not file.is_file():
        raise QuambaError(
            f"The vocabulary '{vocabulary}' was not found, expected a SentencePiece model (*.model)."
        )
    ranks = Ranks(rank_files(checkpoint))
    ids = Tokenizer(SentencePieceBackend(file), [file]).vocab_size
    return MegatronCheckpoint(ranks, model_config(ranks, ids), file)


def write_megatron(
    checkpoint: MegatronCheckpoint,
    folder: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    written: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the model in the state-spaces layout, its dtypes as they are, with its tokenizer.

    folder   appears complete or not at all; one that is there and not empty needs ``overwrite``
    written  told the bytes of every piece as it is written
    Tensors stream from the files to the disk: see ``ranks.MAPPED_BYTES`` for what is in memory.
    Raises QuambaError when the disk is too small, before and while writing.
    """
    config, folder = checkpoint.config, Path(folder)
    fields = config_to_state_spaces(config)
    _check_space(folder, checkpoint.size_bytes)

    def stream(name: str, split: Split | None) -> Callable[[], Iterator[Tensor]]:
        def blocks() -> Iterator[Tensor]:
            for block in checkpoint.ranks.blocks(name, split):
                written(block.nbytes)
                yield block

        return blocks

    tensors = {
        name: StreamedTensor(shape, checkpoint.ranks.dtypes[name], stream(name, split_of(name, config)))
        for name, shape in stored_shapes(config).items()
    }
    try:
        with written_beside(folder, overwrite=overwrite) as new:
            shutil.copyfile(checkpoint.vocabulary, new / _model_name(checkpoint.vocabulary))
            (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            write_tensors(new, tensors, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise QuambaError(
            f"'{folder}' could not be written ({error.strerror or error}), and nothing of it is left."
        ) from error


def _model_name(vocabulary: Path) -> str:
    """The published 8B's tokenizer keeps the name by which the published code knows it."""
    return vocabulary.name if vocabulary.suffix == ".model" else "tokenizer.model"


def _check_space(folder: Path, size_bytes: int) -> None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    need, free = size_bytes + _SPARE_BYTES, shutil.disk_usage(place).free
    if free < need:
        raise QuambaError(
            f"'{folder}' needs {need / 1e9:.1f} GB with some to spare, but '{place}' has {free / 1e9:.1f} GB."
        )
