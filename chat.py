"""Talk with a Mamba or Mamba-2 model: ``python chat.py --help``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("quamba") is None:  # not installed: run from the source tree
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from quamba.cli.chat import command

if __name__ == "__main__":
    command()
