"""Blocks quantized once, put together: the models that come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from search_fixtures import LABELS, Banks, Tiny, base_recipe

from quamba.checkpoints.quantized import read_quantized, write_quantized
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.search.blocks import BlockBank, mixed_recipe, plan_bank, uniform_recipe

FAMILIES = ("mamba", "mamba2")


def logits(network: MambaLM, tiny: Tiny) -> torch.Tensor:
    with torch.inference_mode():
        return network(tiny.sequences[1][None])


def saved(bank: BlockBank, labels: tuple[str, ...], folder: Path) -> MambaLM:
    write_quantized(
        folder,
        bank.assemble(labels),
        bank.plan(labels),
        source="tiny",
        report=bank.report(labels),
        tokenizer=None,
    )
    return read_quantized(folder).network


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_of_the_recipe_are_the_quantized_model(
    family: str, banks: Banks, tiny: Callable[[str], Tiny]
) -> None:
    model, bank = tiny(family), banks(family)
    whole, _, report = quantize_model(model.network, base_recipe("w4a8"), model.calibration)
    assembled = bank.assemble(("W4A8",) * 4)
    found, expected = assembled.named_tensors(), whole.named_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bank.report(("W4A8",) * 4).layers == report.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_shared_not_copied(family: str, banks: Banks) -> None:
    bank = banks(family)
    one, other = bank.assemble(("W4A8", "W4A16", "W4A8", "FP16")), bank.assemble(("W4A8",) * 4)
    assert one.blocks[0] is other.blocks[0] and one.blocks[1] is not other.blocks[1]
    assert one.lm_head is other.lm_head and one.backbone.embedding is other.backbone.embedding


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_weights_are_the_same_integers_with_float_activations(family: str, banks: Banks) -> None:
    """But for Mamba1's x_proj, whose columns contain the scales of the codes."""
    bank = banks(family)
    a8, a16 = bank.blocks["W4A8"][2].mixer, bank.blocks["W4A16"][2].mixer
    for name in ("in_proj", "out_proj"):
        one, other = getattr(a8, name).weight, getattr(a16, name).weight
        assert one.data.data_ptr() == other.data.data_ptr()
    assert a16.in_proj.out_scale is None and a8.in_proj.out_scale is not None
    if family == "mamba":
        assert not torch.equal(a8.x_proj.weight.data, a16.x_proj.weight.data)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_blocks_compute_what_the_float_model_does(
    family: str, banks: Banks, tiny: Callable[[str], Tiny]
) -> None:
    """With float embedding and head, all of them are the float model."""
    model = tiny(family)
    bank = banks(family, "quamba1-w8a8", ("W8A8", "FP16"))
    found = bank.assemble(("FP16",) * 4)
    assert found.blocks[0].mixer.rotate.enabled
    torch.testing.assert_close(logits(found, model), logits(model.network, model), rtol=0, atol=2e-4)


MIXES = [
    ("W4A8", "W4A16", "W8A8", "FP16"),
    ("FP16", "W8A8", "W4A16", "W4A8"),
    ("W4A16", "W4A16", "W8A8", "W4A16"),
    ("FP16", "FP16", "FP16", "W4A16"),
]


@pytest.mark.parametrize("state", ["fp16", "int8"])
@pytest.mark.parametrize("labels", MIXES, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mix_is_saved_and_reloaded(
    family: str,
    labels: tuple[str, ...],
    state: str,
    banks: Banks,
    tiny: Callable[[str], Tiny],
    tmp_path: Path,
) -> None:
    bank, model = banks(family, state=state), tiny(family)
    before = logits(bank.assemble(labels), model)
    assert torch.isfinite(before).all()
    network = saved(bank, labels, tmp_path / "m").use_kernels(bank.ends.network.kernels)
    assert torch.equal(logits(network, model), before)
    assert [b.label for b in bank.plan(labels).blocks] == list(labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_base_takes_the_same_blocks(family: str, banks: Banks) -> None:
    """Of W4A16 with some W4A8 blocks, the W4A8 model is the one that is quantized."""
    one = banks(family, labels=("W4A8", "W4A16"))
    other = banks(family, "w4a16", ("W4A16", "W4A8"), int4=one.base.int4)  # its own are any scales of groups
    for label in ("W4A8", "W4A16"):
        mine, theirs = (bank.blocks[label][1].mixer.out_proj.weight.data for bank in (one, other))
        if family == "mamba":
            assert torch.equal(mine, theirs)
        else:  # the recipe w4a16 groups no heads
            assert mine.shape == theirs.shape


def test_which_models_are_quantized(tiny: Callable[[str], Tiny]) -> None:
    def labels(family: str, name: str, *labels: str) -> list[str]:
        return list(plan_bank(base_recipe(name), labels, tiny(family).network.config).recipes)

    assert labels("mamba2", "w4a8", "W4A8", "W4A16", "FP16") == ["W4A8"]
    assert labels("mamba", "w4a8", "W4A8", "W4A16", "FP16") == ["W4A8", "W4A16"]
    assert labels("mamba2", "w8a8", "W8A8", "W4A8", "W4A16") == ["W8A8", "W4A8"]
    assert labels("mamba2", "w8a8", "W8A8", "W4A16") == ["W8A8", "W4A16"]
    assert labels("mamba2", "w4a16", "W4A16", "W4A8") == ["W4A8"]


def test_other_widths_do_not_make_up_for_earlier_errors(tiny: Callable[[str], Tiny]) -> None:
    plan = plan_bank(base_recipe("w4a8"), LABELS, tiny("mamba2").network.config)
    assert plan.recipes["W4A8"].solver.propagate_error
    assert not plan.recipes["W8A8"].solver.propagate_error


def test_the_mixed_recipe() -> None:
    base = base_recipe("w4a8", "int8")
    recipe = mixed_recipe(base, ("W4A8", "W4A16", "W4A16", "W8A8"), "w4ax")
    assert (recipe.blocks.label, recipe.blocks.state) == ("W4A16", "int8")
    assert [(o.blocks, o.precision.label, o.precision.state) for o in recipe.overrides] == [
        ((0,), "W4A8", "int8"),
        ((3,), "W8A8", "int8"),
    ]
    assert (recipe.embedding, recipe.head, recipe.solver) == (base.embedding, base.head, base.solver)
    assert uniform_recipe(base, "W4A8") == base
