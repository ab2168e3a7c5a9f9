"""Memory that the compiled kernels' activations are in."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from quamba.kernels.cpu import library

#: Page faults of writing 39 MiB, given back and asked for again, as the activations of a prompt are, in a
#: process that keeps nothing (-1 and -3: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) until the library is loaded.
SCRIPT = """
import ctypes, resource, torch
from quamba.kernels.cpu import library

libc = ctypes.CDLL(None)
libc.mallopt(-1, 0)
libc.mallopt(-3, 65536)
library.load()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def write():
    blocks = [torch.ones(mib << 20, dtype=torch.uint8) for mib in (7, 10, 3, 7, 5, 7)]
    del blocks
for _ in range(5):
    write()
before = faults()
for _ in range(10):
    write()
print(faults() - before)
"""


@pytest.mark.skipif(not library.available(), reason="the kernels are not compiled")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    """2 MiB of pages at most, of 390 MiB that are written; unless the user has a setting of their own."""
    plain = {name: value for name, value in os.environ.items() if name not in library._MALLOC_SETTINGS}
    assert faults_of(plain) < 512
    assert faults_of(plain | {"MALLOC_TRIM_THRESHOLD_": "0"}) > 5000


def faults_of(environment: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)
