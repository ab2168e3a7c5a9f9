"""Text for the objective that is none of the calibration text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quamba.calibration.data import CalibrationSet, CalibrationSpec
from quamba.calibration.overlap import tokens_overlap
from quamba.errors import QuambaError
from quamba.search.texts import objective_seqlen, objective_sequences

LENGTH = 40_000


def read(spec: CalibrationSpec) -> CalibrationSet:
    """Windows of a text of random tokens, drawn as ``load_calibration`` draws them."""
    ids = torch.randint(0, 5000, (LENGTH,), generator=torch.Generator().manual_seed(0))
    windows = list(ids[: LENGTH // spec.seqlen * spec.seqlen].view(-1, spec.seqlen))
    if len(windows) < spec.num:
        raise QuambaError(f"There are {len(windows)} windows.")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    return CalibrationSet([windows[i] for i in order[: spec.num]], spec, "random", "")


def spec_of(num: int, seqlen: int) -> CalibrationSpec:
    return CalibrationSpec(data=Path("text.txt"), num=num, seqlen=seqlen)


@pytest.mark.parametrize(("num", "seqlen"), [(20, 128), (20, 256), (8, 1000)])
def test_nothing_of_the_calibration_text_is_in_it(num: int, seqlen: int) -> None:
    texts = spec_of(num, seqlen)
    calibration = read(texts)
    found = objective_sequences(read, texts, calibration, 12, 1000)
    assert len(found) == 12 and all(len(sequence) == 1000 for sequence in found)
    assert not any(tokens_overlap(calibration, sequence) for sequence in found)
    again = objective_sequences(read, texts, calibration, 12, 1000)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_of_the_same_length_they_are_the_next_of_the_draw() -> None:
    texts = spec_of(5, 128)
    found = objective_sequences(read, texts, read(texts), 3, 128)
    whole = read(spec_of(8, 128)).sequences
    assert all(torch.equal(a, b) for a, b in zip(found, whole[5:], strict=True))


def test_too_little_text_is_one_sentence() -> None:
    texts = spec_of(100, 256)  # of 156
    with pytest.raises(QuambaError, match=r"not 12 samples of 1000 .* --objective_seqlen 256\.$"):
        objective_sequences(read, texts, read(texts), 12, 1000)


def test_lengths() -> None:
    assert objective_seqlen(None, spec_of(1, 512)) == 1024
    assert objective_seqlen(None, spec_of(1, 2048)) == 2048
    assert objective_seqlen(None, spec_of(1, 16)) == 16
    assert objective_seqlen(300, spec_of(1, 512)) == 300
    assert objective_seqlen(16, spec_of(1, 16)) == 16
    with pytest.raises(QuambaError, match="expected the same length"):
        objective_seqlen(300, spec_of(1, 16))
