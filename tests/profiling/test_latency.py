"""What a timed run is, how many there are, and the statistics of them. No speed is asserted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from emulated_graphs import emulate_graphs
from tiny_models import tiny_config, tiny_model
from torch import Tensor

from quamba.models.lm import MambaLM
from quamba.profiling.latency import WARMUPS, greedy, greedy_graph, job, measure, percentile, summary
from quamba.profiling.spec import Mode, ProfileSpec
from quamba.quantization.pipeline import Silent
from quamba.runtime.generate import generate, prefill

SPEC = ProfileSpec(batch_size=2, prompt_len=6, gen_len=4, repeats=3, max_seconds=1e6, seed=5)


@pytest.fixture(params=["mamba", "mamba2"])
def network(request: pytest.FixtureRequest) -> MambaLM:
    return tiny_model(tiny_config(request.param, tie_embeddings=False))


def watch(network: MambaLM) -> list[Tensor]:
    """The ids of every forward pass from now on."""
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    return seen


def drawn(spec: ProfileSpec, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(spec.seed)
    return [torch.randint(61, (spec.batch_size, spec.prompt_len), generator=generator) for _ in range(count)]


def test_ttft_is_one_prefill_of_a_fresh_prompt(network: MambaLM) -> None:
    seen = watch(network)
    found = measure(network, "ttft", SPEC, Silent())
    assert (found.warmups, found.runs, found.repeats) == (10, 3, 3)
    assert found.tokens_per_run == 12
    assert len(seen) == 13
    assert all(torch.equal(a, b) for a, b in zip(seen, drawn(SPEC, 13), strict=True))


def test_tpot_is_one_step_after_the_prompt(network: MambaLM) -> None:
    seen = watch(network)
    found = measure(network, "tpot", SPEC, Silent())
    assert found.tokens_per_run == 2
    assert [tuple(ids.shape) for ids in seen] == [(2, 6)] + 13 * [(2, 1)]
    logits, _ = prefill(network, seen[0])
    assert torch.equal(seen[1][:, 0], logits[:, :61].argmax(-1))


def test_tpot_goes_on_from_the_cache(network: MambaLM) -> None:
    work = job(network, "tpot", SPEC)
    (prompt,) = drawn(SPEC, 1)
    chosen = work.run(work.prepare())
    assert isinstance(chosen, Tensor)
    assert torch.equal(chosen, greedy(network, prompt, 2)[:, 1])


def test_ttlt_is_a_prefill_and_all_steps_but_one(network: MambaLM) -> None:
    seen = watch(network)
    found = measure(network, "ttlt", SPEC, Silent())
    assert (found.warmups, found.runs, found.tokens_per_run) == (5, 3, 8)
    assert [ids.shape[1] for ids in seen] == 8 * [6, 1, 1, 1]
    assert not torch.equal(seen[0], seen[4])


def test_the_tokens_are_those_of_generate(network: MambaLM) -> None:
    (prompt,) = drawn(SPEC, 1)
    expected = [row.ids for row in generate(network, None, prompt, max_new_tokens=4).collect()]
    assert greedy(network, prompt, 4).tolist() == expected
    assert greedy(network, prompt, 1).tolist() == [ids[:1] for ids in expected]


def test_graphs_do_what_is_done_without_them(network: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are replayed from the first run on; steps are those of one prompt, and of each."""
    plain = dataclasses.replace(SPEC, cuda_graph=False)
    expected = {mode: job(network, mode, plain) for mode in WARMUPS}
    graphs = emulate_graphs(monkeypatch)
    for mode, replays in (("ttft", 1), ("tpot", 1), ("ttlt", SPEC.gen_len)):
        work = job(network, mode, SPEC)
        for _ in range(3):
            graphs.replayed.clear()
            found = work.run(work.prepare())
            wanted = expected[mode].run(expected[mode].prepare())
            if mode == "ttft":
                found, wanted = found[0], wanted[0]
            if mode != "tpot":
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert len(graphs.replayed) == replays
    assert len(graphs.captured) == 3, "of the prompts, and of the steps of tpot and ttlt"


def test_steps_as_graphs_are_eager_steps(network: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = drawn(SPEC, 1)
    expected = greedy(network, prompt, 6)
    graphs = emulate_graphs(monkeypatch)
    step = greedy_graph(network, 2)
    for _ in range(2):
        assert torch.equal(greedy(network, prompt, 6, step), expected)
    work = job(network, "tpot", SPEC)
    found = [work.run(work.prepare()).clone() for _ in range(5)]
    assert torch.equal(torch.stack(found, dim=1), expected[:, 1:])
    assert len(graphs.captured) == 3


@pytest.mark.parametrize("mode", WARMUPS)
def test_no_time_still_gives_one_run(network: MambaLM, mode: Mode) -> None:
    found = measure(network, mode, dataclasses.replace(SPEC, max_seconds=1e-9), Silent())
    assert (found.warmups, found.runs, found.repeats) == (1, 1, 3)
    assert found.p5_ms == found.median_ms == found.p95_ms == found.mean_ms > 0


def test_prompts_keep_out_of_the_padding_of_the_vocabulary() -> None:
    network = tiny_model(tiny_config("mamba2", vocab_size=3))
    prepared = job(network, "ttft", dataclasses.replace(SPEC, prompt_len=200)).prepare()
    assert prepared.unique().tolist() == [0, 1, 2]


def test_summary() -> None:
    times = [4.0, 1.0, 2.0, 3.0, 100.0]
    found = summary("tpot", times, tokens_per_run=6, mj_per_token=None, warmups=1, repeats=9)
    assert (found.median_ms, found.mean_ms) == (3.0, 22.0)
    assert found.tokens_per_s == 2000.0
    assert (found.runs, found.repeats) == (5, 9)
    assert found.p5_ms == pytest.approx(1.2)
    assert found.p95_ms == pytest.approx(80.8)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("percent", [0, 5, 50, 95, 100])
def test_percentile_is_numpys(count: int, percent: int) -> None:
    values = torch.rand(count, dtype=torch.float64).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)
