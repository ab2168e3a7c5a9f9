"""What a sweep has on disk. Every file appears whole or not at all, so a kill at any moment costs one run.

RUNS/sweep.json             the runs that were asked for, with their expected values
RUNS/results/NAME.json      of a finished run: its log, and under "sweep" what was asked
RUNS/failures/NAME.json     of one that failed: the sentence
RUNS/logs/NAME.log          all that a run printed, attempts one after another
RUNS/work                   results of stages that runs share
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quamba.cli.log import jsonable
from quamba.errors import QuambaError

FORMAT = 1


@dataclass(frozen=True)
class RunsFolder:
    path: Path

    @classmethod
    def at(cls, path: str | Path) -> RunsFolder:
        return cls(Path(path).expanduser())

    @property
    def plan_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def work(self) -> Path:
        return self.path / "work"

    def result_file(self, name: str) -> Path:
        return self.path / "results" / f"{name}.json"

    def failure_file(self, name: str) -> Path:
        return self.path / "failures" / f"{name}.json"

    def log_file(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def result(self, name: str) -> dict[str, Any] | None:
        """None also for a damaged file: the run is then done again."""
        return _read(self.result_file(name))

    def failure(self, name: str) -> dict[str, Any] | None:
        return _read(self.failure_file(name))

    def keep_result(self, name: str, record: Mapping[str, Any]) -> None:
        _write(self.result_file(name), record)
        self.failure_file(name).unlink(missing_ok=True)

    def keep_failure(self, name: str, sentence: str, arguments: tuple[str, ...]) -> None:
        _write(self.failure_file(name), {"name": name, "sentence": sentence, "arguments": list(arguments)})

    def clear_work(self) -> None:
        """Remove what runs share."""
        if self.work.is_dir():
            from quamba.quantization.work import WorkFolder

            WorkFolder(self.work).clear()

    def keep_plan(self, record: Mapping[str, Any]) -> None:
        _write(self.plan_file, {"format": FORMAT, **record})

    def plan(self) -> dict[str, Any]:
        """Raises QuambaError where no sweep has written."""
        found = _read(self.plan_file)
        if found is None or "runs" not in found:
            raise QuambaError(
                f"'{self.path}' holds no sweep (it has no sweep.json), expected the folder that 'quamba "
                "sweep' names; 'quamba compare' reads logs of single runs."
            )
        if found.get("format") != FORMAT:
            raise QuambaError(
                f"'{self.plan_file}' has format {found.get('format')!r}, this release reads {FORMAT}; "
                "update quamba."
            )
        return found

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second sweep out; ends with the process, however it ends."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise QuambaError(f"--out '{self.path}' cannot be written: {error.strerror}.") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise QuambaError(
                    f"Another sweep is running in '{self.path}'; wait for it, or give another --out."
                ) from None
            yield


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        draft.write_text(json.dumps(jsonable(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
