"""The metric of the embedding table: gradients of the loss, block by block as in the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import RMS_VARIANTS, calibration_set

from quamba.models.lm import MambaLM
from quamba.quantization import embedding
from quamba.quantization.embedding import loss_metric, metric_batches
from quamba.quantization.states import Shelf

CPU = torch.device("cpu")


def gradients(model: MambaLM, ids: Tensor) -> Tensor:
    """d(sum of cross-entropy) / d(embedding of each token) by autograd through the whole model."""
    with torch.enable_grad():
        start = model.backbone.embedding(ids).detach().requires_grad_()
        logits = model.lm_head(model.backbone.read(start, None, None))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (found,) = torch.autograd.grad(loss, start)
    return found


def metric(model: MambaLM, *, slab: int, shelf: Shelf, calls: list[str] | None = None) -> Tensor:
    def slabs() -> Iterator[Tensor]:
        return iter(model.lm_head.float_weight.split(slab))

    batches = metric_batches(calibration_set(model.config, num=10).batches(), model.config, CPU)
    return loss_metric(
        batches,
        model.backbone.embedding,
        model.blocks.__getitem__,
        model.backbone.norm_f,
        slabs,
        config=model.config,
        shelf=shelf,
        on_block=lambda: None if calls is None else calls.append("block"),
    )


@pytest.mark.parametrize("slab", [7, 1000])
@pytest.mark.parametrize("variant", ["mamba", "mamba-no-fp32-residual", "mamba2", "mamba2-groups2"])
def test_the_metric_is_the_mean_of_outer_products(
    variant: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "TOKENS_PER_SEQUENCE", 8)
    monkeypatch.setattr(embedding, "_LOGITS", 64)  # several parts of tokens too
    model = tiny_model(RMS_VARIANTS[variant])
    calls: list[str] = []
    found = metric(model, slab=slab, shelf=Shelf("memory", CPU), calls=calls)
    sequences = sorted(calibration_set(model.config, num=10).sequences, key=len, reverse=True)
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for sequence in sequences:
        g = gradients(model, sequence[None, -8:])[0].double()
        assert bool(g[:-1].any(-1).all())  # the last token predicts nothing
        expected += g.T @ g / (8 * len(sequences))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert len(calls) == 2 * model.config.n_layer


def test_the_metric_does_not_depend_on_the_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "TOKENS_PER_SEQUENCE", 8)
    model = tiny_model(tiny_config("mamba2"))
    kept = metric(model, slab=100, shelf=Shelf("memory", CPU))
    filed = metric(model, slab=100, shelf=Shelf("file", CPU, tmp_path))
    assert torch.equal(kept, filed)
    assert not list(tmp_path.iterdir())


def test_without_sequences_there_is_no_metric() -> None:
    model = tiny_model(tiny_config("mamba2"))  # the texts are shorter than the tokens read of each
    assert not metric(model, slab=100, shelf=Shelf("memory", CPU)).any()
