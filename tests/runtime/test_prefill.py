"""Prompts in pieces, padded, and as graphs: always what one pass over them gives."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulated_graphs import Graphs, emulate_graphs
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from variants import calibration_set, random_ids, rounded, shipped, with_state

from quamba.errors import QuambaError
from quamba.kernels.registry import REFERENCE
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime import graph
from quamba.runtime import prefill as module
from quamba.runtime.decode import decode_step
from quamba.runtime.graph import lease
from quamba.runtime.prefill import PREFILL_PIECE, cut, padded_length, prefill


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return emulate_graphs(monkeypatch)


@functools.cache
def original(family: str, state: str | None) -> MambaLM:
    """In float32; a state asks for W8A8."""
    config = tiny_config(family)
    if state is None:
        return tiny_model(config)
    return quantize_model(
        tiny_model(config), with_state(rounded(shipped("w8a8", config)), state), calibration_set(config)
    )[0]


def float_model(family: str, dtype: torch.dtype = torch.float32) -> MambaLM:
    return copy.deepcopy(original(family, None)).set_compute_dtype(dtype)


def quantized(family: str, state: str, dtype: torch.dtype = torch.float32) -> MambaLM:
    return copy.deepcopy(original(family, state)).set_compute_dtype(dtype)


def tensors(cache: MambaCache) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.conv_state, layer.ssm_state)]


def assert_equal(found: tuple[Tensor, MambaCache], expected: tuple[Tensor, MambaCache]) -> None:
    """To the last bit."""
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(tensors(found[1]), tensors(expected[1]), strict=True))


def assert_close(
    found: tuple[Tensor, MambaCache], expected: tuple[Tensor, MambaCache], tolerance: float
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(tensors(found[1]), tensors(expected[1]), strict=True):
        tolerances = (
            {"rtol": tolerance, "atol": tolerance} if a.is_floating_point() else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(a, b, **tolerances)


# Lengths


@pytest.mark.parametrize(
    ("length", "padded"),
    [(1, 64), (64, 64), (65, 128), (511, 512), (512, 512), (513, 768), (1700, 1792), (2048, 2048)],
)
def test_the_lengths_that_graphs_are_captured_of(length: int, padded: int) -> None:
    assert padded_length(length) == padded


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 64, 2048])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 63, 64, 65, 200, 2048, 2049, 5000])
def test_pieces_cover_a_prompt(length: int, piece: int, padded: bool) -> None:
    first, *others = pieces = cut(length, piece, padded=padded)
    assert (first.start, pieces[-1].stop) == (0, length)
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    assert all((part.stop - part.start, part.padding) == (piece, 0) for part in others)
    assert 1 <= first.stop <= first.length <= piece
    assert first.length == (min(padded_length(first.stop), piece) if padded else first.stop)


# Pieces


@pytest.mark.parametrize("piece", [1, 5, 16, 39, 40])
def test_pieces_of_a_prompt_are_one_pass(family: str, piece: int) -> None:
    network = float_model(family, dtype=torch.float64)
    ids = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, :23] = False  # whole pieces of padding, then one that begins with padding
    mask[2, :39] = False
    for given in (None, mask):
        whole, whole_cache = prefill(network, ids, given)
        logits, cache = prefill(network, ids, given, piece=piece)
        assert logits.shape == (3, 64)
        torch.testing.assert_close(logits, whole, rtol=1e-11, atol=1e-11)
        for found, expected in zip(tensors(cache), tensors(whole_cache), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("integers", [False, True])
def test_a_piece_of_padding_leaves_the_cache_empty(family: str, integers: bool) -> None:
    network = quantized(family, "int8") if integers else float_model(family)
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full_like(ids, 33), ids], dim=1)
    mask = torch.arange(32).expand(2, -1) >= 16
    _, empty = prefill(network, padded[:, :16], mask[:, :16])
    assert not any(bool(t.any()) for t in tensors(empty))
    logits, cache = prefill(network, padded, mask, piece=16)
    expected, expected_cache = prefill(network, ids)
    assert torch.equal(logits, expected)
    assert all(torch.equal(*pair) for pair in zip(tensors(cache), tensors(expected_cache), strict=True))


def test_prefill_computes_no_logits_of_the_prompt(family: str) -> None:
    network = float_model(family)
    seen: list[int] = []
    network.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    logits, cache = prefill(network, torch.ones(1, 50, dtype=torch.int64), piece=20)
    decode_step(network, logits.argmax(-1), cache)
    assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("state", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("piece", [1, 16, 39])
def test_rounded_states_in_pieces_are_one_pass(family: str, state: str, piece: int) -> None:
    """Between the integers everything is float64, so that no code stands at the edge of another."""
    network = quantized(family, state, torch.float64)
    ids = random_ids(network.config, 3, 40)
    mask = torch.arange(40) >= torch.tensor([[0], [23], [38]])
    for given in (None, mask):
        whole = prefill(network, ids, given)
        assert whole[1].layers[0].ssm_state.dtype == (torch.int8 if state == "int8" else torch.float64)
        assert_close(prefill(network, ids, given, piece=piece), whole, 1e-9)


@pytest.mark.parametrize("state", ["int8", "fp16"])
def test_a_padded_batch_in_pieces_is_each_prompt_alone(family: str, state: str) -> None:
    network = quantized(family, state, torch.float64)
    lengths = [40, 9, 17, 1]
    ids = random_ids(network.config, 4, 40)
    mask = torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]
    logits, cache = prefill(network, ids, mask, piece=16)
    for row, length in enumerate(lengths):
        alone = prefill(network, ids[row : row + 1, 40 - length :])
        assert_close((logits[row : row + 1], cache.select(torch.tensor([row]))), alone, 1e-9)


@pytest.mark.parametrize("state", ["int8", "fp16"])
def test_states_of_float32_models_are_rounded_once(family: str, state: str) -> None:
    """As they are deployed: in pieces the state differs from one pass by float rounding, in few codes."""
    network = quantized(family, state)
    ids = random_ids(network.config, 4, 80)
    logits, cache = prefill(network, ids, piece=9)
    whole, whole_cache = prefill(network, ids)
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
    by_piece = network.new_cache(4)
    for part in ids.split([8, *[9] * 8], dim=1):
        network(part, by_piece)
    stored = {"int8": torch.int8, "fp16": torch.float16}[state]

    def moved(other: MambaCache) -> float:
        pairs = zip(whole_cache.layers, other.layers, strict=True)
        return sum(float((a.ssm_state != b.ssm_state).float().mean()) for a, b in pairs)

    assert {layer.ssm_state.dtype for layer in cache.layers} == {stored}
    assert moved(cache) < 0.05 < moved(by_piece), "rounding after each piece moves more"


@pytest.mark.parametrize("state", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("piece", [3, 16, 40])
def test_going_on_from_a_cache(family: str, state: str, piece: int) -> None:
    network = quantized(family, state, torch.float64)
    ids = random_ids(network.config, 2, 50)
    _, first = prefill(network, ids[:, :20])
    before = first.clone()
    found = prefill(network, ids[:, 20:], cache=first, piece=piece)
    assert all(torch.equal(*pair) for pair in zip(tensors(first), tensors(before), strict=True))
    expected = network(ids[:, 20:], before, last_only=True)[:, 0]
    assert_close(found, (expected, before), 1e-9)


def test_what_stands_before_a_piece_can_end_the_reading(family: str) -> None:
    network, seen = float_model(family), []

    def third() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyError

    with pytest.raises(KeyError):
        prefill(network, torch.ones(1, 50, dtype=torch.int64), piece=10, before_piece=third)
    seen.clear()
    prefill(network, torch.ones(1, 20, dtype=torch.int64), piece=10, before_piece=third)
    assert len(seen) == 2


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gave, of ids and masks apart from the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = self.rest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                size = t.untyped_storage().nbytes()
                if t.dtype in (torch.int64, torch.bool):
                    self.ids = max(self.ids, size)
                else:
                    self.rest = max(self.rest, size)
        return result


@pytest.mark.parametrize("state", ["int8", "fp16"])
def test_memory_does_not_grow_with_the_length(family: str, state: str) -> None:
    network = quantized(family, state)

    def largest(length: int) -> LargestResult:
        ids = random_ids(network.config, 2, length)
        mask = torch.arange(length) >= torch.tensor([[0], [5]])
        with LargestResult() as found:
            prefill(network, ids, mask, piece=16)
        return found

    short, long = largest(32), largest(320)
    assert short.rest == long.rest > 0
    assert long.ids <= max(short.ids, 2 * 320 * 8)


# Graphs


PROMPT, LONG = 50, 150  # one piece of 64 tokens with padding; with pieces of 64 one of 22 tokens and two full


@pytest.mark.parametrize("length", [PROMPT, LONG], ids=["one-piece", "three-pieces"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("make", [float_model, lambda f: quantized(f, "int8")], ids=["float", "int8"])
def test_graphs_give_what_eager_pieces_give(
    graphs: Graphs, family: str, make: Any, ragged: bool, length: int
) -> None:
    network = make(family)
    pieces = 1 if length == PROMPT else 3
    for seed in range(3):
        ids = random_ids(network.config, 2, length, seed=seed)
        mask = torch.arange(length) >= torch.tensor([[3], [length - 1]]) if ragged else None
        expected = prefill(network, ids, mask, piece=64, graph=False)
        assert len(graphs.replayed) == pieces * max(0, seed - 1), "none of graph=False"
        assert_equal(prefill(network, ids, mask, piece=64), expected)
        assert len(graphs.replayed) == pieces * seed, "the first prompt runs eagerly"
    assert len(graphs.captured) == 1


def test_padded_prompts_are_those_without_padding(graphs: Graphs, family: str) -> None:
    network = quantized(family, "int8", torch.float64)
    ids = random_ids(network.config, 2, LONG)
    plain = network.new_cache(2)
    logits = network(ids, plain, last_only=True)[:, 0]
    for asked in (False, True):
        assert_close(prefill(network, ids, graph=asked), (logits, plain), 1e-9)
        assert_close(prefill(network, ids, piece=64, graph=asked), (logits, plain), 1e-9)
    assert len(graphs.captured) == 2


def test_a_benchmark_has_its_graph_at_once(graphs: Graphs) -> None:
    network = float_model("mamba2")
    ids = random_ids(network.config, 2, PROMPT)
    found = prefill(network, ids, graph=True)
    assert (len(graphs.captured), len(graphs.replayed)) == (1, 1)
    assert_equal(found, prefill(network, ids, graph=False))


def test_results_are_the_callers_own(graphs: Graphs, family: str) -> None:
    """Neither the next prompt nor a step after it is seen in what was returned."""
    network = quantized(family, "fp16")
    one, other = (random_ids(network.config, 1, PROMPT, seed=seed) for seed in (1, 2))
    expected = prefill(network, one, graph=False)
    found = prefill(network, one, graph=True)
    prefill(network, other, graph=True)
    assert_equal(found, expected)
    decode_step(network, other[:, 0], found[1])
    assert_equal(prefill(network, one, graph=True), expected)


def test_lengths_that_share_a_graph(graphs: Graphs) -> None:
    network = float_model("mamba")
    for length in (10, 64, 33, 1):
        ids = random_ids(network.config, 1, length)
        assert_equal(prefill(network, ids), prefill(network, ids, graph=False))
    assert (len(graphs.captured), len(graphs.replayed)) == (1, 3)
    ids = random_ids(network.config, 1, 65)
    prefill(network, ids)
    assert len(graphs.captured) == 1, "the first one of its length"
    prefill(network, ids)
    assert len(graphs.captured) == 2


def test_full_pieces_count_once_a_prompt(graphs: Graphs) -> None:
    network = float_model("mamba2")
    for captured in (0, 1):
        prefill(network, random_ids(network.config, 1, 64 * 5), piece=64)
        assert len(graphs.captured) == captured


@pytest.mark.parametrize(
    ("batch", "length", "captured"),
    [(256, 60, 1), (257, 60, 0), (128, 128, 1), (128, 129, 0), (8, 2049, 2), (9, 2049, 0)],
)
def test_only_small_batches_have_graphs(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, batch: int, length: int, captured: int
) -> None:
    """Beyond 16384 tokens arithmetic takes longer than launches: no graphs, and no padding for them."""
    network = float_model("mamba2")
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        MambaLM,
        "forward",
        lambda self, ids, cache, mask=None, last_only=False: (
            read.append((*ids.shape, mask is not None)) or torch.zeros(batch, 1, 64)
        ),
    )
    assert PREFILL_PIECE == 2048
    prefill(network, torch.zeros(batch, length, dtype=torch.int64), graph=True)
    assert len(graphs.captured) == captured
    if captured:
        assert all(shape[1] % 64 == 0 and shape[2] for shape in read)
    else:
        assert read == [(batch, n, False) for n in ([1, 2048] if length == 2049 else [length])]


def test_a_cache_to_go_on_from_is_read_without_padding(graphs: Graphs) -> None:
    network = float_model("mamba2", torch.float64)
    ids = random_ids(network.config, 1, 100)
    _, first = prefill(network, ids[:, :60], graph=True)
    found = prefill(network, ids[:, 60:], cache=first, graph=True)
    assert_close(found, prefill(network, ids, graph=False), 1e-9)
    assert len(graphs.captured) == 1


def test_kept_graphs_are_those_used_last(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "KEPT_PREFILL_GRAPHS", 3)
    monkeypatch.setattr(graph, "KEPT_BATCHES", 2)
    network = float_model("mamba2")

    def captured(*shapes: tuple[int, int]) -> list[int]:
        """How many graphs a prompt of each batch size and length captures."""
        counts = [len(graphs.captured)]
        for shape in shapes:
            prefill(network, random_ids(network.config, *shape), graph=True)
            counts.append(len(graphs.captured))
        return [after - before for before, after in pairwise(counts)]

    one, two, three, four = [(1, 64 * n) for n in (1, 2, 3, 4)]
    assert captured(one, two, three, one, two, three) == [1, 1, 1, 0, 0, 0]
    assert captured(one, four, one, three, two) == [0, 1, 0, 0, 1], "for the fourth the second went"
    assert captured((2, 64), one, (3, 64), one, (2, 64)) == [1, 0, 1, 0, 1], "and so with batch sizes"


def test_graphs_in_use_are_left_alone(graphs: Graphs) -> None:
    network = float_model("mamba2")
    ids = random_ids(network.config, 1, PROMPT)
    expected = prefill(network, ids, graph=True)
    with lease(network, 1) as mine, lease(network, 2) as others:
        assert mine is not None and others is not None
        assert_equal(prefill(network, ids, graph=True), expected)
        assert len(graphs.replayed) == 1
        with lease(network, 1) as none:
            assert none is None
    prefill(network, ids, graph=True)
    assert len(graphs.replayed) == 2, "and given back afterwards"
    with pytest.raises(KeyError), lease(network, 1):
        raise KeyError
    worker = threading.Thread(target=prefill, args=(network, ids), kwargs={"graph": True})
    worker.start()
    worker.join()
    assert len(graphs.replayed) == 3


def test_graphs_are_of_one_network_and_its_kernels(graphs: Graphs) -> None:
    network = float_model("mamba2")
    ids = random_ids(network.config, 1, PROMPT)
    prefill(network, ids, graph=True)
    other = copy.deepcopy(network)
    other.lm_head.weight.data *= 2.0
    assert torch.equal(prefill(other, ids, graph=True)[0], prefill(other, ids, graph=False)[0])
    assert len(graphs.captured) == 2
    kernels = copy.copy(REFERENCE)
    object.__setattr__(kernels, "name", "other")
    for count, given in ((3, kernels), (3, kernels), (4, REFERENCE)):
        prefill(network.use_kernels(given), ids, graph=True)
        assert len(graphs.captured) == count
    graphs.captured.clear()
    graphs.replayed.clear()
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_there_are_no_graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    network = float_model("mamba2")
    monkeypatch.setattr(module, "lease", None)
    ids = random_ids(network.config, 1, PROMPT)
    assert_equal(prefill(network, ids), prefill(network, ids, graph=False))
    with pytest.raises(QuambaError, match="A CUDA graph needs a CUDA device, and the model is on 'cpu'"):
        prefill(network, ids, graph=True)
