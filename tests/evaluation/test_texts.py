from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from quamba.errors import QuambaError
from quamba.evaluation.texts import EvalText, load_text


def test_a_text_file_comes_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Zwölf\r\n\n Boxkämpfer \n".encode())
    assert load_text(path) == EvalText("a.txt", "Zwölf\r\n\n Boxkämpfer \n", str(path))


def test_lines_of_jsonl_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n"}\n\n{"text": "two", "other": 1}\n')
    assert load_text(str(path)) == EvalText("a.jsonl", "one\n\n\ntwo", str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(QuambaError, match=f"{name} is empty"):
        load_text(tmp_path / name)


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match=r"'wikitext' is neither a file nor one of .*mean 'wikitext2'\?"):
        load_text("wikitext")
    (tmp_path / "heldout.txt").write_text("x")
    with pytest.raises(
        QuambaError, match=r"There is no '.*hold.txt'; .*wikitext2.* Did you mean 'heldout.txt'\?"
    ):
        load_text(tmp_path / "hold.txt")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(QuambaError, match=r"a\.csv is no evaluation text"):
        load_text(tmp_path / "a.csv")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match="is a folder, expected a"):
        load_text(tmp_path)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[tuple, dict]]:
    """A stand-in for the datasets library that records what it is asked for."""
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_wikitext2_is_the_raw_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_datasets(monkeypatch, {"text": ["", " = Title = \n", " text \n"]})
    found = load_text("wikitext2")
    assert found.text == "\n\n = Title = \n\n\n text \n"
    assert (found.name, found.max_tokens) == ("wikitext2", None)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_ptb_is_the_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_datasets(monkeypatch, {"sentence": ["a b", "c"]})
    assert load_text("ptb").text == "a b\n\nc"
    assert asked[0][1]["split"] == "validation"


@pytest.mark.parametrize("name", ["c4", "pile"])
def test_c4_and_pile_are_the_first_1100_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "documents.json.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(1200)).encode())
    )
    asked = []

    def download(repository: str, filename: str, repo_type: str) -> str:
        asked.append((repository, filename, repo_type))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = load_text(name)
    assert found.text == " ".join(f"d{i}" for i in range(1100))
    assert found.max_tokens == 524288
    assert asked == [
        ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset")
        if name == "c4"
        else ("monology/pile-uncopyrighted", "val.jsonl.zst", "dataset")
    ]


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_offline_or_not_installed_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no route\nmore"))
    with pytest.raises(QuambaError, match=rf"'{name}' .* cannot be downloaded \(no route\); give a local"):
        load_text(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QuambaError, match=rf"'{name}' needs the package 'datasets'.*'quamba\[data\]'"):
        load_text(name)
