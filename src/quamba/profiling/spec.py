"""What to measure, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quamba.errors import QuambaError, one_of

Mode = Literal["size", "ttft", "tpot", "ttlt"]
MODES: tuple[Mode, ...] = ("size", "ttft", "tpot", "ttlt")


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """
    modes        size: bytes of weights and caches; ttft: one prefill, logits of the last token only;
                 tpot: one decode step after prompt_len tokens; ttlt: a prefill and gen_len - 1 decode steps
    batch_size   sequences at once
    prompt_len   tokens of each prompt
    gen_len      new tokens of a ttlt run
    repeats      timed runs of each mode, fewer where max_seconds ends them
    max_seconds  time of each mode, warm-ups included; one warm-up and one timed run are always done
    seed         of the random prompts
    cuda_graph   replay prompts and steps as CUDA graphs; None: on a GPU with kernels of its own
    """

    modes: tuple[Mode, ...] = MODES
    batch_size: int = 1
    prompt_len: int = 1024
    gen_len: int = 128
    repeats: int = 100
    max_seconds: float = 60.0
    seed: int = 1234
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        if not self.modes:
            raise QuambaError(f"There is nothing to profile, expected one or more of {', '.join(MODES)}.")
        for mode in self.modes:
            if mode not in MODES:
                raise one_of("The profiling mode", mode, MODES)
        for name, least in (
            ("batch_size", 1),
            ("prompt_len", 1),
            ("gen_len", 1),
            ("repeats", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise QuambaError(f"{name} is {value!r}, expected an integer of at least {least}.")
        if not self.max_seconds > 0:
            raise QuambaError(f"max_seconds is {self.max_seconds!r}, expected a number above 0.")

    @property
    def timed_modes(self) -> tuple[Mode, ...]:
        """Those that run the model, in the order they are run."""
        return tuple(mode for mode in MODES if mode in self.modes and mode != "size")
