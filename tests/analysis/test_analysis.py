"""The analysis of tiny models against what hooks and formulas give directly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import VARIANTS, calibration_set, random_ids, rounded, shipped

from quamba.analysis import analyze as analyze_module
from quamba.analysis.align import Orders, channel_orders
from quamba.analysis.analyze import Analysis, SiteReport, analyze
from quamba.analysis.sites import block_sites
from quamba.errors import QuambaError
from quamba.formats.activation import Quantized
from quamba.kernels.reference.hadamard import hadamard
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.recipe import Override, Precision
from quamba.transforms.head_grouping import ChannelOrder


def quantized(model: MambaLM, recipe: str = "w4a8", **changes: object) -> tuple[MambaLM, Orders]:
    """A tiny model by a shipped recipe, rounded to nearest, and how its heads were reordered."""
    config = model.config
    network, plan, report = quantize_model(
        model, rounded(shipped(recipe, config, **changes)), calibration_set(config)
    )
    return network, channel_orders(plan, report)


def text(model: MambaLM, windows: int = 3, length: int = 24) -> Tensor:
    return random_ids(model.config, windows, length, seed=5)


def site(analysis: Analysis, layer: int | None, name: str) -> SiteReport:
    return next(s for s in analysis.sites if (s.layer, s.site) == (layer, name))


def snr(wanted: Tensor, got: Tensor) -> float:
    wanted, got = wanted.double(), got.double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def outputs(model: MambaLM, path: str, run: Callable[[], object]) -> list[Tensor]:
    """What a leaf gives, each part of a tuple, codes as real values."""
    seen: list[Tensor] = []

    def keep(module: object, args: object, output: object) -> None:
        parts = output if isinstance(output, tuple) and not isinstance(output, Quantized) else (output,)
        seen.extend(p.dequantize() if isinstance(p, Quantized) else p for p in parts)

    handle = model.get_submodule(path).register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_a_float_model_equals_itself(name: str) -> None:
    model = tiny_model(VARIANTS[name])
    found = analyze(model, model, text(model))
    assert {s.snr_db for s in found.sites} == {math.inf}
    assert {s.own_snr_db for s in found.sites} == {math.inf, None}
    assert (found.logits.kl_mean, found.logits.kl_max, found.logits.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.logits.perplexity == found.logits.float_perplexity
    assert (found.weights, found.left_out, found.worst(9)) == ([], {}, [])
    assert {s.site for s in found.sites if s.layer == 0} == {s.name for s in block_sites(model.config)}
    assert not any(module._forward_hooks for module in model.modules())


ORIGINAL = ("in_proj", "z", "x", "dt", "scan", "gated")


def test_sites_of_mamba2_by_hand() -> None:
    """Against the float model as it was: channels taken in their new order, the residual stream rotated."""
    model = tiny_model(tiny_config("mamba2"))
    network, orders = quantized(model)
    ids = text(model)
    found = analyze(network, model, ids, orders=orders)
    assert orders is not None and not torch.equal(orders[1].channel_perm, torch.arange(64))
    channels, heads = orders[1].channel_perm, orders[1].head_perm
    mixer = "backbone.layers.1.mixer"

    def both(leaf: str) -> tuple[Tensor, Tensor]:
        return tuple(outputs(m, f"{mixer}.{leaf}", lambda m=m: m(ids))[0] for m in (model, network))  # type: ignore

    wanted, got = both("in_proj")
    assert site(found, 1, "z").snr_db == pytest.approx(snr(wanted[..., channels], got[..., :64]), abs=1e-3)
    assert site(found, 1, "dt").snr_db == pytest.approx(
        snr(wanted[..., -8:][..., heads], got[..., -8:]), abs=1e-3
    )
    wanted, got = both("conv1d")
    assert site(found, 1, "x").snr_db == pytest.approx(snr(wanted[..., channels], got[..., :64]), abs=1e-3)
    assert site(found, 1, "B").snr_db == pytest.approx(snr(wanted[..., 64:80], got[..., 64:80]), abs=1e-3)
    assert site(found, 1, "C").snr_db == pytest.approx(snr(wanted[..., 80:], got[..., 80:]), abs=1e-3)
    wanted, got = both("ssm")
    assert site(found, 1, "scan").snr_db == pytest.approx(snr(wanted[..., channels], got), abs=1e-3)
    wanted, got = both("norm")
    assert site(found, 1, "gated").snr_db == pytest.approx(snr(wanted[..., channels], got), abs=1e-3)
    rotated = hadamard(wanted[..., channels])
    assert site(found, 1, "rotate").snr_db == pytest.approx(snr(rotated, both("rotate")[1]), abs=1e-3)
    wanted, got = both("out_proj")
    assert site(found, 1, "out_proj").snr_db == pytest.approx(snr(hadamard(wanted), got), abs=1e-3)
    _check_stream(found, model, network, ids)


def test_sites_of_mamba1_by_hand() -> None:
    model = tiny_model(tiny_config("mamba"))
    network, orders = quantized(model, "w8a8")
    ids = text(model)
    found = analyze(network, model, ids, orders=orders)
    parts = {
        "in_proj": [("in_proj", slice(None)), ("z", slice(64, 128))],
        "conv1d": [("x", slice(None))],
        "x_proj": [("x_proj", slice(None)), ("B", slice(4, 12)), ("C", slice(12, 20))],
        "dt_proj": [("dt", slice(None))],
        "ssm": [("scan", slice(None))],
    }
    for leaf, sites in parts.items():
        path = f"backbone.layers.1.mixer.{leaf}"
        wanted, got = (outputs(m, path, lambda m=m: m(ids))[0] for m in (model, network))
        for name, part in sites:
            value = site(found, 1, name)
            assert value.snr_db == pytest.approx(snr(wanted[..., part], got[..., part]), abs=1e-3), name
            assert value.absmax == pytest.approx(float(got[..., part].abs().max())), name
            assert value.range is not None
            assert value.range.absmax == pytest.approx(float(wanted[..., part].abs().max()), rel=1e-5), name
    _check_stream(found, model, network, ids)


def _check_stream(found: Analysis, model: MambaLM, network: MambaLM, ids: Tensor) -> None:
    """Embedding, residual, norms and logits; the norm's output is compared without its weight."""
    plain, small = (outputs(m, "backbone.layers.1.norm", lambda m=m: m(ids)) for m in (model, network))
    assert site(found, 1, "residual").snr_db == pytest.approx(snr(hadamard(plain[1]), small[1]), abs=1e-3)
    unit = plain[1] * torch.rsqrt(plain[1].square().mean(-1, keepdim=True) + 1e-5)
    assert site(found, 1, "norm").snr_db == pytest.approx(snr(hadamard(unit), small[0]), abs=1e-3)
    tables = [m.backbone.embedding(ids) for m in (model, network)]
    assert site(found, None, "embedding").snr_db == pytest.approx(
        snr(hadamard(tables[0]), tables[1]), abs=1e-3
    )
    end = [outputs(m, "backbone.norm_f", lambda m=m: m(ids))[1] for m in (model, network)]
    assert site(found, None, "residual").snr_db == pytest.approx(snr(hadamard(end[0]), end[1]), abs=1e-3)
    logits = [m(ids) for m in (model, network)]
    assert site(found, None, "logits").snr_db == pytest.approx(snr(*logits), abs=1e-3)
    p, q = (x.double().log_softmax(-1) for x in logits)
    assert found.logits.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_own_error_is_that_of_one_block(family: str) -> None:
    """The block reads the float model's stream, in its own basis."""
    model = tiny_model(tiny_config(family))
    network, orders = quantized(model)
    ids = text(model)
    found = analyze(network, model, ids, orders=orders)
    residual = outputs(model, "backbone.layers.1.norm", lambda: model(ids))[1]
    wanted = outputs(model, "backbone.layers.1.mixer.out_proj", lambda: model(ids))[0]
    got = network.blocks[1](hadamard(residual), None, None, None)[0]
    value = site(found, 1, "out_proj")
    assert value.own_snr_db == pytest.approx(snr(hadamard(wanted), got), abs=1e-2)
    assert value.own_snr_db > value.snr_db
    first = site(found, None, "embedding")
    assert first.own_snr_db == first.snr_db
    assert site(found, 1, "residual").own_snr_db is None


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_damaged_block_is_found(family: str, layer: int) -> None:
    model = tiny_model(tiny_config(family, n_layer=3))
    network, orders = quantized(model, "w8a8")
    weight = network.blocks[layer].mixer.out_proj.weight
    weight.data = -weight.data
    found = analyze(network, model, text(model), orders=orders)
    worst = found.worst(1)[0]
    assert (worst.layer, worst.site) == (layer, "out_proj")
    assert worst.own_snr_db == pytest.approx(-6.02, abs=0.3)  # twice the signal
    others = [s.own_snr_db for s in found.sites if s.layer != layer and s.own_snr_db is not None]
    assert min(others) > 10
    bad = [(w.layer, w.name) for w in found.weights if w.snr_db < 10]
    assert bad == [(layer, "out_proj")]


def test_errors_pass_on_but_not_into_the_own_ones() -> None:
    """A float model with one other weight: nothing before it, no error of others, everything behind."""
    model = tiny_model(tiny_config("mamba2", n_layer=3))
    other = copy.deepcopy(model)
    other.blocks[1].mixer.conv1d.weight *= 1.5
    found = analyze(other, model, text(model), orders={})
    for s in found.sites:
        after = (s.layer is None and s.site != "embedding") or s.layer == 2
        hit = s.layer == 1 and s.site in ("x", "B", "C", "scan", "gated", "rotate", "out_proj")
        assert (s.snr_db < math.inf) == (after or hit), s
        assert (s.own_snr_db is not None and s.own_snr_db < math.inf) == hit, s


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_weights_by_hand(family: str) -> None:
    """conv1d and Mamba1's dt_proj are rounded as they are; the others must be about as good."""
    model = tiny_model(tiny_config(family))
    network, orders = quantized(model, "w8a8")
    found = {(w.layer, w.name): w for w in analyze(network, model, text(model), orders=orders).weights}
    names = ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]
    names = names if family == "mamba" else [n for n in names if hasattr(model.blocks[0].mixer, n)]
    blocks = [(i, name) for i in range(2) for name in names]
    assert list(found) == [(None, "embedding"), *blocks, (None, "lm_head")]
    assert all(w.snr_db > 35 and w.bits == 8 for w in found.values())
    order = orders[1].channel_perm if family == "mamba2" else torch.arange(64)
    rows = torch.cat([order, torch.arange(64, network.blocks[1].mixer.conv1d.channels)])
    wanted = model.blocks[1].mixer.conv1d.float_weight[rows]
    got = network.blocks[1].mixer.conv1d.weight.dequantize()
    assert found[1, "conv1d"].snr_db == pytest.approx(snr(wanted, got), abs=1e-6)


@pytest.mark.parametrize(("tokens", "logits"), [(1, 1), (48, 20_000)], ids=["one by one", "some at once"])
def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, tokens: int, logits: int) -> None:
    model = tiny_model(tiny_config("mamba2"))
    network, orders = quantized(model)
    ids = text(model)
    whole = analyze(network, model, ids, orders=orders)
    monkeypatch.setattr(analyze_module, "_TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(analyze_module, "_LOGITS_BYTES", logits)
    parts = analyze(network, model, ids, orders=orders)
    for a, b in zip(whole.sites, parts.sites, strict=True):
        assert a.snr_db == pytest.approx(b.snr_db, abs=1e-2), a
        assert a.absmax == pytest.approx(b.absmax, rel=1e-3), a
    assert whole.logits.kl_by_position == pytest.approx(parts.logits.kl_by_position, rel=1e-3)
    assert parts.logits.perplexity == pytest.approx(whole.logits.perplexity, rel=1e-5)
    assert (parts.windows, parts.window_length) == (3, 24)


def test_mixed_precisions_and_clipped_codes() -> None:
    model = tiny_model(tiny_config("mamba2"))
    float_block = Override(blocks=(1,), precision=Precision(weights="int4"))
    network, orders = quantized(model, "w4a8", overrides=(float_block,))
    network.blocks[0].mixer.rotate.out_scale.fill_(1e-6)  # every code beyond its limits
    found = analyze(network, model, text(model), orders=orders)
    assert site(found, 0, "rotate").at_limit == 1.0
    assert site(found, 0, "rotate").clipped > 0.99
    assert (found.worst(1)[0].layer, found.worst(1)[0].site) in ((0, "rotate"), (0, "out_proj"))
    assert site(found, 0, "gated").at_limit is None  # float there
    assert {s.at_limit for s in found.sites if s.layer == 1} == {None}
    assert site(found, 1, "norm").own_snr_db > 100  # the same floats but for rounding
    assert site(found, 1, "in_proj").own_snr_db < 40


def test_two_quantized_models() -> None:
    model = tiny_model(tiny_config("mamba2"))
    first, orders = quantized(model)
    second, other_orders = quantized(model, "w8a8")
    same = analyze(first, first, text(model), orders=orders, reference_orders=orders)
    assert {s.snr_db for s in same.sites} == {math.inf} and same.left_out == {}
    alike = analyze(first, second, text(model), orders=orders, reference_orders=other_orders)
    assert alike.left_out == {} and 10 < site(alike, 1, "x").snr_db < 40
    plain, plain_orders = quantized(model, rotate=False)
    found = analyze(first, plain, text(model), orders=orders, reference_orders=plain_orders)
    assert {"residual", "norm", "out_proj", "rotate", "embedding", "norm_f"} == found.left_out.keys()
    assert all(s.own_snr_db is None for s in found.sites)
    assert site(found, 1, "B").snr_db > 5 and found.worst(3)


def test_other_sizes_are_refused() -> None:
    model, wider = (tiny_model(tiny_config("mamba2", **c)) for c in ({}, {"d_state": 8}))
    with pytest.raises(QuambaError, match=r"differ in d_state \(16 and 8\), expected the float model"):
        analyze(model, wider, text(model))
    other = tiny_model(tiny_config("mamba"))
    with pytest.raises(QuambaError, match=r"differ in family \(mamba and mamba2\)"):
        analyze(other, model, text(model))


def test_the_models_stay_as_they_were() -> None:
    model = tiny_model(tiny_config("mamba2"))
    network, orders = quantized(model)
    before = [{k: v.clone() for k, v in m.named_tensors().items()} for m in (model, network)]
    analyze(network, model, text(model), orders=orders)
    for m, tensors in zip((model, network), before, strict=True):
        assert m.named_tensors().keys() == tensors.keys()
        assert all(torch.equal(v, tensors[k]) for k, v in m.named_tensors().items())


def test_orders_are_channel_orders() -> None:
    _, orders = quantized(tiny_model(tiny_config("mamba2")))
    assert orders is not None and all(isinstance(order, ChannelOrder) for order in orders.values())
