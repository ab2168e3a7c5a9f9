"""Real CUDA graphs of models on real kernels: to the last bit what the same kernels give one by one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, random_ids, rounded, shipped, with_state

from quamba.kernels.registry import choose_kernels
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime.choice import Choice, Chooser
from quamba.runtime.generate import generate
from quamba.runtime.graph import lease
from quamba.runtime.prefill import prefill
from quamba.runtime.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
# Few enough for the fused step, and more than that.
ROWS = (1, 6)
SETTINGS = {
    "greedy": SamplingParams(),
    "penalty": SamplingParams(repetition_penalty=1.5),
    "free": SamplingParams(top_k=0, temperature=2.0),
    "everything": SamplingParams(top_k=20, temperature=2.0, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
}


@functools.cache
def model(family: str, recipe: str, state: str = "fp16") -> MambaLM:
    """With float16 between the leaves; "fp16" is a float model."""
    sizes: dict[str, Any] = {"d_model": 128, "vocab_size": 200, "tie_embeddings": False}
    if family == "mamba2":
        sizes |= {"d_state": 32, "headdim": 32}
    config = tiny_config(family, **sizes)
    network = tiny_model(config)
    if recipe != "fp16":
        wanted = with_state(rounded(shipped(recipe, config)), state)
        network = quantize_model(network, wanted, calibration_set(config))[0]
    return network.set_compute_dtype(torch.float16).to(CUDA).use_kernels(choose_kernels(CUDA))


MODELS = pytest.mark.parametrize(
    ("family", "recipe", "state"),
    [(f, *r) for f in ("mamba", "mamba2") for r in (("fp16", ""), ("w8a8", "int8"), ("w4a8", "fp16"))],
)


def assert_equal(found: tuple[Tensor, MambaCache], expected: tuple[Tensor, MambaCache]) -> None:
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1].layers, expected[1].layers, strict=True):
        assert torch.equal(a.conv_state, b.conv_state) and torch.equal(a.ssm_state, b.ssm_state)


@MODELS
@pytest.mark.parametrize(("batch", "length", "piece"), [(1, 50, 2048), (3, 300, 2048), (2, 300, 128)])
def test_prompts_as_graphs(family: str, recipe: str, state: str, batch: int, length: int, piece: int) -> None:
    network = model(family, recipe, state)
    ids = random_ids(network.config, batch, length).to(CUDA)
    mask = torch.arange(length, device=CUDA) >= 7 * torch.arange(batch, device=CUDA)[:, None]
    for given in (None, mask):
        expected = prefill(network, ids, given, piece=piece, graph=False)
        for _ in range(2):
            assert_equal(prefill(network, ids, given, piece=piece, graph=True), expected)


@MODELS
def test_pieces_are_one_pass(family: str, recipe: str, state: str) -> None:
    """To the rounding of float16 between the leaves, and the few codes that it moves."""
    network = model(family, recipe, state)
    ids = random_ids(network.config, 2, 600).to(CUDA)
    whole, _ = prefill(network, ids, graph=False)
    parts, cache = prefill(network, ids, piece=128)
    assert cache.layers[0].ssm_state.dtype == network.new_cache(1).layers[0].ssm_state.dtype
    assert float((parts - whole).norm() / whole.norm()) < 0.03


@MODELS
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_as_graphs(family: str, recipe: str, state: str, rows: int, name: str) -> None:
    network = model(family, recipe, state)
    prompts = [random_ids(network.config, 5 + 3 * i, seed=i).tolist() for i in range(rows)]

    def ids(graph: bool | None) -> list[list[int]]:
        run = generate(
            network, None, prompts, max_new_tokens=30, sampling=SETTINGS[name], seed=1, cuda_graph=graph
        )
        return [generation.ids for generation in run.collect()]

    expected = ids(False)
    for _ in range(3):
        assert ids(None) == expected


@pytest.mark.parametrize("rows", ROWS)
def test_draws_go_on_after_their_block(rows: int) -> None:
    network = model("mamba2", "w4a8")
    prompts, free = [[3]] * rows, SETTINGS["free"]
    runs = [
        generate(network, None, prompts, max_new_tokens=270, sampling=free, seed=1, cuda_graph=graph)
        for graph in (False, None)
    ]
    first, second = ([generation.ids for generation in run.collect()] for run in runs)
    assert first == second


def test_a_seed_draws_the_same_numbers_on_every_device() -> None:
    """From logits that are the same: those of one token."""
    network = model("mamba2", "fp16")
    logits = torch.zeros(1, network.config.padded_vocab_size)
    found = []
    for device in ("cpu", "cuda"):
        params = SETTINGS["everything"]
        choice = Choice.seeded(200, params, [[3, 4]], seed=5)
        chooser = Chooser(1, 200, params.rules, torch.device(device)).begin(choice)
        ids = []
        for _ in range(20):
            chooser.prepare()
            ids.append(int(chooser.choose(logits.to(device))))
        found.append(ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", ROWS)
def test_streams_at_the_same_time(rows: int) -> None:
    network = model("mamba2", "w4a8")
    runs = [generate(network, None, [[k, k + 1]] * rows, max_new_tokens=20) for k in (3, 9)]
    expected = [[g.ids for g in run.collect()] for run in runs]
    steps = list(zip(*(run.stream() for run in runs), strict=True))
    for turn in (0, 1):
        found = torch.stack([step[turn] for step in steps], dim=1).tolist()
        assert found == expected[turn]


def test_graphs_of_other_kernels_are_not_replayed() -> None:
    network = model("mamba", "w4a8")
    ids = random_ids(network.config, 1, 20).to(CUDA)
    prefill(network, ids, graph=True)
    kernels = network.kernels
    with lease(network, 1) as before:
        try:
            network.use_kernels(choose_kernels(CUDA, "reference"))
            with lease(network, 1) as after:
                assert before is not None and after is not None and after is not before
        finally:
            network.use_kernels(kernels)
