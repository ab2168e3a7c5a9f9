"""Decoding as graphs: the ids of eager steps, and the device never waits."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_graphs import Graphs, emulate_graphs
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, rounded, shipped, with_state

from quamba.checkpoints.tokenizer import Tokenizer
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime import choice, decode
from quamba.runtime import graph as graph_module
from quamba.runtime.generate import Run, generate
from quamba.runtime.graph import DecodeGraph, PrefillGraph, graph_wanted
from quamba.runtime.prefill import prefill
from quamba.runtime.sampling import SamplingParams

PROMPTS = [[5, 9, 2], [17], [40, 3, 3, 60, 21, 8, 11, 30, 1], [7, 7, 12, 50]]
SETTINGS = {
    "greedy": SamplingParams(),
    "greedy-penalty": SamplingParams(repetition_penalty=1.5),
    "free": SamplingParams(top_k=0, temperature=2.0),
    "everything": SamplingParams(top_k=20, temperature=2.0, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
}


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return emulate_graphs(monkeypatch)


@functools.cache
def original(family: str, integers: bool) -> MambaLM:
    config = tiny_config(family, tie_embeddings=False)
    if not integers:
        return tiny_model(config)
    recipe = with_state(rounded(shipped("w8a8", config)), "int8")
    return quantize_model(tiny_model(config), recipe, calibration_set(config))[0]


def model(family: str, integers: bool = False) -> MambaLM:
    return copy.deepcopy(original(family, integers))


def asked(network: MambaLM, prompts: Any = PROMPTS, **options: Any) -> Run:
    """With graphs; they are wanted by default where there are any."""
    options = {"max_new_tokens": 12, "seed": 1, **options}
    tokenizer = options.pop("tokenizer", None)
    return generate(network, tokenizer, prompts, **options)


def eager(run: Run) -> list[list[int]]:
    return [generation.ids for generation in replace(run, cuda_graph=False).collect()]


def ids_of(run: Run) -> list[list[int]]:
    return [generation.ids for generation in run.collect()]


# The same ids


@pytest.mark.parametrize("integers", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", SETTINGS)
def test_graphs_choose_what_eager_steps_choose(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, family: str, integers: bool, name: str
) -> None:
    """Captured in the first run; the second one reads its prompt as a graph, too."""
    monkeypatch.setattr(choice, "DRAWS", 5)
    run = asked(model(family, integers), sampling=SETTINGS[name])
    expected = eager(run)
    assert len(graphs.replayed) == 0 and len({tuple(row) for row in expected}) == 4
    for replays in (11, 12, 12):
        graphs.replayed.clear()
        assert ids_of(run) == expected
        assert len(graphs.replayed) == replays
    assert len(graphs.captured) == 2


def test_a_graph_serves_other_numbers_of_the_same_rules(graphs: Graphs) -> None:
    """Temperatures and the like are read from memory; what they switch on and off needs another capture."""
    network = model("mamba2")
    for temperature in (2.0, 1.0, 3.0):
        for penalty in (1.2, 5.0):
            params = replace(SETTINGS["everything"], temperature=temperature, repetition_penalty=penalty)
            run = asked(network, sampling=params)
            assert ids_of(run) == eager(run)
    decoding = len(graphs.captured) - 1  # one is of the prompts
    assert decoding == 1
    run = asked(network, sampling=replace(SETTINGS["everything"], repetition_penalty=1.0))
    assert ids_of(run) == eager(run)
    assert len(graphs.captured) == 3


def test_the_prompts_graph_and_the_steps_graph_share_states(graphs: Graphs, family: str) -> None:
    """The capture of the second overwrites what the first one read."""
    network = model(family, integers=True)
    run = asked(network)
    prefill(network, torch.tensor([[1, 2, 3]] * 4), graph=True)
    assert ids_of(run) == eager(run)
    assert len(graphs.captured) == 2


def test_prompts_in_pieces(graphs: Graphs, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr("quamba.runtime.prefill.PREFILL_PIECE", 64)
    network = model(family, integers=True)
    prompts = [torch.randint(61, (n,)).tolist() for n in (150, 80)]
    run = asked(network, prompts)
    expected = eager(run)
    for captured in (1, 2, 2):
        assert ids_of(run) == expected
        assert len(graphs.captured) == captured


def test_ends_are_those_of_eager_runs(
    graphs: Graphs, tiny_tokenizer_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quamba.checkpoints.tokenizer import load_tokenizer

    network = model("mamba2")
    free = eager(asked(network, sampling=SETTINGS["free"], max_new_tokens=20))
    eos = [free[0][2], free[2][6], free[1][9]]
    ending = Tokenizer(load_tokenizer(tiny_tokenizer_folder).backend, [], eos)
    run = asked(network, sampling=SETTINGS["free"], max_new_tokens=20, tokenizer=ending)
    expected = eager(run)
    assert len({len(row) for row in expected}) >= 3
    for _ in range(2):
        assert ids_of(run) == expected
        steps = [ids.tolist() for ids in run.stream()]
        for row, ids in enumerate(expected):
            assert [step[row] for step in steps] == ids + [-1] * (len(steps) - len(ids))


# Who has the graphs


def test_streams_at_the_same_time_do_not_disturb_each_other(graphs: Graphs, family: str) -> None:
    network = model(family)
    runs = [asked(network, [prompt]) for prompt in PROMPTS]
    expected = [eager(run)[0] for run in runs]
    found = list(zip(*(run.stream() for run in runs), strict=True))
    assert [[int(ids) for ids in row] for row in zip(*found, strict=True)] == expected
    assert len(graphs.captured) == 1, "one has the graphs, the others run eagerly"
    assert ids_of(runs[1]) == [expected[1]]


def test_a_stream_that_is_left_gives_the_graphs_back(graphs: Graphs) -> None:
    network = model("mamba2")
    run = asked(network)
    ids_of(run)
    stream = run.stream()
    next(stream)
    del stream
    graphs.replayed.clear()
    ids_of(run)
    assert graphs.replayed


@pytest.mark.parametrize(("steps", "captured"), [(0, False), (4, False), (5, True)])
def test_short_answers_are_not_worth_a_capture(graphs: Graphs, steps: int, captured: bool) -> None:
    assert decode.CAPTURE_STEPS == 4
    network = model("mamba2")
    run = asked(network, max_new_tokens=steps + 1)
    assert ids_of(run) == eager(run)
    assert bool(graphs.captured) == captured
    if captured:
        run = asked(network, max_new_tokens=2)
        graphs.replayed.clear()
        assert ids_of(run) == eager(run)
        assert len(graphs.replayed) == 2, "where the graph is there, it is used: prompt and step"


# Overlap


class Log:
    """The order of replays (``step``) and of waiting for ids (``wait``), from when a graph is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        advance, tolist = DecodeGraph.advance, decode._Readback.tolist

        def step(graph: DecodeGraph) -> Tensor:
            self.events.append("step")
            return advance(graph)

        def wait(ids: Any) -> list[int]:
            self.events.append("wait")
            return tolist(ids)

        monkeypatch.setattr(DecodeGraph, "advance", step)
        monkeypatch.setattr(decode._Readback, "tolist", wait)


def test_a_step_is_under_way_before_the_ids_before_it_are_read(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model("mamba2")
    run = asked(network, max_new_tokens=6)
    ids_of(run)
    log = Log(monkeypatch)
    ids_of(run)
    assert log.events == ["step", "wait"] * 5 + ["wait"], "and no step that nobody asked for"


def test_the_first_ids_do_not_wait_for_a_capture(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model("mamba2")
    log = Log(monkeypatch)
    stream = asked(network, max_new_tokens=6).stream()
    next(stream)
    assert (len(graphs.captured), log.events) == (0, ["wait"])
    next(stream)
    assert (len(graphs.captured), log.events) == (1, ["wait", "step", "step", "wait"])


def test_ids_are_read_as_they_were_when_they_were_chosen() -> None:
    ids = torch.tensor([1, 2])
    coming = decode._Readback(ids)
    ids += 1
    assert coming.tolist() == [1, 2]


# The graph itself


def test_steps_of_a_graph_without_a_choice(graphs: Graphs, family: str) -> None:
    network = model(family, integers=True)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    _, cache = prefill(network, ids, graph=False)
    graph = DecodeGraph(network, 2)
    graph.take(cache)
    for token in (7, 11):
        given = torch.tensor([token, token + 1])
        assert torch.equal(graph.step(given), decode.decode_step(network, given, cache))
    assert graph.cache.layers[0].ssm_state is not cache.layers[0].ssm_state


class OwnMemory:
    """A step that works in a buffer of its own, as the fused one does."""

    def __init__(self) -> None:
        self.logits = torch.zeros(2, 64)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits


def test_a_graph_keeps_the_memory_that_it_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one holds addresses, and nothing that lives there."""
    made: list[Any] = []

    def step_of(network: MambaLM, cache: Any) -> OwnMemory:
        step = OwnMemory()
        made.extend([weakref.ref(step), weakref.ref(cache.layers[0])])
        return step

    monkeypatch.setattr(graph_module, "step_of", step_of)
    monkeypatch.setattr(graph_module, "capture", lambda run, device, **options: run())
    graph = DecodeGraph(model("mamba2"), 2)
    gc.collect()
    assert all(kept() is not None for kept in made) and len(made) == 2
    del graph
    gc.collect()
    assert all(kept() is None for kept in made)
    cache = model("mamba2").new_cache(2)
    states = weakref.ref(cache.layers[0])
    piece = PrefillGraph(model("mamba2"), 2, 64, cache)
    del cache
    gc.collect()
    assert states() is not None and piece.logits.shape == (2, 64)


def test_where_graphs_are_wanted() -> None:
    network = model("mamba2")
    assert (graph_wanted(None, network), graph_wanted(False, network)) == (False, False)
