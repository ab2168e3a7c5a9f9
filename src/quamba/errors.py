"""The one exception that users see, and the hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuambaError(Exception):
    """Bad input, said in one sentence: what was wrong, what was expected, the nearest choice.

    The commands print the message and exit with status 2; nothing else is caught there, so a
    traceback always means a defect of ours.
    """


def nearest(value: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'w4a8'?"`` if a choice is close to value, else ``""``."""
    match = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def one_of(what: str, value: object, choices: Iterable[str]) -> QuambaError:
    """The error for a value outside a closed list."""
    choices = list(choices)
    listed = ", ".join(repr(c) for c in choices)
    return QuambaError(f"{what} is {value!r}, expected one of {listed}.{nearest(str(value), choices)}")


def missing_extra(package: str, extra: str, purpose: str) -> QuambaError:
    """The error for an optional dependency that is not installed."""
    return QuambaError(
        f"{purpose} needs the package '{package}', which is not installed; "
        f"install it with: pip install 'quamba[{extra}]'"
    )
