"""Times of a prefill, of a decode step and of both together."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.profiling.machine import energy_of_run_mj
from quamba.profiling.spec import Mode, ProfileSpec
from quamba.quantization.pipeline import Progress
from quamba.runtime.choice import Choice, Chooser
from quamba.runtime.graph import DecodeGraph, graph_wanted
from quamba.runtime.prefill import prefill
from quamba.runtime.sampling import SamplingParams
from quamba.runtime.step import step_of

#: Untimed runs before the timed ones, fewer where they would take this share of the mode's time.
WARMUPS: dict[Mode, int] = {"ttft": 10, "tpot": 10, "ttlt": 5}
WARMUP_SHARE = 0.25
#: Runs whose energy is measured follow the timed ones for so long, or for this share of the mode's time.
ENERGY_SECONDS, ENERGY_SHARE = 1.0, 0.25


@dataclass(frozen=True)
class Job:
    """What one timed run is.

    prepare  makes the input of the next run; not timed
    run      the work, on the device that the input is on; need not wait for it
    tokens   that a run reads (ttft) or makes (tpot, ttlt), of the whole batch
    """

    prepare: Callable[[], Tensor]
    run: Callable[[Tensor], object]
    tokens: int


@dataclass(frozen=True)
class Latency:
    """Times of one mode.

    tokens_per_run       prompt tokens read (ttft) or new tokens (tpot, ttlt), of the whole batch
    tokens_per_s         tokens_per_run by the median
    mj_per_token         energy of the GPU in millijoules, over a second of runs without a pause, idle power
                         included; None where it cannot be read
    warmups, runs        done; ``repeats`` runs were asked for
    """

    mode: Mode
    median_ms: float
    mean_ms: float
    p5_ms: float
    p95_ms: float
    tokens_per_run: int
    tokens_per_s: float
    mj_per_token: float | None
    warmups: int
    runs: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def job(network: MambaLM, mode: Mode, spec: ProfileSpec) -> Job:
    """A fresh random prompt for each run of ttft and ttlt; tpot goes on from one prompt, step after step.

    As CUDA graphs, prompts and steps are captured now or in the first run.
    """
    prompts = _random_prompts(network, spec)
    graphs = graph_wanted(spec.cuda_graph, network)
    if mode == "ttft":
        return Job(
            lambda: next(prompts),
            lambda ids: prefill(network, ids, graph=graphs),
            spec.batch_size * spec.prompt_len,
        )
    step = greedy_graph(network, spec.batch_size) if graphs else None
    if mode == "ttlt":
        return Job(
            lambda: next(prompts),
            lambda ids: greedy(network, ids, spec.gen_len, step),
            spec.batch_size * spec.gen_len,
        )
    assert mode == "tpot", mode
    logits, cache = prefill(network, next(prompts), graph=False)
    token = _choose(network, logits)
    if step is not None:
        graph = _begun(step, token, cache)
        return Job(lambda: graph.ids, lambda _: graph.advance(), spec.batch_size)
    eager = _eager_step(network, cache)
    return Job(lambda: token, lambda ids: _choose(network, eager(ids)), spec.batch_size)


def greedy_graph(network: MambaLM, batch: int) -> DecodeGraph:
    """The step of a batch with the choice of the most likely ids."""
    greedy = SamplingParams()
    chooser = Chooser(batch, network.config.vocab_size, greedy.rules, network.device)
    chooser.begin(Choice(network.config.vocab_size, greedy, [()] * batch, ()))
    return DecodeGraph(network, batch, chooser)


def greedy(network: MambaLM, prompt: Tensor, gen_len: int, step: DecodeGraph | None = None) -> Tensor:
    """prompt (B, L) int64 -> the new ids (B, gen_len), chosen on the device, end-of-text tokens or not.

    step  ``greedy_graph`` of the batch size, or None: no CUDA graphs
    """
    logits, cache = prefill(network, prompt, graph=step is not None)
    tokens = [_choose(network, logits)]
    if step is not None:
        _begun(step, tokens[0], cache)
        tokens += [step.advance().clone() for _ in range(gen_len - 1)]
        return torch.stack(tokens, dim=1)
    eager = _eager_step(network, cache)
    for _ in range(gen_len - 1):
        tokens.append(_choose(network, eager(tokens[-1])))
    return torch.stack(tokens, dim=1)


@torch.inference_mode()
def _eager_step(network: MambaLM, cache: MambaCache) -> Callable[[Tensor], Tensor]:
    """As ``generate`` takes steps without graphs."""
    return torch.inference_mode()(step_of(network, cache))


def _begun(step: DecodeGraph, ids: Tensor, cache: MambaCache) -> DecodeGraph:
    step.ids.copy_(ids)
    step.take(cache)
    return step


@torch.inference_mode()
def measure(network: MambaLM, mode: Mode, spec: ProfileSpec, progress: Progress) -> Latency:
    start = time.perf_counter()

    def remaining(share: float) -> bool:
        return time.perf_counter() - start < share * spec.max_seconds

    device = network.device
    work = job(network, mode, spec)
    progress.stage(mode, spec.repeats)
    warmups = 0
    while warmups == 0 or (warmups < WARMUPS[mode] and remaining(WARMUP_SHARE)):
        timed_ms(work, device)
        warmups += 1
    times_ms: list[float] = []
    while not times_ms or (len(times_ms) < spec.repeats and remaining(1.0)):
        times_ms.append(timed_ms(work, device))
        progress.step()
    energy_mj = energy_of_run_mj(
        device,
        lambda: work.run(work.prepare()),
        statistics.median(times_ms) / 1e3,
        min(ENERGY_SECONDS, ENERGY_SHARE * spec.max_seconds),
    )
    return summary(
        mode,
        times_ms,
        tokens_per_run=work.tokens,
        mj_per_token=None if energy_mj is None else energy_mj / work.tokens,
        warmups=warmups,
        repeats=spec.repeats,
    )


def timed_ms(work: Job, device: torch.device) -> float:
    """Milliseconds of one run from its start until the device is done: CUDA events, or the CPU's clock."""
    ids = work.prepare()
    if device.type != "cuda":
        start = time.perf_counter()
        work.run(ids)
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work.run(ids)
        last.record()
        torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def summary(
    mode: Mode,
    times_ms: Sequence[float],
    *,
    tokens_per_run: int,
    mj_per_token: float | None,
    warmups: int,
    repeats: int,
) -> Latency:
    median_ms = statistics.median(times_ms)
    return Latency(
        mode=mode,
        median_ms=median_ms,
        mean_ms=statistics.fmean(times_ms),
        p5_ms=percentile(times_ms, 5),
        p95_ms=percentile(times_ms, 95),
        tokens_per_run=tokens_per_run,
        tokens_per_s=1e3 * tokens_per_run / median_ms,
        mj_per_token=mj_per_token,
        warmups=warmups,
        runs=len(times_ms),
        repeats=repeats,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two values nearest to the rank percent / 100 * (n - 1), linearly."""
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def _random_prompts(network: MambaLM, spec: ProfileSpec) -> Iterator[Tensor]:
    """(batch_size, prompt_len) int64 ids of the vocabulary, without its padding, for ever."""
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.batch_size, spec.prompt_len)
    for _ in itertools.count():
        yield torch.randint(network.config.vocab_size, shape, generator=generator).to(network.device)


def _choose(network: MambaLM, logits: Tensor) -> Tensor:
    """The most likely ids (B,) int64, none of the table's padding rows."""
    return logits[:, : network.config.vocab_size].argmax(dim=-1)
