"""A budget as a user says it: ``14xW4A16``, ``weights=4.2GB``, ``tpot=1.2ms``, ``ttft=80ms``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quamba.errors import QuambaError, nearest, one_of

LABELS = ("W8A8", "W4A8", "W4A16", "FP16")
#: Name of a limit -> unit that is written -> how much it is, in bytes or ms.
_UNITS: dict[str, dict[str, float]] = {
    "weights": {
        "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    },
    "tpot": {"us": 1e-3, "ms": 1, "s": 1e3},
    "ttft": {"us": 1e-3, "ms": 1, "s": 1e3},
}  # fmt: skip
_EXPECTED = "expected a count such as 14xW4A16, or weights=1.4GB, tpot=1.2ms or ttft=80ms"


@dataclass(frozen=True)
class Budget:
    """
    counts  label -> blocks that have it, exactly
    most    "weights" in bytes, "tpot" and "ttft" in ms, as far as they are limited
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {"counts": dict(self.counts), "most": dict(self.most)}


def parse_budget(texts: Sequence[str], base: str) -> Budget:
    """base  the precision of the blocks that the counts leave over"""
    counts: dict[str, int] = {}
    most: dict[str, float] = {}
    for text in [part.strip() for listed in texts for part in listed.split(",")]:
        if (match := re.fullmatch(r"(\d+)[x*](\w+)", text)) is not None:
            label = _label(match[2])
            if label == base:
                raise QuambaError(
                    f"The budget '{text}' counts the blocks of {base}, which are those that are left over;"
                    " expected counts of other precisions."
                )
            _once(label, counts)
            counts[label] = int(match[1])
        elif (match := re.fullmatch(r"(\w+)=([\d.eE+-]+)\s*(\w*)", text)) is not None:
            name, amount = match[1], _amount(match[2], text)
            if name not in _UNITS:
                raise one_of(f"The limit in '{text}'", name, _UNITS)
            unit = match[3]
            if unit not in _UNITS[name]:
                raise one_of(f"The unit in '{text}'", unit, _UNITS[name])
            _once(name, most)
            most[name] = amount * _UNITS[name][unit]
        else:
            raise QuambaError(f"The budget is '{text}', {_EXPECTED}.{nearest(text, _UNITS)}")
    return Budget(counts, most)


def check_label(label: str) -> str:
    """The label in capitals, or the error that lists all."""
    return _label(label)


def _label(text: str) -> str:
    if text.upper() not in LABELS:
        raise one_of("The precision", text, LABELS)
    return text.upper()


def _amount(text: str, whole: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if amount <= 0:
        raise QuambaError(f"The budget is '{whole}', expected a number above 0.")
    return amount


def _once(name: str, taken: Mapping[str, object]) -> None:
    if name in taken:
        raise QuambaError(f"The budget names {name} twice, expected it once.")
