from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quamba.calibration import reading
from quamba.calibration.data import CalibrationSpec, left_pad, load_calibration
from quamba.calibration.overlap import SPAN, STRIDE, texts_overlap, tokens_overlap
from quamba.errors import QuambaError


class ByteTokenizer:
    """A token is a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def fingerprint(self) -> str:
        return "bytes"


TOKENIZER = ByteTokenizer()


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts)


def documents(count: int, length: int = 40) -> list[str]:
    """Documents that start with their number."""
    return [f"{i:04d} ".ljust(length, "x") for i in range(count)]


def number_of(sequence: torch.Tensor) -> int:
    return int(bytes(sequence[:4].tolist()))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """100 windows of 8 tokens, each its number, and a remainder of 5."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:04d}abcd" for i in range(100)) + "12345")
    return path


def test_text_file_gives_whole_windows_without_repetition(text_file: Path) -> None:
    calibration = load_calibration(CalibrationSpec(text_file, num=100, seqlen=8), TOKENIZER)
    assert all(s.dtype == torch.int64 and bytes(s[4:].tolist()) == b"abcd" for s in calibration.sequences)
    numbers = [number_of(s) for s in calibration.sequences]
    assert sorted(numbers) == list(range(100))
    assert numbers != sorted(numbers)


def test_the_seed_alone_decides_what_is_drawn(text_file: Path) -> None:
    def drawn(seed: int, num: int = 10) -> list[int]:
        found = load_calibration(CalibrationSpec(text_file, num=num, seqlen=8, seed=seed), TOKENIZER)
        return [number_of(s) for s in found.sequences]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, num=20)[:10] == drawn(1), "fewer samples are the first of more"


def test_draws_of_the_default_seed_never_change(text_file: Path) -> None:
    """Other numbers here would change every calibration ever made."""
    found = load_calibration(CalibrationSpec(text_file, num=5, seqlen=8), TOKENIZER)
    assert [number_of(s) for s in found.sequences] == [38, 2, 18, 36, 10]


def test_documents_are_shuffled_over_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text(jsonl(documents(2000)))
    found = load_calibration(CalibrationSpec(path, num=50, seqlen=12), TOKENIZER)
    numbers = [number_of(s) for s in found.sequences]
    assert len(set(numbers)) == 50
    assert all(len(s) == 12 for s in found.sequences)
    # Of 50 uniform draws, more than 35 in the first half has a probability of 0.1 %.
    assert 15 <= sum(n < 1000 for n in numbers) <= 35


def test_short_documents_are_passed_over_however_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(jsonl(["short"] * 3000 + documents(30) + ["tiny " * 3] * 3000))
    found = load_calibration(CalibrationSpec(path, num=30, seqlen=20), TOKENIZER)
    assert sorted(number_of(s) for s in found.sequences) == list(range(30))
    with pytest.raises(QuambaError, match="has 30 documents of at least 16 tokens, but 31"):
        load_calibration(CalibrationSpec(path, num=31, seqlen=20), TOKENIZER)


def test_gzip_and_folders_read_alike(tmp_path: Path) -> None:
    texts = documents(40)
    (tmp_path / "a").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "a" / f"{i:03d}.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(jsonl(texts))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(texts).encode()))
    names = ["a", "b.jsonl", "c.jsonl.gz"]
    prints = {
        load_calibration(CalibrationSpec(tmp_path / name, num=9, seqlen=30), TOKENIZER).fingerprint
        for name in names
    }
    assert len(prints) == 1


def test_zstandard_file_of_several_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the package zstandard is not installed")
    texts = documents(10)
    halves = [jsonl(texts[:5]), jsonl(texts[5:])]
    path = tmp_path / "frames.jsonl.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(h.encode()) for h in halves))
    assert list(reading.read_jsonl(path)) == texts
    path.write_bytes(b"not compressed at all, but long enough to hold a header")
    with pytest.raises(QuambaError, match=r"frames.jsonl.zst cannot be read after line 0"):
        list(reading.read_jsonl(path))


def test_saved_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    texts = documents(20)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "plain")
    assert list(reading.iter_documents(tmp_path / "plain")) == texts
    split = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts[:5]})})
    split.save_to_disk(tmp_path / "splits")
    assert list(reading.iter_documents(tmp_path / "splits")) == texts[:5]
    datasets.Dataset.from_dict({"content": texts}).save_to_disk(tmp_path / "other")
    with pytest.raises(QuambaError, match=r"no text column \"text\"; its columns are \['content'\]"):
        list(reading.iter_documents(tmp_path / "other"))


def test_default_dataset_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, filename: str, repo_type: str) -> str:
        asked.append((repository, filename, repo_type))
        path = tmp_path / "val.jsonl"
        path.write_text(jsonl(documents(20)))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = load_calibration(CalibrationSpec(num=4, seqlen=20), TOKENIZER)
    assert asked == [("monology/pile-uncopyrighted", "val.jsonl.zst", "dataset")]
    assert found.source == "monology/pile-uncopyrighted (val.jsonl.zst)"
    assert len(found.sequences) == 4


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise OSError("no network\nwith a long story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(QuambaError, match=r"cannot be downloaded \(no network\); give a local .txt"):
        load_calibration(CalibrationSpec(), TOKENIZER)


def test_batches_pad_on_the_left_only_where_lengths_differ(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(jsonl([chr(97 + i) * n for i, n in enumerate([20, 30, 17, 30, 25, 99, 17])]))
    found = load_calibration(CalibrationSpec(path, num=7, seqlen=30, batch_size=3), TOKENIZER)
    batches = list(found.batches())
    assert [(tuple(ids.shape), mask is None) for ids, mask in batches] == [
        ((3, 30), True),
        ((3, 25), False),
        ((1, 17), True),
    ]
    ids, mask = batches[1]
    assert mask is not None and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [25, 20, 17]
    assert mask[:, -1].all() and (mask.int().diff(dim=1) >= 0).all(), "padding is on the left"
    assert ids[~mask].eq(0).all()

    in_order = [ids[0].tolist() for ids, _ in found.batches(1)]
    assert in_order == sorted((s.tolist() for s in found.sequences), key=len, reverse=True)
    flat = [
        row[keep].tolist()
        for ids, mask in found.batches(4)
        for row, keep in zip(
            ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, strict=True
        )
    ]
    assert flat == in_order, "the order of sequences does not depend on the batch size"


def test_left_pad_keeps_equal_lengths_as_they_are() -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    ids, mask = left_pad(rows)
    assert mask is None
    assert ids.tolist() == [[1, 2], [3, 4]]
    ids, mask = left_pad([torch.tensor([5]), torch.tensor([3, 4])])
    assert ids.tolist() == [[0, 5], [3, 4]]
    assert mask is not None and mask.tolist() == [[False, True], [True, True]]


def test_fingerprint_follows_the_tokens_and_settings_only(text_file: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path = text_file, **changes: int) -> str:
        spec = CalibrationSpec(path, **{"num": 6, "seqlen": 8, **changes})
        return load_calibration(spec, TOKENIZER).fingerprint

    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    same = fingerprint()
    assert len(same) == 64
    assert fingerprint() == fingerprint(copy) == fingerprint(batch_size=1) == same
    copy.write_text(text_file.read_text().replace("abcd", "abce"))
    different = [fingerprint(copy), fingerprint(seed=1), fingerprint(num=7), fingerprint(seqlen=16)]
    assert len({same, *different}) == 5


def test_report_and_description(text_file: Path) -> None:
    found = load_calibration(CalibrationSpec(str(text_file), num=6, seqlen=8), TOKENIZER)
    assert found.description == f"6 samples of at most 8 tokens (48 in all) from {text_file}, seed 1234"
    assert json.loads(json.dumps(found.to_dict())) == {
        "source": str(text_file),
        "num": 6,
        "seqlen": 8,
        "seed": 1234,
        "tokens": 48,
        "fingerprint": found.fingerprint,
    }


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n ", "a.txt is empty"),
        ("a.txt", b"good \xff\xfe bad", r"a.txt is not UTF-8 text \(byte 5\)"),
        (
            "a.txt",
            b"short",
            "has 5 tokens, which make 0 windows of 16, but 4 calibration samples were asked for",
        ),
        ("a.txt", b"x" * 50, "has 50 tokens, which make 3 windows of 16, but 4 calibration samples"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"content": "x", "n": 1}\n',
            r"Line 2 of .* has no string field \"text\"; its",
        ),
        ("a.jsonl", b'{"text": 3}\n', "Line 1 of .* has no string field"),
        ("a.jsonl", b'["text"]\n', "Line 1 of .* is not a JSON object"),
        ("a.jsonl", b'\n{"text": \n', "Line 2 of .* is not valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "Line 2 of .* is not UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read after line 0"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "ok"}\n', mtime=0)[:-12],
            "a.jsonl.gz cannot be read after line",
        ),
        ("a.csv", b"text\nx", r"a.csv is no text file that Quamba reads; expected a .txt, .jsonl"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuambaError, match=sentence) as error:
        load_calibration(CalibrationSpec(tmp_path / name, num=4, seqlen=16), TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_mistyped_relative_path_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "calibration").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuambaError, match=r"There is no 'data/calibraton'; .* Did you mean 'calibration'\?"):
        load_calibration(CalibrationSpec("data/calibraton"), TOKENIZER)


def test_unknown_names_get_the_nearest(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(
        QuambaError, match=r"There is no '.*/txet.txt'; expected .* Did you mean 'text.txt'\?"
    ):
        load_calibration(CalibrationSpec(tmp_path / "txet.txt"), TOKENIZER)
    with pytest.raises(QuambaError, match="There is no 'nothing-like-it'"):
        load_calibration(CalibrationSpec("nothing-like-it"), TOKENIZER)
    with pytest.raises(QuambaError, match=r"has no \.txt"):
        (tmp_path / "empty").mkdir()
        load_calibration(CalibrationSpec(tmp_path / "empty"), TOKENIZER)


@pytest.mark.parametrize(
    ("hide", "name", "package"),
    [("datasets", "some/dataset", "datasets"), ("zstandard", "{tmp}/a.jsonl.zst", "zstandard")],
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hide: str, name: str, package: str
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, hide, None)
    with pytest.raises(QuambaError, match=rf"needs the package '{package}'.*pip install 'quamba\[data\]'"):
        load_calibration(CalibrationSpec(name.format(tmp=tmp_path)), TOKENIZER)


@pytest.mark.parametrize(
    "change", [{"num": 0}, {"seqlen": 0}, {"seqlen": -3}, {"batch_size": 0}, {"num": 1.5}, {"seed": -1}]
)
def test_bad_settings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(QuambaError, match=f"calibration {next(iter(change))} is .*, expected an integer"):
        CalibrationSpec("x.txt", **change)


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_overlap_of_files(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    evaluation = write("eval.txt", words(0, 1000))
    assert texts_overlap(evaluation, tmp_path / "." / "eval.txt") == "they are the same file"
    assert texts_overlap(write("copy.txt", words(0, 1000)), evaluation) == "the files have the same content"
    assert texts_overlap(write("other.txt", words(5000, 1000)), evaluation) == ""
    run = SPAN + STRIDE - 1
    for start in (0, 3, 501):  # wherever the common run lies, one of full length is found
        mixed = (
            words(7000, 333) + " " + words(start, run).upper().replace(" ", ",\n ") + " " + words(9000, 50)
        )
        assert "share passages" in texts_overlap(write("mixed.txt", mixed), evaluation)
        assert "share passages" in texts_overlap(write("mixed.jsonl", jsonl(["x", mixed])), evaluation)
    shorter = words(7000, 333) + " " + words(3, SPAN - 1) + " " + words(9000, 50)
    assert texts_overlap(write("shorter.txt", shorter), evaluation) == ""


def test_overlap_of_names(write: Callable[[str, str], Path]) -> None:
    assert texts_overlap(None, "pile") and texts_overlap("monology/pile-uncopyrighted", "pile")
    assert texts_overlap(None, "wikitext2") == ""
    assert texts_overlap(None, write("eval.txt", words(0, 100))) == ""


def test_overlap_of_tokens(write: Callable[[str, str], Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=generator).tolist()
    calibration = load_calibration(
        CalibrationSpec(write("c.txt", bytes(letters[:2000]).decode()), num=10, seqlen=100), TOKENIZER
    )
    assert tokens_overlap(calibration, letters[2000:]) == ""
    # The first sample and 79 of its tokens; the other samples are not there.
    sample = calibration.sequences[0].tolist()[5 : 5 + SPAN + STRIDE - 1]
    hit = tokens_overlap(calibration, torch.tensor(letters[2000:2301] + sample + letters[2500:2600]))
    assert hit == "1 of 10 calibration samples are in the evaluation text"
    assert tokens_overlap(calibration, letters[:10]) == ""
