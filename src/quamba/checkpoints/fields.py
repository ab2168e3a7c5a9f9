"""Reading a config file key by key, so that no key goes unnoticed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from quamba.errors import QuambaError, nearest, one_of

_REQUIRED: Any = object()


class ConfigFields:
    """Typed access to a JSON object that remembers which keys were asked for.

    ``refuse_rest`` then names the first key that nobody asked for. A wrong type is an error that
    names the key; ``where`` is the name of the object in messages.
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where
        self._known: set[str] = set()

    def ignore(self, keys: Iterable[str]) -> None:
        """Keys that may be there and change nothing."""
        self._known.update(keys)

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        self._known.add(key)
        if key in self.fields:
            return self.fields[key]
        if default is _REQUIRED:
            raise QuambaError(f"{self.where} lacks '{key}'.{nearest(key, set(self.fields) - self._known)}")
        return default

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "an integer")
        return value

    def boolean(self, key: str, default: bool = _REQUIRED) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def positive(self, key: str, default: float = _REQUIRED) -> float:
        value = self.value(key, default)
        if not _is_number(value) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def choice(self, key: str, choices: Iterable[str], default: str = _REQUIRED) -> str:
        value = self.value(key, default)
        choices = list(choices)
        if value not in choices:
            raise one_of(f"'{key}' in {self.where}", value, choices)
        return value

    def rank(self, key: str) -> int:
        """dt_rank: a positive integer, or "auto" (also the default), given as 0."""
        value = self.value(key, "auto")
        if value == "auto":
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._wrong(key, value, "'auto' or a positive integer")
        return value

    def limits(self, key: str) -> tuple[float, float]:
        """A pair [low, high], by default (0, inf). Infinity may be ``Infinity``, null or transformers'
        ``{"__float__": "Infinity"}``."""
        value = self.value(key, (0.0, math.inf))
        if isinstance(value, (list, tuple)) and len(value) == 2:
            low, high = (_decoded(v) for v in value)
            high = math.inf if high is None else high
            if _is_number(low) and _is_number(high):
                return float(low), float(high)
        raise self._wrong(key, value, "two numbers, low and high")

    def refuse_rest(self) -> None:
        for key in self.fields:
            if key not in self._known:
                raise QuambaError(f"Unknown key '{key}' in {self.where}.{nearest(key, sorted(self._known))}")

    def _wrong(self, key: str, value: object, expected: str) -> QuambaError:
        return QuambaError(f"'{key}' in {self.where} is {value!r}, expected {expected}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _decoded(value: object) -> object:
    if isinstance(value, dict) and list(value) == ["__float__"]:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value["__float__"]), value)
    return value
