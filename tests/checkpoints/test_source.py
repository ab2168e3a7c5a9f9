"""Finding a checkpoint: folders, hub ids, the cache, and the sentences when there is none."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from quamba.checkpoints.source import read_json, resolve
from quamba.errors import QuambaError


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


class FakeHub:
    """Stands in for snapshot_download: copies names, and notes what was fetched."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.fetched = folder, files, set()

    def __call__(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        for name in self.files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.add(name)
                (self.folder / name).touch()
        return str(self.folder)


def cached_model(cache: Path, repo_id: str, files: list[str]) -> Path:
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_folder_is_used_as_it_is(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(QuambaError, match=r"is a file, expected the folder"):
        resolve(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["mamba-dmo", "./nowhere/deep/mamba-demo"])
def test_a_missing_folder_is_named(tmp_path, name, offline):
    (tmp_path / "mamba-demo").mkdir()
    with pytest.raises(QuambaError) as caught:
        resolve(tmp_path / name)
    message = str(caught.value)
    assert f"Folder '{tmp_path / name}' was not found" in message
    assert ("Did you mean 'mamba-demo'?" in message) == (name == "mamba-dmo")


def test_offline_and_not_cached(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mamba-demo").mkdir(parents=True)
    with pytest.raises(QuambaError) as caught:
        resolve("models/mamba-dem")
    message = str(caught.value)
    assert "hub model 'models/mamba-dem' is not in the local cache" in message
    assert "give a local folder" in message
    assert "Did you mean 'mamba-demo'?" in message


def test_offline_and_cached(offline):
    snapshot = cached_model(offline, "owner/name", ["config.json", "pytorch_model.bin"])
    assert resolve("owner/name") == snapshot


def test_offline_with_a_snapshot_that_the_hub_client_calls_incomplete(offline, monkeypatch):
    def incomplete(repo_id, **_):
        raise LocalEntryNotFoundError("generation_config.json is not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    snapshot = cached_model(offline, "owner/name", ["config.json", "model.safetensors"])
    assert resolve("owner/name") == snapshot
    with pytest.raises(QuambaError, match=r"'owner/other' is not in the local cache"):
        resolve("owner/other")


def test_a_pickle_is_not_fetched_beside_safetensors(tmp_path, monkeypatch):
    files = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "spiece.model",
        "chat_template.jinja",
        "consolidated.safetensors",
    ]
    hub = FakeHub(tmp_path, [*files, "README.md"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve("owner/name") == tmp_path
    assert hub.fetched == set(files) - {"pytorch_model.bin", "consolidated.safetensors"}


def test_a_pickle_is_fetched_when_there_is_nothing_else(tmp_path, monkeypatch):
    files = [
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "optimizer.bin",
    ]
    hub = FakeHub(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolve("owner/name")
    assert hub.fetched == set(files) - {"optimizer.bin"}


class NoRepositoryError(RepositoryNotFoundError):
    def __init__(self) -> None:  # the real one wants an HTTP response
        pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NoRepositoryError(), "the hub has no model of this name"),
        (
            RuntimeError("connection reset\nmany more lines"),
            r"could not be downloaded \(RuntimeError: connection reset\)",
        ),
    ],
)
def test_errors_of_the_hub_are_sentences(monkeypatch, error, sentence):
    def fail(repo_id, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(QuambaError, match=sentence) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no config.json"),
        (b'{"d_model": 3', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
    ],
)
def test_json_that_is_no_object(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(QuambaError, match=sentence):
        read_json(tmp_path / "config.json")
