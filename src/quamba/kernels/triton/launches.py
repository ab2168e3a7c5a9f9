"""How kernels are launched: what a table says for this GPU and these sizes, else a heuristic.

Launch parameters of an op are a frozen dataclass, and a function of sizes chooses them. ``launch_choice``
puts the tables in front of that function; with candidates beside it, ``quamba tune`` can fill them. Results
must not depend on the choice, other than by the order of float sums.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

import torch

from quamba.kernels.triton.launch_tables import Entry, Gpu, Key, Schema, tables_of

L = TypeVar("L")

#: Where choices are made: all that tables may speak of.
_MODULES = (
    "conv",
    "conv_words",
    "embedding",
    "gemm",
    "gemm_wide",
    "gptq",
    "hadamard",
    "linear",
    "quantize",
    "rotate_tiles",
    "selective_scan",
    "ssd",
    "ssd_chunks",
    "decode.mix",
    "decode.project",
    "decode.scan",
    "decode.ssd",
)
#: Of one choice; prompts come in any length.
_MOST_KNOWN = 4096

_CHOICES: dict[str, LaunchChoice[Any]] = {}
_asked: list[Asked] | None = None
_stop_at: Collection[str] = ()


@dataclass(frozen=True)
class Asked:
    """A launch that was asked for.

    arguments  of the heuristic, by name
    """

    choice: LaunchChoice[Any]
    arguments: Mapping[str, Any]
    key: Key
    launch: Any


class _Stopped(BaseException):
    """Ends a run that was only to ask."""


class LaunchChoice(Generic[L]):
    """A heuristic, asked only where no table knows better. Called as it is; arguments must be hashable.

    name        "op.what": the op as ``Kernels`` or ``decode/`` has it, so that calls of it can be measured
    key         arguments -> a NamedTuple of texts and numbers, what a table knows them by; None: all of them
    candidates  launches worth measuring for such arguments; None: the op is not tuned
    """

    def __init__(
        self,
        name: str,
        heuristic: Callable[..., L],
        key: Callable[..., Key] | None,
        candidates: Callable[..., Iterable[L]] | None,
    ) -> None:
        functools.update_wrapper(self, heuristic)
        self.name, self.heuristic, self.candidates = name, heuristic, candidates
        self._key = key
        self._known: dict[Any, L] = {}
        self._forced: list[L] = []

    def __call__(self, *args: Any, **named: Any) -> L:
        if self._forced:
            return self._forced[-1]
        call = (_device(), args, *named.items())
        try:
            return self._known[call]
        except KeyError:
            return self._find(call, args, named)

    def _find(self, call: Any, args: tuple[Any, ...], named: dict[str, Any]) -> L:
        bound = inspect.signature(self.heuristic).bind(*args, **named)
        bound.apply_defaults()
        key = self.key(bound.arguments)
        found = _measured(_device()).get((self.name, key))
        launch = self.heuristic(*args, **named) if found is None else self.launch(found)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[call] = launch
        if _asked is not None:
            _asked.append(Asked(self, dict(bound.arguments), key, launch))
            if self.name in _stop_at:
                raise _Stopped
        return launch

    def key(self, arguments: Mapping[str, Any]) -> Key:
        return tuple(arguments.values()) if self._key is None else self._key(**arguments)

    def launch(self, entry: Entry) -> L:
        return cast(L, self._launch_type(**entry.launch))

    @functools.cached_property
    def schema(self) -> Schema:
        fields = dataclasses.fields(self._launch_type)
        types = _types(self._launch_type)
        required = frozenset(f.name for f in fields if f.default is dataclasses.MISSING)
        names = _types(self.heuristic) if self._key is None else _types(_types(self._key)["return"])
        key = {name: _plain(kind) for name, kind in names.items() if name != "return"}
        return Schema(key, {f.name: types[f.name] for f in fields}, required)

    @functools.cached_property
    def _launch_type(self) -> Any:
        """What the heuristic returns, apart from None."""
        result = _types(self.heuristic)["return"]
        return next((t for t in typing.get_args(result) if t is not type(None)), result)

    @contextmanager
    def forced(self, launch: L) -> Iterator[None]:
        """Inside, this launch is chosen, whatever is asked for."""
        self._forced.append(launch)
        try:
            yield
        finally:
            self._forced.pop()

    def forget(self) -> None:
        self._known.clear()


_types = typing.get_type_hints


def _plain(annotation: Any) -> type:
    """str for a ``Literal`` of texts."""
    return str if typing.get_origin(annotation) is typing.Literal else annotation


def launch_choice(
    name: str,
    *,
    key: Callable[..., Key] | None = None,
    candidates: Callable[..., Iterable[Any]] | None = None,
) -> Callable[[Callable[..., L]], LaunchChoice[L]]:
    """Makes a ``LaunchChoice`` of a heuristic. Its module must be among ``_MODULES``.

    key         None: the heuristic's arguments, one by one
    candidates  called with the heuristic's arguments
    """

    def decorate(heuristic: Callable[..., L]) -> LaunchChoice[L]:
        _CHOICES[name] = choice = LaunchChoice(name, heuristic, key, candidates)
        return choice

    return decorate


def row_bucket(rows: int) -> int:
    """What tables know a number of rows by: the power of two that holds them, of 16 to 8192."""
    return min(8192, max(16, 1 << (rows - 1).bit_length()))


def choices() -> dict[str, LaunchChoice[Any]]:
    """All of them, by name."""
    for module in _MODULES:
        import_module(f"quamba.kernels.triton.{module}")
    return dict(sorted(_CHOICES.items()))


def schemas() -> dict[str, Schema]:
    return {name: choice.schema for name, choice in choices().items()}


def check_tables(device: torch.device) -> None:
    """Read the tables for a GPU now, so that what is wrong with them is said before anything runs."""
    if device.type == "cuda":
        _measured(torch.cuda.current_device() if device.index is None else device.index)


def gpu(index: int) -> Gpu | None:
    """None for -1: no GPU is in use."""
    if index < 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"sm{major}{minor}")


def forget() -> None:
    """Forget what tables said: they have changed."""
    _measured.cache_clear()
    for choice in _CHOICES.values():
        choice.forget()


@contextmanager
def asked(stop_at: Collection[str] = ()) -> Iterator[list[Asked]]:
    """Collects what is asked for inside, each choice and arguments once.

    stop_at  names of choices: where one of them is asked for, what runs inside ends, before its launch
    """
    global _asked, _stop_at
    before, _asked, _stop_at = (_asked, _stop_at), [], stop_at
    for choice in _CHOICES.values():
        choice.forget()
    try:
        yield _asked
    except _Stopped:
        pass
    finally:
        _asked, _stop_at = before


def _device() -> int:
    """The GPU that kernels are launched on, or -1."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


@functools.cache
def _measured(index: int) -> dict[tuple[str, Key], Entry]:
    """What the tables for a GPU say, by op and key; the first to speak of a key counts."""
    found = gpu(index)
    if found is None:
        return {}
    entries: dict[tuple[str, Key], Entry] = {}
    for table in tables_of(found, schemas()):
        for op, by_key in table.launches.items():
            for key, entry in by_key.items():
                entries.setdefault((op, key), entry)
    return entries
