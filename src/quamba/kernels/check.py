"""Whether kernels are right on this machine: every op on small inputs against its definition in float64."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quamba.formats.activation import Quantized
from quamba.formats.weight import QuantizedWeight
from quamba.kernels import definitions
from quamba.kernels.cases import Case, Draw, all_cases
from quamba.kernels.definitions import Wanted
from quamba.kernels.registry import Kernels

_NOT_RUN = "not run: an earlier failure left the GPU unusable for this process"
_UNINITIALISED = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)
_POISON = 90


@dataclass(frozen=True)
class Check:
    """One case of one op.

    passed   None: it was not run, because an earlier failure made the device unusable
    detail   why it failed or was not run, one line; empty if it passed
    seconds  with compilation, without the definition it was compared with
    """

    op: str
    case: str
    passed: bool | None
    detail: str = ""
    seconds: float = 0.0


def check_backend(kernels: Kernels, device: torch.device, cases: Iterable[Case] | None = None) -> list[Check]:
    """Every case on the device, in order. No failure raises.

    cases  None: all that are worth their time on this kind of device
    """
    checks: list[Check] = []
    chosen = all_cases(device.type) if cases is None else cases
    alive = True
    for case in chosen:
        if not alive:
            checks.append(not_run(case.op, case.name))
            continue
        checks.append(_check(kernels, case, device))
        alive = bool(checks[-1].passed) or is_usable(device)
    return checks


def not_run(op: str, case: str) -> Check:
    return Check(op, case, None, _NOT_RUN)


def is_usable(device: torch.device) -> bool:
    """Whether the device still works; after an illegal address no CUDA call of the process succeeds."""
    try:
        return bool(torch.ones(1, device=device).add_(1).item() == 2)
    except RuntimeError:
        return False


def first_line(error: BaseException) -> str:
    """``ValueError: x is float64`` and the like."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check(kernels: Kernels, case: Case, device: torch.device) -> Check:
    args, named = case.make(Draw(zlib.crc32(f"{case.op} {case.name}".encode())))
    wanted: list[Wanted] = getattr(definitions, case.op)(*args, **named)
    start = time.perf_counter()
    try:
        given, given_named = [_moved(t, device) for t in args], _moved(named, device)
        with torch.inference_mode(), PoisonedAllocations():
            result = getattr(kernels, case.op)(*given, **given_named)
        found = [_back(t) for t in (result if isinstance(result, tuple) else (result,))]
        found += [_back(t) for t in [given_named.pop("state", None)] if t is not None]
        inputs = [t.cpu() for t in _tensors([given, given_named])]
    except Exception as error:
        return Check(case.op, case.name, False, first_line(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    unchanged = _tensors([args, {name: value for name, value in named.items() if name != "state"}])
    faults = _faults(found, wanted, case.tolerance)
    if not all(torch.equal(a, b) for a, b in zip(unchanged, inputs, strict=True)):
        faults.append("it changed its inputs")
    return Check(case.op, case.name, not faults, "; ".join(faults), seconds)


def _faults(found: list[Any], wanted: list[Wanted], tolerance: float) -> list[str]:
    if len(found) != len(wanted):
        return [f"it gave {len(found)} results, expected {len(wanted)}"]
    faults = (_fault(x, w, tolerance) for x, w in zip(found, wanted, strict=True))
    return [f"{w.name}: {fault}" for fault, w in zip(faults, wanted, strict=True) if fault]


def _fault(found: Any, wanted: Wanted, tolerance: float) -> str:
    """What is wrong with one output; empty if nothing is."""
    if not isinstance(found, Tensor):
        return f"it is of type {type(found).__name__}, expected a tensor"
    if found.dtype != wanted.dtype:
        return f"it is {_short(found.dtype)}, expected {_short(wanted.dtype)}"
    if found.shape != wanted.real.shape:
        return f"its shape is {list(found.shape)}, expected {list(wanted.real.shape)}"
    if not found.isfinite().all():
        return f"{int((~found.isfinite()).sum())} of {found.numel()} numbers are not finite"
    if tolerance == 0:
        expected = wanted.codes() if wanted.dtype == torch.int8 else wanted.real.to(wanted.dtype)
        return _first_difference(found, expected, found != expected)
    if wanted.dtype == torch.int8:
        return _wrong_codes(found, wanted, tolerance)
    error = (found.double() - wanted.real).abs()
    allowed = torch.finfo(wanted.dtype).eps * wanted.real.abs() + tolerance * _size(wanted.real)
    return _first_difference(found, wanted.real, error > allowed)


def _wrong_codes(found: Tensor, wanted: Wanted, tolerance: float) -> str:
    """Codes may be one off only where the number is so close to a tie that its error can have moved it."""
    steps = wanted.steps
    if wanted.overflow == "saturate":
        distance = (found.double() - steps.clamp(-128, 127)).abs()
    else:
        distance = ((found.double() - steps + 128).remainder(256) - 128).abs()
    slack = 1e-4 + tolerance * (steps.abs() + _size(steps))
    return _first_difference(found, wanted.codes(), distance > 0.5 + slack)


def _first_difference(found: Tensor, expected: Tensor, wrong: Tensor) -> str:
    count = int(wrong.sum())
    if count == 0:
        return ""
    at = wrong.nonzero()[0].tolist()
    kind = "codes" if found.dtype == torch.int8 else "numbers"
    return (
        f"{count} of {found.numel()} {kind} are wrong, the first at {at}:"
        f" {found[tuple(at)].item():.6g}, expected {expected[tuple(at)].item():.6g}"
    )


def _size(real: Tensor) -> float:
    """The root of the mean square."""
    return float(real.square().mean().sqrt()) if real.numel() else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PoisonedAllocations(TorchFunctionMode):
    """What torch hands out uninitialised becomes NaN or 90, so that gaps in an output show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED:
            result.fill_(float("nan") if result.is_floating_point() else _POISON)
        return result


def _moved(x: Any, device: torch.device) -> Any:
    """A copy on the device, of tensors and of what holds some."""
    if isinstance(x, Tensor):
        return x.to(device, copy=True)
    if isinstance(x, Quantized):
        return Quantized(_moved(x.codes, device), _moved(x.scale, device))
    if isinstance(x, QuantizedWeight):  # a module moves itself, not a copy
        return copy.deepcopy(x).to(device)
    if isinstance(x, dict):
        return {name: _moved(value, device) for name, value in x.items()}
    return x


def _back(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def _tensors(x: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, QuantizedWeight):
        yield from x.buffers()
    elif isinstance(x, dict | list | tuple):
        for item in x.values() if isinstance(x, dict) else x:
            yield from _tensors(item)
