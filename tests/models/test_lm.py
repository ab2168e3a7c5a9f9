"""The language model as a container of tensors: names, tying, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import VARIANTS, random_ids

from quamba.models.lm import Block, MambaLM


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_come_back(name: str) -> None:
    model = tiny_model(VARIANTS[name])
    names = set(model.named_tensors())
    assert ("lm_head.weight" in names) != model.config.tie_embeddings
    again = MambaLM.from_tensors(model.config, model.named_tensors())
    ids = random_ids(model.config, 2, 7)
    assert torch.equal(again(ids), model(ids))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_must_match(change: str) -> None:
    model = tiny_model(tiny_config("mamba"))
    tensors = dict(model.named_tensors())
    if change == "missing":
        del tensors["backbone.layers.1.mixer.ssm.D"]
    elif change == "extra":
        tensors["backbone.layers.1.mixer.ssm.E"] = torch.ones(1)
    else:
        tensors["backbone.layers.1.mixer.ssm.D"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"mixer\.ssm\.[DE]"):
        MambaLM.from_tensors(model.config, tensors)


def test_untie_gives_the_head_its_own_table() -> None:
    model = tiny_model(tiny_config("mamba2"))
    ids = random_ids(model.config, 1, 5)
    expected = model(ids)
    assert model.lm_head.weight is model.backbone.embedding.weight
    model.untie()
    assert model.lm_head.float_weight.data_ptr() != model.backbone.embedding.float_weight.data_ptr()
    assert "lm_head.weight" in model.named_tensors()
    assert torch.equal(model(ids), expected)
    own = model.lm_head.weight
    model.untie()
    assert model.lm_head.weight is own


def test_a_copy_stays_tied() -> None:
    model = copy.deepcopy(tiny_model(tiny_config("mamba")))
    assert model.lm_head.weight is model.backbone.embedding.weight
    model.set_compute_dtype(torch.float64)
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_blocks_are_the_layers() -> None:
    model = tiny_model(tiny_config("mamba", n_layer=3))
    assert len(model.blocks) == 3
    assert all(isinstance(block, Block) for block in model.blocks)
    assert [id(b) for b in model.blocks] == [id(layer) for layer in model.backbone.layers]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_compute_dtype(family: str, dtype: torch.dtype) -> None:
    """Projections follow; what the recurrence and the norms hold stays float32 or wider."""
    config = tiny_config(family)
    model = tiny_model(config)
    exact = tiny_model(config, dtype=torch.float64)(random_ids(config, 2, 9))
    model.set_compute_dtype(dtype)
    mixer = model.blocks[0].mixer
    assert mixer.in_proj.float_weight.dtype == model.backbone.embedding.float_weight.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mixer.ssm.A_log.dtype == model.backbone.norm_f.weight.dtype == wide
    logits = model(random_ids(config, 2, 9))
    assert logits.dtype == dtype
    # The depth of the model multiplies the rounding of its dtype by some tens.
    error = (logits.double() - exact).abs().max() / exact.abs().max()
    assert error < 30 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("wide", [False, True])
def test_residual_in_fp32(family: str, wide: bool) -> None:
    model = tiny_model(tiny_config(family, residual_in_fp32=wide)).set_compute_dtype(torch.float16)
    seen = []
    model.blocks[1].norm.register_forward_hook(lambda module, args, output: seen.append(output[1].dtype))
    model(random_ids(model.config, 1, 4))
    assert seen == [torch.float32 if wide else torch.float16]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_empty_input(family: str) -> None:
    model = tiny_model(tiny_config(family))
    vocabulary = model.config.padded_vocab_size
    assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, vocabulary)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, vocabulary)
    assert model(torch.zeros(2, 0, dtype=torch.int64), model.new_cache(2)).shape == (2, 0, vocabulary)


def test_gradients_reach_the_embedding() -> None:
    """What the rounding of embedding rows is weighed with, against finite differences."""
    for family in ("mamba", "mamba2"):
        config = tiny_config(family)
        model = tiny_model(config, dtype=torch.float64)
        ids = random_ids(config, 1, 12)
        hidden = model.backbone.embedding(ids).detach().requires_grad_()
        direction = torch.randn_like(hidden)

        def loss(x: torch.Tensor, model: MambaLM = model) -> torch.Tensor:
            return model.lm_head(model.backbone.read(x, None, None)).square().mean()

        (gradient,) = torch.autograd.grad(loss(hidden), hidden)
        with torch.no_grad():
            step = 1e-6 * direction
            slope = (loss(hidden + step) - loss(hidden - step)) / 2e-6
        assert abs(float((gradient * direction).sum() - slope)) < 1e-7 * float(gradient.abs().sum())
