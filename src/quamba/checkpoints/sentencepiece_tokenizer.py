"""A SentencePiece model behind the interface of the tokenizers library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quamba.errors import QuambaError, missing_extra

#: The tokenizer of the published Mamba2 8B, which lies in the folder of the model.
PUBLISHED_8B_FILE = "mt_nlg_plus_multilingual_ja_zh_the_stack_frac_015_256k.model"


@dataclass(frozen=True)
class Encoding:
    ids: list[int]


class SentencePieceBackend:
    """What ``Tokenizer`` uses of ``tokenizers.Tokenizer``, for a SentencePiece ``.model`` file.

    BOS and EOS are never added, and their names in a text are text. Ids without a piece decode to nothing.

    bos, eos, pad  the model's id for it, in a list, or an empty list
    raises         QuambaError for a file that is no SentencePiece model, or without the sentencepiece package
    """

    def __init__(self, file: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise missing_extra("sentencepiece", "sentencepiece", f"Reading '{file}'") from error
        try:
            self._model = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, ValueError) as error:
            raise QuambaError(f"'{file}' is no SentencePiece model, or not all of it ({error}).") from error
        self._size = self._model.get_piece_size()
        self.bos, self.eos, self.pad = (
            [index] if index >= 0 else []
            for index in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )

    def no_truncation(self) -> None:
        """A SentencePiece model never truncates."""

    def no_padding(self) -> None:
        """A SentencePiece model never pads."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        pieces = self._model.id_to_piece(list(range(self._size)))
        return {piece: index for index, piece in enumerate(pieces)}

    def token_to_id(self, token: str) -> int | None:
        index = self._model.piece_to_id(token)  # that of <unk> for what is no piece
        return index if self._model.id_to_piece(index) == token else None

    def id_to_token(self, index: int) -> str | None:
        return self._model.id_to_piece(index) if 0 <= index < self._size else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        return Encoding(self._model.encode(text, add_bos=False, add_eos=False))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Encoding]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [index for index in ids if 0 <= index < self._size]
        plain = [index for index in known if not self._model.is_control(index)]
        if skip_special_tokens or len(plain) == len(known):
            return self._model.decode(plain)
        return self._decode_with_control(known)

    def _decode_with_control(self, ids: Sequence[int]) -> str:
        """Control pieces by their names, which SentencePiece itself drops."""
        out, run = "", list[int]()
        for index in ids:
            if self._model.is_control(index):
                out += self._decode_after(out, run) + self._model.id_to_piece(index)
                run = []
            else:
                run.append(index)
        return out + self._decode_after(out, run)

    def _decode_after(self, before: str, run: list[int]) -> str:
        """The text of ids; it loses its leading space only if nothing is before it."""
        if not before:
            return self._model.decode(run)
        anchor = [self._model.unk_id()]  # every model has this one
        return self._model.decode(anchor + run)[len(self._model.decode(anchor)) :]
