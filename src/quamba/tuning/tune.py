"""The search for launches: every candidate is checked, then timed, and the fastest is written down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from quamba.errors import one_of
from quamba.kernels.check import first_line, is_usable
from quamba.models.lm import MambaLM
from quamba.runtime.graph import capture
from quamba.tuning.trials import Force, Trial, trials

if TYPE_CHECKING:
    from quamba.kernels.triton.launch_tables import Key
    from quamba.kernels.triton.launches import Asked, LaunchChoice

#: What another launch must save to be taken: less is within the noise of a clock.
_WORTH = 0.02
#: Calls in one graph, replays of it, and seconds that all of them may take.
_CALLS, _REPLAYS, _SECONDS = 20, 15, 0.3

#: Microseconds of one run, the mean over all of them in turn.
Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class Found:
    """What became of one key.

    sizes    the key, by name
    us       by launch, of those that gave right results
    wrong    by launch: what was wrong, or why it did not run
    """

    op: str
    key: Key
    sizes: Mapping[str, str | int]
    before: Any
    us: dict[Any, float]
    wrong: dict[Any, str] = field(default_factory=dict)

    @property
    def best(self) -> Any:
        """The fastest; the one before where that is about as fast; None where none was right."""
        fastest = min(self.us, key=lambda launch: self.us[launch], default=None)
        before = self.us.get(self.before)
        if before is not None and self.us[fastest] > (1 - _WORTH) * before:
            return self.before
        return fastest


def fields_of(launch: Any) -> dict[str, int]:
    """Those that are not at their defaults."""
    fields = dataclasses.fields(launch)
    return {f.name: getattr(launch, f.name) for f in fields if getattr(launch, f.name) != f.default}


class LostError(Exception):
    """A candidate left the GPU unusable for this process."""


def tunable() -> dict[str, LaunchChoice[Any]]:
    """Choices with candidates, by name."""
    from quamba.kernels.triton.launches import choices

    return {name: choice for name, choice in choices().items() if choice.candidates is not None}


def check_ops(ops: Sequence[str]) -> list[str]:
    """Names of choices, from names and from the parts before their dots; all for none."""
    known = tunable()
    for op in ops:
        if op not in known and not any(name.startswith(f"{op}.") for name in known):
            raise one_of("The op to tune", op, known)
    return [name for name in known if not ops or name in ops or name.split(".")[0] in ops]


def search(
    networks: Sequence[MambaLM],
    rows: Sequence[int],
    ops: Collection[str],
    *,
    timer: Timer,
    is_known: Callable[[str, Key], bool],
    is_over: Callable[[], bool],
) -> Iterator[Found]:
    """One result for each op and key that the networks ask for and that is not known, until time is over.

    A key that time was too short for has no result. ``LostError`` comes after the result of what was measured
    before the GPU was lost.
    """
    for trial, asked in unknown(networks, rows, ops, is_known):
        if is_over():
            return
        found, lost = _measure(trial, asked, timer, is_over)
        if found is not None:
            yield found
        if lost:
            raise LostError(f"A candidate for '{asked.choice.name}' left the GPU unusable: {lost}.")


def unknown(
    networks: Sequence[MambaLM],
    rows: Sequence[int],
    ops: Collection[str],
    is_known: Callable[[str, Key], bool],
    *,
    only_ask: bool = False,
) -> Iterator[tuple[Trial, Asked]]:
    """The choices that are made for so many rows, each once, with a call that makes it.

    only_ask  run nothing to find out: a call then shows the first of its choices only
    """
    from quamba.kernels.triton.launches import asked

    seen: set[tuple[str, Key]] = set()
    for trial in (t for n in rows for network in networks for t in trials(network, n, _first_parts(ops))):
        own = [op for op in ops if op == trial.op or op.startswith(f"{trial.op}.")]
        if not own:
            continue
        with torch.inference_mode(), asked(stop_at=own if only_ask else ()) as made:
            if only_ask:
                trial.compile(nullcontext)
            else:
                trial.run()
        for found in made:
            op, key = found.choice.name, found.key
            if op in own and (op, key) not in seen and not is_known(op, key):
                seen.add((op, key))
                yield trial, found


def _first_parts(ops: Collection[str]) -> set[str]:
    return {op.split(".")[0] for op in ops}


def candidates(asked: Asked) -> list[Any]:
    """What is tried for a choice: first what is chosen now."""
    assert asked.choice.candidates is not None
    others = asked.choice.candidates(**asked.arguments)
    return list(dict.fromkeys([asked.launch, *others]))


def _measure(
    trial: Trial, asked: Asked, timer: Timer, is_over: Callable[[], bool]
) -> tuple[Found | None, str | None]:
    """None where time was over; and why the GPU is lost, if it is."""
    sizes = dict(zip(asked.choice.schema.key, asked.key, strict=True))
    found = Found(asked.choice.name, asked.key, sizes, asked.launch, {})
    for launch in candidates(asked):
        if is_over():
            return None, None
        force: Force = partial(asked.choice.forced, launch)
        try:
            with torch.inference_mode():
                fault = trial.fault(force)
                if fault is None:
                    runs = trial.runs(force)
                    with force():
                        found.us[launch] = timer(runs)
                else:
                    found.wrong[launch] = fault
        except Exception as error:  # too large for a multiprocessor, or a compiler's defect
            found.wrong[launch] = first_line(error)
            if not is_usable(trial.device):
                return found, f"{launch} gave {found.wrong[launch]}"
    return found, None


class GraphTimer:
    """Replays of a CUDA graph of many runs: the median."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, runs: Sequence[Callable[[], object]]) -> float:
        calls = max(_CALLS, len(runs))

        def all_runs() -> None:
            for i in range(calls):
                runs[i % len(runs)]()

        graph = capture(all_runs, self._device, warm_ups=1)
        times: list[float] = []
        until = time.perf_counter() + _SECONDS
        while len(times) < 3 or (len(times) < _REPLAYS and time.perf_counter() < until):
            times.append(self._replay_us(graph.replay))
        return sorted(times)[len(times) // 2] / calls

    def _replay_us(self, replay: Callable[[], None]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        last.synchronize()
        return 1e3 * float(first.elapsed_time(last))
