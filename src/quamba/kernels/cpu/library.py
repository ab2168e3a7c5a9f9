"""The compiled kernels: where they are, whether they are of this version, and running them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from quamba.errors import QuambaError, one_of
from quamba.kernels.cpu.abi import ABI, OPS, Op

_FILE = "_quamba_cpu.so"
#: Another build of the library, for those who work on it.
_OTHER_FILE = "QUAMBA_CPU_LIBRARY"


class _Entry(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("args", ctypes.c_void_p))


#: Of glibc's ``mallopt``: free bytes at the end of the heap that are kept, and bytes from which a block is no
#: part of the heap (32 MiB is the most that it takes).
_TRIM, _KEPT = -1, 256 << 20
_MMAP, _LARGE = -3, 32 << 20
#: With one of these, the user decides.
_MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none: the end of a sentence."""
    path = Path(os.environ.get(_OTHER_FILE) or Path(__file__).with_name(_FILE))
    if not path.is_file():
        return "they are not built; install the package again where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"'{path}' cannot be loaded ({error})"
    library.qb_size_of.argtypes, library.qb_size_of.restype = (ctypes.c_int64,), ctypes.c_int64
    library.qb_run.argtypes, library.qb_run.restype = (ctypes.c_void_p, ctypes.c_int64), None
    library.qb_read.argtypes, library.qb_read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    library.qb_set_threads.argtypes, library.qb_set_threads.restype = (ctypes.c_int,), None
    library.qb_use_instruction_set.argtypes = (ctypes.c_char_p,)
    library.qb_instruction_set.restype = library.qb_instruction_sets.restype = ctypes.c_char_p
    sizes = [library.qb_size_of(op.kind) for op in OPS]
    if library.qb_abi() != ABI or sizes != [ctypes.sizeof(op) for op in OPS]:
        return f"'{path}' is of another version of this package; install the package again"
    if not library.qb_instruction_sets():
        return "this processor has none of the instruction sets that they are built for"
    _keep_freed_memory()
    return library


def _keep_freed_memory() -> None:
    """The activations of a prompt take the memory of those before them.

    By default glibc gives much of it back to the system and asks for it again, page by page: thousands of
    page faults a prompt, 2 to 3 % of its time with two threads. Other C libraries are left as they are.
    """
    if any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM, _KEPT)
        mallopt(_MMAP, _LARGE)


def available() -> bool:
    return not isinstance(load(), str)


def _library() -> ctypes.CDLL:
    library = load()
    if isinstance(library, str):
        raise QuambaError(f"The CPU kernels cannot be used: {library}.")
    return library


class Program:
    """Ops in order, on fixed buffers, run by one call. ``keep`` holds what their pointers point to."""

    def __init__(self, ops: Sequence[Op], keep: object = None) -> None:
        self._ops, self._keep = tuple(ops), keep
        self._entries = (_Entry * len(self._ops))(
            *(_Entry(op.kind, ctypes.addressof(op)) for op in self._ops)
        )
        self._run, self._address = _library().qb_run, ctypes.addressof(self._entries)

    def __len__(self) -> int:
        return len(self._ops)

    def __call__(self) -> None:
        _follow_torch()
        self._run(self._address, len(self._ops))


class _Recorder(threading.local):
    ops: list[Op] | None = None


_RECORDER = _Recorder()


@contextlib.contextmanager
def recording() -> Iterator[list[Op]]:
    """Until its end, ops of this thread are put in a list instead of run (``kernels/cpu/recording.py``)."""
    before, _RECORDER.ops = _RECORDER.ops, []
    try:
        yield _RECORDER.ops
    finally:
        _RECORDER.ops = before


def is_recording() -> bool:
    """Whether inputs are not there yet."""
    return _RECORDER.ops is not None


def run(op: Op) -> None:
    """One op: at once, or later if a program is recorded."""
    if _RECORDER.ops is not None:
        _RECORDER.ops.append(op)
        return
    _follow_torch()
    entry = _Entry(op.kind, ctypes.addressof(op))
    _library().qb_run(ctypes.addressof(entry), 1)


def instruction_sets() -> list[str]:
    """Those that this machine runs, best first."""
    return _library().qb_instruction_sets().decode().split(",")


def instruction_set() -> str:
    return str(_library().qb_instruction_set().decode())


def use_instruction_set(name: str) -> None:
    """For tests and comparisons: the best one is used without being asked for."""
    if _library().qb_use_instruction_set(name.encode()):
        raise one_of("The instruction set", name, instruction_sets())


class _Threads:
    """How many there are, and what asked for them: torch's setting, or a number of its own."""

    now = 1
    asked: int | None = None


def _follow_torch() -> None:
    wanted = _Threads.asked or torch.get_num_threads()
    if wanted != _Threads.now:
        _library().qb_set_threads(wanted)
        _Threads.now = wanted


def threads() -> int:
    """Threads of the next op: as many as torch uses, unless ``set_threads`` said otherwise."""
    return _Threads.asked or torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """None: as many as torch uses, ``torch.set_num_threads``."""
    _Threads.asked = count


def read_memory(address: int, size: int) -> None:
    """Read bytes once on all threads: what the bandwidth of reading is measured with."""
    _follow_torch()
    _library().qb_read(address, size)
