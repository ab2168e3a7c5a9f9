"""Answers of finished tasks in a folder, so that a run that was cut off goes on after them.

One JSON file for each task and kind of request. Its name has a digest of all that the answers depend on: the
model, how it runs, and the requests themselves, in which the task's text, examples and samples are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quamba.models.lm import MambaLM

FOLDER = "unfinished"


@dataclass(eq=False)
class AnswerStore:
    """folder      made when the first task ends
    identity    of model and settings, JSON-ready
    taken_over  tasks whose answers were found, in the order of their use
    """

    folder: Path
    identity: Mapping[str, Any]
    taken_over: list[str] = field(default_factory=list)
    _used: set[Path] = field(default_factory=set)

    def find(self, task: str, kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any] | None:
        """The stored answers to these requests; None without, also where a file is damaged."""
        path = self._path(task, kind, requests)
        try:
            answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(answers, list) or len(answers) != len(requests):
            return None
        self._used.add(path)
        if task not in self.taken_over:
            self.taken_over.append(task)
        return answers

    def keep(self, task: str, kind: str, requests: Sequence[tuple[Any, ...]], answers: list[Any]) -> None:
        """Write beside the file and rename."""
        path = self._path(task, kind, requests)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
        try:
            draft.write_text(json.dumps({"task": task, "kind": kind, "answers": answers}), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        self._used.add(path)

    def clear(self) -> None:
        """Remove what this run stored or took over, once its results are safe; other runs' files stay."""
        for path in self._used:
            path.unlink(missing_ok=True)
        self._used.clear()
        with contextlib.suppress(OSError):  # absent, or another run's files are in it
            self.folder.rmdir()

    def _path(self, task: str, kind: str, requests: Sequence[tuple[Any, ...]]) -> Path:
        digest = hashlib.sha256(_json([self.identity, task, kind, requests]).encode())
        name = re.sub(r"[^\w.-]", "_", task)[:80]
        return self.folder / f"{name}-{kind}-{digest.hexdigest()[:24]}.json"


def weights_digest(network: MambaLM) -> str:
    """sha256, in hex, over every byte of every tensor, with names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.named_tensors().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
