"""Files of launches that were measured: ``tables/*.json`` of the package, and those of the user.

A file is for one architecture ("sm90"), or for one GPU of it. Under "launches" every op has entries: what it
was called with (the key of its ``LaunchChoice``), the fields of the launch, and microseconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from quamba.errors import QuambaError, nearest

FORMAT = 1
PACKAGED = Path(__file__).parent / "tables"
#: Names a folder of tables, or one table, to be used instead of the user's usual folder.
VARIABLE = "QUAMBA_TABLES"

_FIELDS = ("format", "architecture", "device", "measured", "launches")
_TIMES = ("us", "before_us")

#: What an op was called with, in the order of its schema.
Key: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Gpu:
    """name as torch has it, "NVIDIA H200"; architecture "sm90" for compute capability 9.0."""

    name: str
    architecture: str

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Schema:
    """What an op's entries consist of: the fields of its keys and of its launches, with their types.

    required  fields that a launch must have
    """

    key: Mapping[str, type]
    launch: Mapping[str, type]
    required: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """launch     fields of the op's launch; those that are not there have their defaults
    us         microseconds with it, None where that is not known
    before_us  with what was chosen before
    """

    launch: Mapping[str, int]
    us: float | None = None
    before_us: float | None = None


@dataclass
class Table:
    """Entries by op and key.

    device    the one GPU that they are for, or None
    measured  what they were measured with: GPU, versions, date
    """

    architecture: str
    device: str | None = None
    measured: dict[str, str] = field(default_factory=dict)
    launches: dict[str, dict[Key, Entry]] = field(default_factory=dict)

    def is_for(self, gpu: Gpu) -> bool:
        return self.architecture == gpu.architecture and self.device in (None, gpu.name)

    def put(self, op: str, key: Key, entry: Entry) -> None:
        self.launches.setdefault(op, {})[key] = entry

    def write(self, path: Path, schemas: Mapping[str, Schema]) -> None:
        """An entry a line. A file that was there is replaced as a whole or not at all."""
        ops = []
        for op, entries in sorted(self.launches.items()):
            rows = [_line(schemas[op], key, entry) for key, entry in sorted(entries.items(), key=_order)]
            ops.append(f"  {json.dumps(op)}: [\n" + ",\n".join(f"   {row}" for row in rows) + "\n  ]")
        head = {"format": FORMAT, "architecture": self.architecture, "device": self.device}
        lines = [
            f" {json.dumps(n)}: {json.dumps(v)}," for n, v in (head | {"measured": self.measured}).items()
        ]
        text = "\n".join(["{", *lines, ' "launches": {', ",\n".join(ops), " }", "}", ""])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _line(schema: Schema, key: Key, entry: Entry) -> str:
    times = {name: getattr(entry, name) for name in _TIMES}
    known = {name: round(us, 2) for name, us in times.items() if us is not None}
    return json.dumps({**dict(zip(schema.key, key, strict=True)), "launch": dict(entry.launch), **known})


def _order(item: tuple[Key, Entry]) -> list[tuple[str, int]]:
    return [(part, 0) if isinstance(part, str) else ("", part) for part in item[0]]


def user_table(gpu: Gpu) -> Path:
    """Where the user's table of a GPU is: in $QUAMBA_TABLES, a folder or itself a .json file; else in
    quamba/tables of $XDG_CONFIG_HOME, or of ~/.config."""
    asked = os.environ.get(VARIABLE)
    if asked:
        place = Path(asked).expanduser()
        return place if place.suffix == ".json" else place / f"{gpu.slug}.json"
    config = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    return home / "quamba" / "tables" / f"{gpu.slug}.json"


def tables_of(gpu: Gpu, schemas: Mapping[str, Schema]) -> Iterator[Table]:
    """Those for a GPU in the order they are asked: the user's, the package's for it, for its architecture."""
    for path in (user_table(gpu), PACKAGED / f"{gpu.slug}.json", PACKAGED / f"{gpu.architecture}.json"):
        if path.exists() and (table := read_table(path, schemas)).is_for(gpu):
            yield table


def read_table(path: Path, schemas: Mapping[str, Schema]) -> Table:
    """QuambaError in one sentence for what is no table, or holds what this version does not know."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuambaError(f"The launch table '{path}' cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise _unusable(path, f"is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise _unusable(path, f"holds a JSON {type(content).__name__}, expected an object")
    if content.get("format") != FORMAT:
        raise _unusable(path, f"has format {content.get('format')!r}, expected {FORMAT}")
    _check_names(path, "the table", content, _FIELDS)
    device = content.get("device")
    table = Table(
        _checked(path, "the table", content, "architecture", str),
        None if device is None else _checked(path, "the table", content, "device", str),
        _checked(path, "the table", content, "measured", dict),
    )
    launches = _checked(path, "the table", content, "launches", dict)
    for op in launches:
        if op not in schemas:
            raise _unusable(path, f"has entries for an unknown op '{op}'", nearest(op, schemas))
        for number, row in enumerate(_checked(path, "the launches", launches, op, list)):
            where = f"entry {number} of '{op}'"
            key, entry = _entry(path, where, row, schemas[op])
            if key in table.launches.get(op, {}):
                raise _unusable(path, f"has {where} twice")
            table.put(op, key, entry)
    return table


def _entry(path: Path, where: str, row: Any, schema: Schema) -> tuple[Key, Entry]:
    if not isinstance(row, dict):
        raise _unusable(path, f"has {row!r} as {where}, expected an object")
    _check_names(path, where, row, (*schema.key, "launch", *_TIMES))
    key = tuple(_checked(path, where, row, name, kind) for name, kind in schema.key.items())
    fields = _checked(path, where, row, "launch", dict)
    _check_names(path, f"the launch of {where}", fields, schema.launch)
    names = [name for name in schema.launch if name in fields or name in schema.required]
    launch = {
        name: _checked(path, f"the launch of {where}", fields, name, schema.launch[name]) for name in names
    }
    for name, value in launch.items():
        if value < 0:
            raise _unusable(path, f"has {value} for '{name}' in the launch of {where}, expected 0 or more")
    times = {name: float(_checked(path, where, row, name, float)) for name in _TIMES if name in row}
    return key, Entry(launch, **times)


def _check_names(path: Path, where: str, found: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in found:
        if name not in known:
            listed = ", ".join(f"'{k}'" for k in known)
            fault = f"has the unknown field '{name}' in {where}, expected {listed}"
            raise _unusable(path, fault, nearest(name, known))


def _checked(path: Path, where: str, found: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in found:
        raise _unusable(path, f"lacks '{name}' in {where}")
    value = found[name]
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):  # True is an int, too
        raise _unusable(path, f"has {value!r} for '{name}' in {where}, expected {_KINDS[kind]}")
    return value


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS |= {dict: "an object", list: "a list"}


def _unusable(path: Path, fault: str, hint: str = "") -> QuambaError:
    return QuambaError(f"The launch table '{path}' {fault}; without it, 'quamba tune' makes a new one.{hint}")
