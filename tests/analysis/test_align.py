"""The float model in the quantized one's coordinates; the order of channels found from weights alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, random_ids, rounded, shipped
from zoo_fixtures import FIXTURES, zoo_path

import quamba
from quamba.analysis.align import align, channel_orders, find_orders
from quamba.analysis.analyze import analyze
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.report import Report


def quantized(model: MambaLM, recipe: str = "w4a8") -> tuple:
    config = model.config
    return quantize_model(model, rounded(shipped(recipe, config)), calibration_set(config))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_aligned_model_is_the_same_function(family: str) -> None:
    model = tiny_model(tiny_config(family), dtype=torch.float64)
    network, plan, report = quantized(model)
    aligned = align(network, channel_orders(plan, report), model)
    assert aligned.left_out == {}
    assert aligned.network.blocks[0].mixer.rotate.enabled and aligned.network.backbone.norm_f.weight is None
    ids = random_ids(model.config, 2, 20)
    torch.testing.assert_close(aligned.network(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_a_float_model_needs_no_copy() -> None:
    model, other = (tiny_model(tiny_config("mamba2"), seed=i) for i in range(2))
    assert align(model, {}, other).network is other


@pytest.mark.parametrize("changes", [{}, {"ngroups": 2, "headdim": 4}], ids=["one group", "two groups"])
def test_the_order_is_found_without_a_report(changes: dict[str, int]) -> None:
    model = tiny_model(tiny_config("mamba2", **changes))
    network, plan, report = quantized(model)
    assert channel_orders(plan, None) is None
    stored = channel_orders(plan, report)
    assert stored is not None and any(
        not torch.equal(o.channel_perm, torch.arange(64)) for o in stored.values()
    )
    ids = random_ids(model.config, 2, 20)
    by_report = analyze(network, model, ids, orders=stored)
    found = analyze(network, model, ids, orders=None)
    assert found.left_out == {}
    assert [s.snr_db for s in found.sites] == [s.snr_db for s in by_report.sites]


def test_what_depends_on_an_order_that_is_not_found_is_left_out() -> None:
    model, stranger = (tiny_model(tiny_config("mamba2"), seed=i) for i in range(2))
    network, _, _ = quantized(model)
    assert find_orders(network, stranger) is None
    found = analyze(network, stranger, random_ids(model.config, 2, 20))
    assert list(found.left_out) == ["in_proj", "z", "dt", "x", "scan", "gated", "rotate"]
    assert all("quantization_report.json" in reason for reason in found.left_out.values())
    assert {s.site for s in found.sites if s.layer == 0} == {"residual", "norm", "B", "C", "out_proj"}
    assert {w.name for w in found.weights} == {"embedding", "lm_head"}


def test_orders_of_models_that_have_none() -> None:
    model = tiny_model(tiny_config("mamba"))
    _, plan, report = quantized(model)
    assert channel_orders(None, None) == {}
    assert channel_orders(plan, report) == {}


def test_a_report_of_another_model_is_no_order() -> None:
    model = tiny_model(tiny_config("mamba2"))
    _, plan, report = quantized(model)
    assert channel_orders(plan, Report({}, {}, head_groups=report.head_groups[:1])) is None


@pytest.mark.parametrize("name", FIXTURES)
def test_published_files_can_be_compared_everywhere(name: str, assets: Path, repo_root: Path) -> None:
    """Files of the published program: its two first blocks of a demo model, whose order no report tells."""
    family = "mamba2" if name.startswith("quamba2") else "mamba"
    demo = quamba.load(assets / "models" / f"{family}-demo").network
    config = dataclasses.replace(demo.config, n_layer=2)
    names = MambaLM.empty(config).named_tensors().keys()
    model = MambaLM.from_tensors(config, {k: v for k, v in demo.named_tensors().items() if k in names})
    loaded = quamba.load(zoo_path(repo_root, name))
    found = analyze(
        loaded.network, model, random_ids(config, 1, 64), orders=channel_orders(loaded.plan, None)
    )
    assert found.left_out == {}
    bound = 15 if "w8a8" in name else 8
    assert min(s.snr_db for s in found.sites) > bound
    assert min(w.snr_db for w in found.weights) > (30 if "w8a8" in name else 15)
