"""The metric of the embedding table: gradients of the text's loss, whatever is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import RMS_VARIANTS, calibration_set, random_ids

from quamba.quantization import embedding
from quamba.quantization.embedding import _gradient, loss_metric


@pytest.mark.parametrize("variant", ["mamba", "mamba-no-fp32-residual", "mamba2", "mamba2-groups2"])
def test_gradients_do_not_depend_on_what_is_kept(variant: str) -> None:
    config = RMS_VARIANTS[variant]
    model, ids = tiny_model(config), random_ids(config, 3, 20)
    kept, again = (_gradient(model, ids, keep=keep) for keep in (True, False))
    assert torch.equal(kept, again)
    assert bool(kept[:, :-1].any(-1).all())  # the last token predicts nothing


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_metric_is_the_mean_of_outer_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "TOKENS_PER_SEQUENCE", 8)
    config = tiny_config(family)
    model, data = tiny_model(config), calibration_set(config, num=10)
    found = loss_metric(model, data.batches())
    sequences = sorted(data.sequences, key=len, reverse=True)
    gradients = [_gradient(model, s[None, -8:], keep=True)[0].double() for s in sequences]
    expected = sum(g.T @ g for g in gradients) / (8 * len(gradients))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
