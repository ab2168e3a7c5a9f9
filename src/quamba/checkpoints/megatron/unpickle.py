"""Reading one file of a Megatron checkpoint without running anything that it names."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.checkpoints.tensors import broken_file
from quamba.errors import QuambaError

#: Training state beside the weights holds objects of these packages and classes. They are never imported:
#: each object becomes an ``Inert``. What torch allows itself (tensors, numbers, texts, containers) is read;
#: any other name refuses the file.
_INERT_PACKAGES = ("megatron", "transformer_engine", "apex", "numpy")
_INERT_CLASSES = frozenset(
    {
        "_io.BytesIO",
        "builtins.getattr",  # of enums, as Python 3.11.0 to 3.11.3 write them; an Inert looks nothing up
        "datetime.timedelta",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "torch._C.Generator",
        "types.SimpleNamespace",
    }
)
#: Python writes a signal as its class and number, or as its name.
_SIGNAL = re.compile(r"signal\.(Signals|SIG[A-Z0-9]+)")
_ARGUMENTS = "argparse.Namespace"
#: Of transformer_engine: how float8 was scaled in training, or nothing.
_EXTRA_STATE = "_extra_state"


class Inert:
    """Stands for an object of a class that is not imported. It takes anything and keeps nothing."""

    def __new__(cls, *values: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class RankContent:
    """What one file holds of the model.

    arguments  of the training run, by name; empty if the file has none
    tensors    by Megatron's names, mapped from the file: nothing is read before it is used
    iteration  of the training run, or None
    """

    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    iteration: int | None


def read_rank(path: Path) -> RankContent:
    """Map one ``model_optim_rng.pt``.

    Raises QuambaError in one sentence for a file that is no checkpoint, that names code, that holds no model,
    or that is larger than the system maps.
    """
    content = _mapped(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = (
            ", ".join(sorted(map(str, content))[:5]) if isinstance(content, dict) else type(content).__name__
        )
        raise QuambaError(
            f"'{path}' holds {found or 'nothing'}, expected the 'model' of a Megatron checkpoint."
        )
    tensors = {}
    for name, value in content["model"].items():
        if str(name).endswith(_EXTRA_STATE):
            continue
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else "an object"
            raise QuambaError(f"'{name}' in '{path}' is {kind}, expected a tensor of floats.")
        tensors[str(name)] = value.detach()
    arguments = content.get("args")
    iteration = content.get("iteration")
    return RankContent(
        vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        tensors,
        iteration if isinstance(iteration, int) else None,
    )


def _mapped(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        raise QuambaError(f"{broken_file(path, 'PyTorch checkpoint of torch 1.6 or newer')}.")
    try:
        allowed = _allowed(path, torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, QuambaError):
        raise
    except Exception as error:  # a malformed pickle can raise anything
        if "unable to mmap" in str(error):
            raise QuambaError(
                f"The system does not map '{path}' ({path.stat().st_size / 1e9:.1f} GB): by default it maps "
                "files up to the size of RAM and swap; 'sysctl vm.overcommit_memory=1' lifts that."
            ) from error
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refused(path, named[1]) from error
        raise QuambaError(f"{broken_file(path, 'PyTorch checkpoint')}.") from error


def _allowed(path: Path, names: list[str]) -> list[Any]:
    """The names that a pickle uses beyond those that torch allows, each with what stands for it."""
    allowed: list[Any] = []
    for name in sorted(names):
        if name == _ARGUMENTS:
            allowed.append((argparse.Namespace, name))
        elif name.split(".")[0] in _INERT_PACKAGES or name in _INERT_CLASSES or _SIGNAL.fullmatch(name):
            allowed.append((Inert, name))
        else:
            raise _refused(path, name)
    return allowed


def _refused(path: Path, name: str) -> QuambaError:
    return QuambaError(
        f"'{path}' is refused: its pickle names '{name}', and besides data only classes of "
        f"{', '.join(_INERT_PACKAGES)} are expected; nothing of it was run."
    )
