"""The objectives against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from search_fixtures import Banks, Tiny
from tiny_models import tiny_model

from quamba.errors import QuambaError
from quamba.evaluation.perplexity import perplexity
from quamba.models.lm import MambaLM
from quamba.search import objective as module
from quamba.search.objective import Divergence, ObjectiveSpec, Perplexity, accuracy, objective, shared_walk
from quamba.search.search import batches


@pytest.fixture(params=["mamba", "mamba2"])
def pair(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> tuple[Tiny, MambaLM]:
    """A model and another one of the same sizes."""
    model = tiny(request.param)
    return model, tiny_model(model.network.config, seed=9)


def probabilities(network: MambaLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(network(ids[None])[0].double(), dim=-1)


def test_divergence(pair: tuple[Tiny, MambaLM]) -> None:
    """Sequences of two lengths in one batch, so that padding must not count."""
    model, other = pair
    total = tokens = 0.0
    for ids in model.sequences:
        p, q = probabilities(model.network, ids), probabilities(other, ids)
        total += float((p.exp() * (p - q)).sum())
        tokens += len(ids)
    found, itself = Divergence(model.network, batches(model.sequences, 2))([other, model.network])
    assert found == pytest.approx(total / tokens, rel=1e-5)
    assert found > 0.1
    assert itself == pytest.approx(0, abs=1e-7)


def test_what_is_not_kept_is_computed_again(
    pair: tuple[Tiny, MambaLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = pair
    text = batches(model.sequences, 2)
    (kept,) = Divergence(model.network, text)([other])
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    monkeypatch.setattr(module, "_SLICE_BYTES", 1000)
    assert Divergence(model.network, text)([other]) == pytest.approx([kept], rel=1e-6)


def test_perplexity(pair: tuple[Tiny, MambaLM]) -> None:
    model, _ = pair
    nll = tokens = 0.0
    for ids in model.sequences:
        p = probabilities(model.network, ids)[:-1]
        nll -= float(p.gather(1, ids[1:, None]).sum())
        tokens += len(ids) - 1
    (found,) = Perplexity(batches(model.sequences, 3))([model.network])
    assert found == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    rows = torch.stack([model.sequences[0], model.sequences[2]])
    whole = perplexity(lambda ids: model.network(ids), rows).perplexity
    assert Perplexity(batches(list(rows), 2))([model.network]) == pytest.approx([whole], rel=1e-6)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_blocks_in_common_are_run_once(family: str, banks: Banks, tiny: Callable[[str], Tiny]) -> None:
    bank, (text,) = banks(family), batches(tiny(family).sequences, 3)
    mixes = [
        ("W4A8", "W4A8", "W4A8", "W4A8"),
        ("W4A8", "W4A8", "FP16", "W4A8"),
        ("W8A8", "W4A8", "FP16", "W4A8"),
    ]
    networks = [bank.assemble(labels) for labels in mixes]
    runs: list[object] = []
    blocks = {id(block): block for network in networks for block in network.blocks}
    handles = [b.register_forward_hook(lambda module, *_: runs.append(module)) for b in blocks.values()]
    with torch.inference_mode():
        together = list(shared_walk(networks, text))
        assert len(runs) == 4 + 2 + 4
        for handle in handles:
            handle.remove()
        for network, logits in zip(networks, together, strict=True):
            assert torch.equal(logits, network(text[0], None, text[1]))


def test_accuracy_among_the_numbers_of_a_task() -> None:
    raw = {"a": {"alias": "a", "acc,none": 0.25, "acc_norm,none": 0.5}, "b": {"exact_match,strict": 0.75}}
    assert (accuracy(raw, "a"), accuracy(raw, "b")) == (0.25, 0.75)
    with pytest.raises(QuambaError, match="'c' gives no accuracy, expected one with 'acc'"):
        accuracy({"c": {"word_perplexity,none": 9.0}}, "c")


def test_accuracy_of_a_task(assets: object) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    from quamba.api import load

    model = load("assets/models/mamba2-demo")
    spec = ObjectiveSpec(kind="accuracy", tasks=("lambada_local",), limit=4)
    found = objective(spec, None, [], model.tokenizer)([model.network])[0]
    assert 4 * found == pytest.approx(round(4 * found))


def test_specs() -> None:
    with pytest.raises(QuambaError, match=r"The objective is 'lk', expected one of .* Did you mean 'kl'"):
        ObjectiveSpec(kind="lk")
    with pytest.raises(QuambaError, match="'accuracy' needs the names of tasks"):
        ObjectiveSpec(kind="accuracy")
    with pytest.raises(QuambaError, match="'kl' takes no tasks"):
        ObjectiveSpec(tasks=("lambada_local",))
