"""Kernels of published sizes compile for GPUs that are not at hand, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled_for.py")
#: Bytes that a program can have of the shared memory of a multiprocessor, by compute capability: GeForce RTX
#: 30 and RTX 50. A100 (8.0), Orin (8.7) and RTX 40 (8.9, as 8.6) have as much or more.
SHARED_MEMORY = {86: 101376, 120: 101376}
#: Models, and what they do: steps of one, some and many sequences, prompts of few and of many tiles.
SPECS = [
    "mamba2-2.7b,w4a8,int8,1x1,16x1,64x1,1x512,1x2048",
    "mamba2-2.7b,w8a8,fp16,64x1,1x512,1x2048",
    "mamba-2.8b,w4a16,fp16,1x1,16x1,1x200",
]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *SPECS],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failed"]
    assert found["kernels"] > 60 and {"_tiles", "_states_kernel", "_scan_kernel"} <= set(found["shared"])
    assert ("_wide" in found["shared"]) == (capability >= 90)
    too_large = {name: size for name, size in found["shared"].items() if size > SHARED_MEMORY[capability]}
    assert not too_large
