"""The text that candidates are scored on: not what weights were fitted to, and as long as texts are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from quamba.calibration.data import CalibrationSet, CalibrationSpec
from quamba.calibration.overlap import SPAN, STRIDE, tokens_overlap
from quamba.errors import QuambaError

#: Tokens of a sequence, unless said otherwise: 256 ranked blocks of Mamba1 otherwise than 1,024 did, and than
#: held-out text of 1,024 (docs/mixed-precision.md).
OBJECTIVE_SEQLEN = 1024
#: Calibration samples of fewer tokens could hide in a sequence.
_LEAST = SPAN + STRIDE

Read = Callable[[CalibrationSpec], CalibrationSet]


def objective_seqlen(asked: int | None, texts: CalibrationSpec) -> int:
    """Tokens of a sequence that candidates are scored on; QuambaError where those cannot be told apart."""
    if asked is None:
        return max(OBJECTIVE_SEQLEN, texts.seqlen) if texts.seqlen >= _LEAST else texts.seqlen
    if asked != texts.seqlen and texts.seqlen < _LEAST:
        raise QuambaError(
            f"--objective_seqlen is {asked} and --calib_seqlen is {texts.seqlen}, expected the same length"
            f" where calibration samples are shorter than {_LEAST} tokens."
        )
    return asked


def objective_sequences(
    read: Read, texts: CalibrationSpec, calibration: CalibrationSet, num: int, seqlen: int
) -> list[Tensor]:
    """So many ids (L,) int64 of ``texts``' data, L at most ``seqlen``, without passages of ``calibration``.

    read  draws samples by a spec; ``calibration`` is what it draws by ``texts``
    Deterministic by the seed in ``texts``. Raises QuambaError where the data has too little text.
    """
    if seqlen == texts.seqlen:  # further samples of the same draw
        return read(dataclasses.replace(texts, num=texts.num + num)).sequences[texts.num :]
    drawn = 2 * num
    while True:
        try:
            found = read(dataclasses.replace(texts, num=drawn, seqlen=seqlen)).sequences
        except QuambaError as error:
            raise QuambaError(
                f"There are not {num} samples of {seqlen} tokens besides the calibration text ({error})"
                f" Expected a smaller --objective_num, or --objective_seqlen {texts.seqlen}."
            ) from None
        free = [sequence for sequence in found if not tokens_overlap(calibration, sequence)]
        if len(free) >= num:
            return free[:num]
        drawn *= 2
