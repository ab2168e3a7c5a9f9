"""A table that is being filled: what it has already, and what is added, written at once."""

from __future__ import annotations

import os
from collections.abc import Collection
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quamba.errors import QuambaError
from quamba.kernels.triton.launch_tables import Entry, Gpu, Table, read_table
from quamba.kernels.triton.launches import forget, schemas
from quamba.tuning.tune import Found, fields_of

if TYPE_CHECKING:
    from quamba.kernels.triton.launch_tables import Key


class Session:
    """The table at ``path``, as far as there is one.

    known  ops and keys that are not to be measured; ``again``: none

    Raises QuambaError where the file is no table, one of another GPU, or cannot be written.
    """

    def __init__(self, path: Path, gpu: Gpu, *, again: bool = False) -> None:
        self.path = path
        self._schemas = schemas()
        measured = {"gpu": gpu.name, "torch": str(torch.__version__), "triton": version("triton")}
        measured["date"] = f"{date.today():%Y-%m}"
        self._table = Table(gpu.architecture, gpu.name)
        if path.exists():
            self._table = read_table(path, self._schemas)
            if not self._table.is_for(gpu):
                owner = self._table.device or self._table.architecture
                raise QuambaError(
                    f"The launch table '{path}' is for {owner}, and this is {gpu.name}; name another --out."
                )
        _check_writable(path)
        self._table.measured = measured
        entries = {} if again else self._table.launches
        self.known: Collection[tuple[str, Key]] = {(op, key) for op, keys in entries.items() for key in keys}

    def knows(self, op: str, key: Key) -> bool:
        return (op, key) in self.known

    def keep(self, found: Found) -> None:
        """Write down the best; where nothing was right there is none."""
        if found.best is None:
            return
        entry = Entry(fields_of(found.best), found.us[found.best], found.us.get(found.before))
        self._table.put(found.op, found.key, entry)
        self._table.write(self.path, self._schemas)
        forget()


def _check_writable(path: Path) -> None:
    existing = next(place for place in path.parents if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise QuambaError(f"The launch table '{path}' cannot be written: '{existing}' does not let you.")
