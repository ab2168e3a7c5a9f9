"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError, nearest

#: ``model*`` and not ``*``: some repositories hold a second copy of the weights in another layout.
CHECKPOINT_FILES = (
    "config*.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "chat_template*",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(path_or_id: str | Path, *, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The local folder of a checkpoint.

    path_or_id  a folder, or (as a string) a hub id ``owner/name``; a folder of that name wins
    patterns    the files to fetch from the hub; those of ``.bin`` files are fetched only when the
                repository has no safetensors
    returns     the folder itself, or the snapshot in the hub cache
    raises      QuambaError when there is no such folder and the hub gives none

    The hub cache and ``HF_HUB_OFFLINE`` are obeyed.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise QuambaError(
            f"'{path_or_id}' is a file, expected the folder that holds config.json and weights."
        )
    if isinstance(path_or_id, str) and _HUB_ID.fullmatch(path_or_id):
        return _from_hub(path_or_id, patterns)
    raise QuambaError(
        f"Folder '{path_or_id}' was not found, expected a folder or a hub id 'owner/name'.{_sibling(folder)}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a missing file, broken JSON and anything but an object are errors."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuambaError(f"'{path.parent}' has no {path.name}.") from None
    except OSError as error:
        raise QuambaError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QuambaError(f"'{path}' is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise QuambaError(f"'{path}' holds a JSON {type(value).__name__}, expected an object.")
    return value


def _from_hub(repo_id: str, patterns: Sequence[str]) -> Path:
    pickles = [pattern for pattern in patterns if ".bin" in pattern]
    folder = _snapshot(repo_id, [pattern for pattern in patterns if pattern not in pickles])
    if pickles and not any(folder.glob("*.safetensors")):
        folder = _snapshot(repo_id, pickles)
    return folder


def _snapshot(repo_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise QuambaError(
            f"There is no folder '{repo_id}', and the hub has no model of this name that you may read."
            f"{_sibling(Path(repo_id))}"
        ) from None
    except LocalEntryNotFoundError:
        # Raised offline also for a snapshot that lacks some file we never read; config.json is enough here.
        cached = try_to_load_from_cache(repo_id, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise QuambaError(
            f"There is no folder '{repo_id}', and the hub model '{repo_id}' is not in the local cache while "
            f"the hub cannot be reached; download it once, or give a local folder.{_sibling(Path(repo_id))}"
        ) from None
    except Exception as error:
        # The hub client lets errors of its HTTP library through, and that library differs by version.
        reason = str(error).strip().split("\n")[0]
        raise QuambaError(
            f"The hub model '{repo_id}' could not be downloaded ({type(error).__name__}: {reason}); "
            "a local folder works too."
        ) from error


def _sibling(folder: Path) -> str:
    parent = folder.parent
    if not parent.is_dir():
        return ""
    return nearest(folder.name, sorted(entry.name for entry in parent.iterdir() if entry.is_dir()))
