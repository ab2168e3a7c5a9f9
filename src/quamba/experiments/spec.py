"""A sweep as a file: which command lines of ``main.py``, under which names, with which expected values.

    version = 1
    name = "reproduce"
    [defaults]                    # flags of main.py for every run; true and false for switches
    quantize = true
    [[grid]]                      # every combination of ``vary``, the first key outermost
    set = { output_subdir = "quamba1" }
    vary = { model = ["state-spaces/mamba-130m"], percentile_alpha = ["default", 1.0] }
    [[run]]                       # or one by one
    set = { model = "state-spaces/mamba-130m", w_bits = 4 }
    [[expected]]
    metric = "lambada_openai acc"
    source = "the paper, its table"
    values = { "quamba1/default/quamba-130m-w8a8" = 40.61 }

"default" leaves a flag out; ``precision = "w4a8"`` is ``w_bits = 4, a_bits = 8``. A value of ``vary`` may be
a table of flags that change together; its key then is a name only.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from quamba.cli.flags import QuantizeFlags
from quamba.cli.published import check
from quamba.cli.published import command as main_py
from quamba.cli.store import model_name, quamba_name, stored_folder
from quamba.errors import QuambaError, nearest, one_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Flags that say where things are, not what is measured.
PLACES = ("pretrained_dir", "output_subdir", "log_dir", "force", "verbose")
#: Flags that cut an evaluation short.
SUBSET = ("limit", "max_windows", "testing")
LEAVE_OUT = "default"
_PRECISION = re.compile(r"w(\d+)a(\d+)")
_PART = r"[\w+-][\w.+-]*"
_NAME = re.compile(f"{_PART}(/{_PART})*")
_TOP = ("version", "name", "title", "defaults", "grid", "run", "expected")


@dataclass(frozen=True)
class Expected:
    """A value to compare with.

    metric     "TASK METRIC" or "TEXT perplexity", as in tables
    value      as printed: accuracies may be percent
    source     who says so
    tolerance  in the unit of value; None: from the standard error of the measurement
    subset     it is of the part of the evaluation that the file asks for, not of all
    """

    metric: str
    value: float
    source: str
    tolerance: float | None = None
    subset: bool = False


@dataclass(frozen=True)
class RunSpec:
    """One command line.

    name       also where its files are: ``quamba1/pa-1/quamba-130m-w8a8``
    arguments  of ``main.py``
    """

    name: str
    arguments: tuple[str, ...]
    expected: tuple[Expected, ...] = ()

    @cached_property
    def context(self) -> click.Context:
        """The parsed command line. Raises click's exceptions."""
        return main_py.make_context("main.py", list(self.arguments))

    @property
    def options(self) -> dict[str, Any]:
        """All parameters of ``main.py``, defaults filled in."""
        return dict(self.context.params)

    @property
    def model(self) -> str:
        return str(self.options["model"])

    @property
    def flags(self) -> QuantizeFlags:
        return QuantizeFlags.take(self.options)

    @property
    def request(self) -> dict[str, Any]:
        """What decides the result: two runs with equal requests measure the same thing."""
        return {key: value for key, value in sorted(self.options.items()) if key not in PLACES}

    @property
    def folder(self) -> Path | None:
        """Where ``main.py`` stores the quantized model; None for a float one or without a place."""
        flags = self.flags
        if not flags.quantize or flags.pretrained_dir is None:
            return None
        return stored_folder(flags.pretrained_dir, _stem(self), flags.output_subdir, flags.percentile_alpha)


@dataclass(frozen=True)
class Sweep:
    """Runs in the order of the file, their names all different."""

    file: str
    name: str
    title: str
    runs: tuple[RunSpec, ...]

    def only(self, names: Sequence[str]) -> Sweep:
        """The runs of these names, or all below a name that ends at a ``/``."""
        if not names:
            return self
        known = [run.name for run in self.runs]
        for name in names:
            if not any(_is_named(run, name) for run in known):
                parts = {part for run in known for part in (run, *_parents(run))}
                raise QuambaError(f"'{self.file}' has no run '{name}'.{nearest(name, sorted(parts))}")
        chosen = tuple(run for run in self.runs if any(_is_named(run.name, name) for name in names))
        return dataclasses.replace(self, runs=chosen)

    def with_flags(self, **changes: Any) -> Sweep:
        """Every run with other flags; None leaves one out."""
        return dataclasses.replace(self, runs=tuple(_changed(run, changes) for run in self.runs))


def read_sweep(path: str | Path) -> Sweep:
    """Raises QuambaError in one sentence that names the file and the key."""
    file = Path(path).expanduser()
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuambaError(f"There is no sweep file '{path}'.{_sibling(file)}") from None
    except IsADirectoryError:
        raise QuambaError(f"'{path}' is a folder, expected a .toml file of a sweep.") from None
    except OSError as error:
        raise QuambaError(f"The sweep file '{path}' cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise QuambaError(f"The sweep file '{path}' is not valid TOML: {error}.") from None
    return _Reader(str(path)).sweep(fields, file.stem)


@dataclass(frozen=True)
class _Reader:
    """Reads one file; errors name it."""

    file: str

    def sweep(self, fields: Mapping[str, Any], stem: str) -> Sweep:
        self._known("", fields, _TOP)
        if fields.get("version", 1) != 1:
            raise self._wrong("version", fields["version"], "1; a newer file needs a newer quamba")
        name = self._take(fields, "name", str, stem)
        if not _NAME.fullmatch(name) or "/" in name:
            raise self._wrong("name", name, "letters, digits, '.', '_' and '-'")
        defaults = self._flags("defaults", self._take(fields, "defaults", dict, {}))
        runs: list[RunSpec] = []
        for i, grid in enumerate(self._tables(fields, "grid")):
            runs += self._grid(f"grid[{i}]", grid, defaults)
        for i, one in enumerate(self._tables(fields, "run")):
            runs.append(self._one(f"run[{i}]", one, defaults))
        if not runs:
            raise QuambaError(f"'{self.file}' has no runs, expected [[grid]] or [[run]] tables.")
        self._all_different(runs)
        expected = self._expected(fields, [run.name for run in runs])
        runs = [dataclasses.replace(run, expected=tuple(expected.get(run.name, ()))) for run in runs]
        return Sweep(self.file, name, self._take(fields, "title", str, name), tuple(runs))

    def _grid(self, where: str, grid: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[RunSpec]:
        self._known(where, grid, ("set", "vary"))
        fixed = {**defaults, **self._flags(f"{where}.set", self._take(grid, "set", dict, {}))}
        vary = self._take(grid, "vary", dict, {}, where)
        for key, values in vary.items():
            if not isinstance(values, list) or not values:
                raise self._wrong(f"{where}.vary.{key}", values, "a list of values")
        for values in itertools.product(*vary.values()):
            combination: dict[str, Any] = {}
            for key, value in zip(vary, values, strict=True):
                together = value if isinstance(value, dict) else {key: value}
                combination |= self._flags(f"{where}.vary", together)
            yield self._run(where, {**fixed, **combination}, None)

    def _one(self, where: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> RunSpec:
        self._known(where, fields, ("name", "set"))
        flags = {**defaults, **self._flags(f"{where}.set", self._take(fields, "set", dict, {}))}
        return self._run(where, flags, fields.get("name"))

    def _run(self, where: str, flags: Mapping[str, Any], name: Any) -> RunSpec:
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise self._wrong(f"{where}.name", name, "letters, digits, '.', '_', '-' and '/' between them")
        if not isinstance(flags.get("model"), str):
            raise self._wrong(f"{where}: model", flags.get("model"), "a folder or a hub id")
        run = RunSpec(name or "", _arguments(flags))
        try:
            check(run.context)
        except click.ClickException as error:
            raise QuambaError(f"'{self.file}', {where}: {error.format_message()}") from None
        except QuambaError as error:
            raise QuambaError(f"'{self.file}', {where}: {error}") from None
        found = name or _published_name(run)
        if not _NAME.fullmatch(found):
            raise QuambaError(
                f"'{self.file}', {where}: the run would be called '{found}', which is no name of files; list "
                "it as [[run]] with a name."
            )
        return dataclasses.replace(run, name=found)

    def _flags(self, where: str, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags by name, ``precision`` taken apart; values are checked when the command line is parsed."""
        known = [parameter.name or "" for parameter in main_py.params]
        found: dict[str, Any] = {}
        for key, value in flags.items():
            if key == "precision":
                match = _PRECISION.fullmatch(str(value))
                if match is None:
                    raise self._wrong(f"{where}.{key}", value, "'w8a8', 'w4a8' or 'w4a16'")
                found |= {"w_bits": int(match[1]), "a_bits": int(match[2])}
            elif key not in known or key == "help":
                hint = nearest(key, [*known, "precision"])
                raise QuambaError(f"'{self.file}': '{where}.{key}' is no flag of main.py.{hint}")
            elif isinstance(value, dict):
                raise self._wrong(f"{where}.{key}", value, "one value")
            else:
                found[key] = value
        return found

    def _expected(self, fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Expected]]:
        found: dict[str, list[Expected]] = {}
        for i, table in enumerate(self._tables(fields, "expected")):
            where = f"expected[{i}]"
            self._known(where, table, ("metric", "source", "tolerance", "subset", "values"))
            metric, source = (self._take(table, key, str, None, where) for key in ("metric", "source"))
            tolerance = table.get("tolerance")
            if tolerance is not None and not (_is_number(tolerance) and tolerance >= 0):
                raise self._wrong(f"{where}.tolerance", tolerance, "a number of at least 0")
            subset = table.get("subset", False)
            if not isinstance(subset, bool):
                raise self._wrong(f"{where}.subset", subset, "true or false")
            for name, value in self._take(table, "values", dict, None, where).items():
                if name not in names:
                    hint = nearest(name, names)
                    raise QuambaError(f"'{self.file}': '{where}.values' names no run: '{name}'.{hint}")
                if not _is_number(value):
                    raise self._wrong(f"{where}.values.{name}", value, "a number")
                one = Expected(metric, float(value), source, tolerance, subset)
                found.setdefault(name, []).append(one)
        return found

    def _all_different(self, runs: Sequence[RunSpec]) -> None:
        seen: dict[str, RunSpec] = {}
        for run in runs:
            if run.name in seen:
                raise QuambaError(
                    f"'{self.file}' has two runs of the name '{run.name}', expected all different: give one "
                    "another output_subdir, or list it as [[run]] with a name."
                )
            seen[run.name] = run

    def _tables(self, fields: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        found = fields.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._wrong(key, found, f"tables, each under [[{key}]]")
        return found

    def _take(self, fields: Mapping[str, Any], key: str, kind: type, default: Any, where: str = "") -> Any:
        value = fields.get(key, default)
        if not isinstance(value, kind):
            expected = "a text" if kind is str else "a table"
            raise self._wrong(f"{where}.{key}" if where else key, value, expected)
        return value

    def _known(self, where: str, fields: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in fields:
            if key not in known:
                raise one_of(f"'{self.file}': a key of {f'[[{where}]]' if where else 'the file'}", key, known)

    def _wrong(self, key: str, value: object, expected: str) -> QuambaError:
        return QuambaError(f"'{self.file}': '{key}' is {value!r}, expected {expected}.")


def _arguments(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The command line, flags in the order given, the model first."""
    words = [str(flags["model"])]
    for key, value in flags.items():
        if key == "model" or value is None or value is False or value == LEAVE_OUT:
            continue
        if value is True:
            words.append(f"--{key}")
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{key}", str(one)]
    return tuple(words)


def _changed(run: RunSpec, changes: Mapping[str, Any]) -> RunSpec:
    """The same run with flags replaced, added at the end or, for None, left out."""
    words = list(run.arguments)
    for key, value in changes.items():
        option = f"--{key}"
        switch = next(p for p in main_py.params if p.name == key)
        takes = 1 if isinstance(switch, click.Option) and switch.is_flag else 2
        while option in words:
            at = words.index(option)
            del words[at : at + takes]
        if value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    return dataclasses.replace(run, arguments=tuple(words))


def _stem(run: RunSpec) -> str:
    flags = run.flags
    return quamba_name(run.model, flags.label, flags.hybrid_blocks_config if flags.hybrid_blocks else None)


def _published_name(run: RunSpec) -> str:
    """Where the published rule stores the model, under the root; float models are ``float/NAME``."""
    flags = run.flags
    if not flags.quantize:
        return f"float/{model_name(run.model)}"
    return stored_folder("", _stem(run), flags.output_subdir, flags.percentile_alpha).as_posix()


def _is_named(run: str, name: str) -> bool:
    return run == name or run.startswith(f"{name.rstrip('/')}/")


def _parents(run: str) -> list[str]:
    parts = run.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sibling(file: Path) -> str:
    if not file.parent.is_dir():
        return ""
    return nearest(str(file), [str(other) for other in sorted(file.parent.glob("*.toml"))])
