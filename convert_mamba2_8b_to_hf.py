"""Make a float model of NVIDIA's Megatron checkpoint: ``python convert_mamba2_8b_to_hf.py --help``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("quamba") is None:  # not installed: run from the source tree
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from quamba.cli.convert_megatron import published_command

if __name__ == "__main__":
    published_command()
