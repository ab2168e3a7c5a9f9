"""One JSON file a run."""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError


def check_log_dir(folder: str | None) -> None:
    """Refuse a log folder that is a file, before the work that would be lost."""
    if folder is not None and Path(folder).expanduser().exists() and not Path(folder).expanduser().is_dir():
        raise QuambaError(f"--log_dir '{folder}' is a file, expected a folder.")


def write_log(folder: str | Path, name: str, record: Mapping[str, Any]) -> Path:
    """Write ``{folder}/{name}-{date}-{time}-{tag}.json`` in one step and return its path.

    The random tag keeps runs of the same second apart. Infinity and NaN, which JSON does not have, become
    strings.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(record), indent=2, allow_nan=False) + "\n"
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.json"
    draft = path.with_name(f".{path.name}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def versions() -> dict[str, str]:
    import torch

    from quamba import __version__

    return {
        "quamba": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def jsonable(value: Any) -> Any:
    """The value with infinity and NaN as strings, as JSON wants it."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
