"""Published checkpoints written: real ones come back bit for bit, random ones tensor for tensor."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from variants import calibration_set
from zoo_fixtures import FIXTURES

from quamba.checkpoints.zoo.config import ZooConfig
from quamba.checkpoints.zoo.layout import zoo_layout
from quamba.checkpoints.zoo.read import read_zoo, zoo_recipe
from quamba.checkpoints.zoo.write import write_zoo, zoo_config_of
from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat, round_significant
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.plan import Plan, output_parts, resolve
from quamba.recipes.recipe import HeadGroups, Override, Precision, Recipe, Solver, load_recipe
from quamba.recipes.skeleton import skeleton

GROUP_NAME = "backbone.layers.0.mixer.ssm.state_group"


def model_config(family: str, **changes: Any) -> ModelConfig:
    """Sizes that need padding columns, and two SSD groups in Mamba2."""
    common = {"d_model": 256, "n_layer": 2, "vocab_size": 61, "pad_vocab_size_multiple": 8}
    if family == "mamba2":
        return Mamba2Config(**{**common, "d_state": 64, "ngroups": 2, "chunk_size": 16, **changes})
    return MambaConfig(**{**common, **changes})


def zoo_plan(family: str = "mamba", label: str = "W4A8", grouped: bool = False, **changes: Any) -> Plan:
    """The plan of a published model; a label "W4AX" for blocks W4A8 and W4A16."""
    hybrid = label == "W4AX"
    config = ZooConfig(
        model=model_config(family, **changes.pop("model", {})),
        layers=("W4A8", "W4A16") if hybrid else (label, label),
        hybrid=hybrid,
        embedding=changes.pop("embedding", "int8" if label == "W8A8" else "int4"),
        head=changes.pop("head", "W4A8" if hybrid else label),
    )
    recipe = zoo_recipe(config, grouped).replace(**changes)
    return resolve(recipe, config.model)


def random_network(plan: Plan, seed: int = 0) -> MambaLM:
    """A network of the plan whose values a published file can hold."""
    generator = torch.Generator().manual_seed(seed)
    network = skeleton(plan).set_compute_dtype(torch.float16)
    tensors = {}
    for name, like in network.named_tensors().items():
        if name.endswith(".data"):
            low, high = (0, 256) if like.dtype == torch.uint8 else (-127, 128)
            value = torch.randint(low, high, like.shape, generator=generator)
        elif name.endswith("state_group"):
            value = random_groups(plan.config, generator)
        elif name.endswith(".out_scale") or (".conv1d." in name and name.endswith(".scale")):
            value = scale_of_parts(plan.config, name, like, generator)
        elif name.endswith("scale"):
            value = positive(like.shape, generator)
        else:
            value = torch.randn(like.shape, generator=generator).half()
        tensors[name] = value.to(like.dtype)
    for name in [name for name in tensors if name.endswith("state_group")]:
        tensors[name.replace("ssm.state_group", "conv1d.out_scale")] = scale_of_groups(
            plan.config, tensors[name], generator
        )
    network.load_tensors(tensors)
    return network


def positive(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales of 11 significant bits."""
    return round_significant(torch.rand(shape, generator=generator) * 0.1 + 0.01)


def scale_of_parts(config: ModelConfig, name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Scales that the channels of z, of x, and so on share."""
    leaf = name.split(".")[4] if ".mixer." in name else ""
    parts = output_parts(config, leaf) if like.numel() > 1 else None
    scales = [positive((1,), generator).expand(n) for n in parts or (like.numel(),)]
    return torch.cat(scales).view(like.shape)


def random_groups(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """(d_inner,) int32: every SSD group its own ranges of heads, every head group its own of channels."""
    assert isinstance(config, Mamba2Config)

    def ranges(n: int) -> Tensor:
        cuts = torch.randperm(n - 1, generator=generator)[:3] + 1
        return (torch.arange(n)[:, None] >= cuts.sort().values).sum(1)

    found = []
    for g in range(config.ngroups):
        heads = ranges(config.nheads // config.ngroups)
        channels = torch.stack([ranges(config.headdim) for _ in range(4)])[heads]
        found.append((g * 4 + heads[:, None]) * 4 + channels)
    return torch.stack(found).flatten().to(torch.int32)


def scale_of_groups(config: ModelConfig, group: Tensor, generator: torch.Generator) -> Tensor:
    """Output scales of the convolution that differ between groups."""
    assert isinstance(config, Mamba2Config)
    x = positive((16 * config.ngroups,), generator)[group.long()]
    bc = [positive((config.ngroups,), generator).repeat_interleave(config.d_state) for _ in "BC"]
    return torch.cat([x, *bc])


def load(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_equal_tensors(found: MambaLM, expected: MambaLM) -> None:
    tensors, wanted = found.named_tensors(), expected.named_tensors()
    assert tensors.keys() == wanted.keys()
    for name, like in wanted.items():
        assert tensors[name].dtype == like.dtype, name
        assert tensors[name].shape == like.shape, name
        assert torch.equal(bits(tensors[name]), bits(like)), name


@pytest.mark.parametrize("zoo_folder", FIXTURES, indirect=True)
def test_a_published_checkpoint_comes_back_bit_for_bit(zoo_folder: Path, tmp_path: Path) -> None:
    original = zoo_folder
    model = read_zoo(original)
    notes = write_zoo(tmp_path / "copy", model.network, model.plan)
    assert notes == []
    expected, found = load(original), load(tmp_path / "copy")
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is type(value), key
        if isinstance(value, Tensor):
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
            assert found[key].stride() == value.stride(), key
            assert torch.equal(bits(found[key]), bits(value)), key
        else:
            assert found[key] == value, key
    configs = [json.loads((f / "config.json").read_text()) for f in (original, tmp_path / "copy")]
    assert configs[0] == configs[1]
    ids = torch.arange(7)[None] * 31
    assert torch.equal(read_zoo(tmp_path / "copy").network(ids), model.network(ids))


RANDOM = {
    "mamba-w8a8": zoo_plan("mamba", "W8A8"),
    "mamba-w4a8": zoo_plan("mamba", "W4A8"),
    "mamba-w4a16": zoo_plan("mamba", "W4A16"),
    "mamba-w8a8-float-ends": zoo_plan("mamba", "W8A8", embedding="float", head="FP16"),
    "mamba-w4a8-int8-ends": zoo_plan("mamba", "W4A8", embedding="int8", head="W8A8"),
    "mamba-w4a16-float-embedding": zoo_plan("mamba", "W4A16", embedding="float"),
    "mamba2-w8a8-grouped": zoo_plan("mamba2", "W8A8", True),
    "mamba2-w4a8-grouped": zoo_plan("mamba2", "W4A8", True),
    "mamba2-w8a8-ungrouped": zoo_plan("mamba2", "W8A8"),
    "mamba2-w4a8-ungrouped": zoo_plan("mamba2", "W4A8"),
    "mamba2-w4a16": zoo_plan("mamba2", "W4A16"),
    "mamba2-w4a16-float-ends": zoo_plan("mamba2", "W4A16", embedding="float", head="FP16"),
    "mamba2-hybrid-grouped": zoo_plan("mamba2", "W4AX", True),
    "mamba2-hybrid-ungrouped": zoo_plan("mamba2", "W4AX"),
    "mamba2-w8a8-12-times-2^k": zoo_plan("mamba2", "W8A8", True, model={"d_model": 384}),
    "mamba-w4a8-40-times-2^k": zoo_plan("mamba", "W4A8", model={"d_model": 640, "dt_rank": 48}),
}


@pytest.mark.parametrize("plan", RANDOM.values(), ids=RANDOM)
def test_every_tensor_of_a_random_model_comes_back(plan: Plan, tmp_path: Path) -> None:
    network = random_network(plan)
    write_zoo(tmp_path / "zoo", network, plan)
    back = read_zoo(tmp_path / "zoo")
    assert_equal_tensors(back.network, network)
    assert back.plan.blocks == plan.blocks
    assert back.plan.recipe == plan.recipe
    assert back.plan.config == replace(plan.config, tie_embeddings=False)


@pytest.mark.parametrize("plan", RANDOM.values(), ids=RANDOM)
def test_the_file_is_laid_out_as_published(plan: Plan, tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo", random_network(plan), plan)
    stored = load(tmp_path / "zoo")
    layout = zoo_layout(zoo_config_of(plan), grouped=plan.group_heads is not None)
    assert list(stored) == list(layout)
    storages = set()
    for name, value in stored.items():
        entry = layout[name]
        if not isinstance(value, Tensor):
            assert entry.kind == ("none" if value is None else "float"), name
            continue
        assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape), name
        rows = value.t() if entry.transposed else value
        assert rows.stride() == torch.empty(rows.shape).stride(), name
        assert value.untyped_storage().nbytes() == value.nbytes, name
        storages.add(value.untyped_storage().data_ptr())
        if name.endswith("workspace"):
            assert not bool(value.any()), name
    assert len(storages) == sum(isinstance(value, Tensor) for value in stored.values())


@pytest.mark.parametrize("name", ["mamba-w8a8", "mamba2-w4a16"])
def test_views_of_larger_memory_are_written_alone(name: str, tmp_path: Path) -> None:
    plan = RANDOM[name]
    network = random_network(plan)
    write_zoo(tmp_path / "own", network, plan)
    views = {key: torch.stack([value, value])[1] for key, value in network.named_tensors().items()}
    network.load_tensors(views)
    write_zoo(tmp_path / "views", network, plan)
    assert (tmp_path / "views/pytorch_model.bin").stat().st_size == (
        tmp_path / "own/pytorch_model.bin"
    ).stat().st_size
    assert_equal_tensors(read_zoo(tmp_path / "views").network, read_zoo(tmp_path / "own").network)
    own, views = load(tmp_path / "own"), load(tmp_path / "views")
    for key, value in own.items():
        assert not isinstance(value, Tensor) or views[key].stride() == value.stride(), key


def test_logits_come_back_bit_for_bit(tmp_path: Path) -> None:
    plan = RANDOM["mamba2-hybrid-grouped"]
    network = random_network(plan)
    write_zoo(tmp_path / "zoo", network, plan)
    ids = torch.arange(9)[None]
    assert torch.equal(read_zoo(tmp_path / "zoo").network(ids), network(ids))


@pytest.mark.parametrize("name", ["zoo-w8a8", "zoo-w4a8", "zoo-w4a16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_what_the_shipped_recipes_make_is_exact_in_the_file(family: str, name: str, tmp_path: Path) -> None:
    config = model_config(family)
    recipe = load_recipe(name).replace(solver=Solver(kind="rtn"))
    network, plan, _ = quantize_model(tiny_model(config), recipe, calibration_set(config, num=3))
    assert write_zoo(tmp_path / "zoo", network, plan) == []
    assert_equal_tensors(read_zoo(tmp_path / "zoo").network, network.set_compute_dtype(torch.float16))


def test_a_float_of_the_file_is_the_image_of_a_float32(tmp_path: Path) -> None:
    plan = RANDOM["mamba-w8a8"]
    network = random_network(plan)
    write_zoo(tmp_path / "zoo", network, plan)
    scale = network.named_tensors()["backbone.norm_f.out_scale"]
    assert load(tmp_path / "zoo")["backbone.norm_f.output_scale"] == float(scale)


@pytest.mark.parametrize(
    ("granularity", "shape"), [("channel", (1288, 1)), ("tensor", (1, 1))], ids=["channel", "tensor"]
)
def test_int8_in_proj_of_mamba2_may_have_any_scales_of_rows(
    granularity: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    plan = RANDOM["mamba2-w8a8-grouped"]
    in_proj = WeightFormat(8, granularity)  # type: ignore[arg-type]
    blocks = tuple(replace(b, weights={**b.weights, "in_proj": in_proj}) for b in plan.blocks)
    plan = replace(plan, blocks=blocks)
    network = random_network(plan)
    write_zoo(tmp_path / "zoo", network, plan)
    name = "backbone.layers.1.mixer.in_proj.weight.scale"
    scale = network.named_tensors()[name]
    assert scale.shape == shape
    assert torch.equal(read_zoo(tmp_path / "zoo").network.named_tensors()[name], scale.expand(1288, 1))


def test_a_tied_model_is_written_untied(tmp_path: Path) -> None:
    plan = zoo_plan("mamba", "W8A8", model={"tie_embeddings": True})
    write_zoo(tmp_path / "zoo", random_network(plan), plan)
    assert json.loads((tmp_path / "zoo" / "config.json").read_text())["tie_embeddings"] is False


def test_head_groups_without_heads_or_channels_are_written(tmp_path: Path) -> None:
    """All but one of the head groups of an SSD group and of the channel groups of its heads."""
    plan = RANDOM["mamba2-w4a8-grouped"]
    network = random_network(plan)
    mixer = network.blocks[0].mixer
    group = torch.tensor([5, 16 + 10]).repeat_interleave(256).to(torch.int32)
    x_scale = mixer.conv1d.out_scale
    assert x_scale is not None
    x_scale[:256], x_scale[256:512] = 0.25, 0.5
    mixer.ssm.state_group = group
    write_zoo(tmp_path / "zoo", network, plan)
    assert_equal_tensors(read_zoo(tmp_path / "zoo").network, network)


# --- notes ---


def with_tensor(network: MambaLM, name: str, value: Tensor) -> MambaLM:
    network.load_tensors({**network.named_tensors(), name: value})
    return network


def test_a_rounded_value_is_noted_with_its_largest_change(tmp_path: Path) -> None:
    plan = RANDOM["mamba2-w4a16"]
    network = random_network(plan)
    for i, change in ((0, 2.0**-12), (1, 2.0**-13)):
        name = f"backbone.layers.{i}.mixer.ssm.dt_bias"
        value = torch.ones_like(network.named_tensors()[name])
        value[2] += change
        network = with_tensor(network, name, value)
    (note,) = write_zoo(tmp_path / "zoo", network, plan)
    assert "backbone.layers.*.mixer.ssm.dt_bias" in note
    assert "2.4e-04" in note


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("mamba-w4a16", "mixer.conv1d.weight"),
        ("mamba-w4a16", "mixer.conv1d.bias"),
        ("mamba-w4a16", "mixer.dt_proj.weight"),
        ("mamba2-w4a16", "mixer.ssm.A_log"),
        ("mamba2-w4a16", "mixer.norm.weight"),
        ("mamba2-w8a8-grouped", "mixer.norm.weight"),
        ("mamba2-w8a8-grouped", "mixer.ssm.dt_bias"),
    ],
    ids=lambda text: text,
)
def test_what_the_file_has_in_float16_is_noted_where_it_changes(name: str, leaf: str, tmp_path: Path) -> None:
    network = random_network(RANDOM[name]).set_compute_dtype(torch.float32)
    tensor = f"backbone.layers.1.{leaf}"
    value = network.named_tensors()[tensor].float() * (1 + 2.0**-12)
    notes = write_zoo(tmp_path / "zoo", with_tensor(network, tensor, value), RANDOM[name])
    assert [f"backbone.layers.*.{leaf} is rounded" in note for note in notes] == [True]


@pytest.mark.parametrize("leaf", ["A_log", "D", "dt_bias"])
def test_what_mamba1_has_in_float32_stays(leaf: str, tmp_path: Path) -> None:
    plan = RANDOM["mamba-w4a16"]
    name = f"backbone.layers.0.mixer.ssm.{leaf}"
    network = random_network(plan)
    value = network.named_tensors()[name] * (1 + 2.0**-23)
    assert write_zoo(tmp_path / "zoo", with_tensor(network, name, value), plan) == []
    assert torch.equal(read_zoo(tmp_path / "zoo").network.named_tensors()[name], value)


def test_a_scale_of_more_bits_than_a_quotient_keeps_is_noted(tmp_path: Path) -> None:
    plan = RANDOM["mamba2-w8a8-grouped"]
    name = "backbone.layers.0.mixer.in_proj.weight.scale"
    network = random_network(plan)
    value = torch.nextafter(network.named_tensors()[name], torch.tensor(1.0))
    (note,) = write_zoo(tmp_path / "zoo", with_tensor(network, name, value), plan)
    assert "backbone.layers.*.mixer.in_proj.weight.scale is rounded" in note
    back = read_zoo(tmp_path / "zoo").network.named_tensors()[name]
    torch.testing.assert_close(back, value, rtol=2.0**-21, atol=0.0)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (RANDOM["mamba2-w8a8-ungrouped"], "cannot load this file: it expects 4 x 4 head groups"),
        (RANDOM["mamba2-hybrid-ungrouped"], "cannot load this file: it expects 4 x 4 head groups"),
        (RANDOM["mamba-w8a8-float-ends"], "cannot load this file: it fails on a float head"),
        (zoo_plan("mamba", "W8A8", rounding="half_even"), "rounds ties to even"),
    ],
    ids=["ungrouped", "ungrouped-hybrid", "float-head", "rounding"],
)
def test_what_the_published_code_makes_of_it_is_noted(plan: Plan, said: str, tmp_path: Path) -> None:
    (note,) = write_zoo(tmp_path / "zoo", random_network(plan), plan)
    assert said in note


@pytest.mark.parametrize("name", ["mamba-w8a8", "mamba2-w4a16", "mamba2-hybrid-grouped"])
def test_there_are_no_notes_on_what_is_exact(name: str, tmp_path: Path) -> None:
    assert write_zoo(tmp_path / "zoo", random_network(RANDOM[name]), RANDOM[name]) == []


# --- refusals ---

W8A8 = Precision(weights="int8", activations="int8", state="int8")
W4A8 = Precision(weights="int4", activations="int8", state="int8")
W4A16 = Precision(weights="int4", activations="float")
GROUPED = WeightFormat(4, "group", 128)

REFUSED_MODELS = {
    "falcon": ("mamba", {"bcdt_rms_eps": 1e-6}, "bcdt_rms_eps 1e-06, expected None"),
    "projection-bias": ("mamba", {"bias": True}, "bias True, expected False"),
    "no-conv-bias": ("mamba", {"conv_bias": False}, "conv_bias False, expected True"),
    "norm-eps": ("mamba", {"norm_eps": 1e-6}, "norm_eps 1e-06, expected 1e-05"),
    "D-has-hdim": ("mamba2", {"D_has_hdim": True}, "D_has_hdim True, expected False"),
    "norm-before-gate": ("mamba2", {"norm_before_gate": True}, "norm_before_gate True, expected False"),
    "dt-limit": ("mamba2", {"dt_limit": (0.0, 1.0)}, r"dt_limit \(0.0, 1.0\), expected"),
    "rotation-of-96": (
        "mamba2",
        {"d_model": 96, "headdim": 16},
        "d_model is 96, .* does not rotate, .* such as 64",
    ),
    "rotation-of-224": ("mamba", {"d_model": 224}, "d_model is 224, .* does not rotate, .* such as 192"),
    "rotation-of-d-inner": ("mamba", {"d_model": 16, "expand": 6}, "d_inner is 96, .* does not rotate"),
    "dt-rank": ("mamba", {"dt_rank": 8}, "dt_rank is 8, expected a multiple of 16"),
    "d-conv": ("mamba2", {"d_conv": 3}, "d_conv is 3, expected 4"),
    "channels-of-B": (
        "mamba2",
        {"d_state": 32},
        r"ngroups \* d_state is 64, expected a multiple of 128",
    ),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_that_the_format_cannot_hold(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuambaError, match=message):
        zoo_config_of(zoo_plan(family, "W8A8", model=changes))


REFUSED_INT8_SIZES = {
    "one-row-kernel": ("mamba2", {"d_model": 16, "expand": 8}, "d_model is 16, expected a multiple of 32"),
    "d-model": ("mamba", {"d_model": 8, "dt_rank": 16}, "d_model is 8, expected a multiple of 16"),
    "conv-channels": (
        "mamba2",
        {"d_model": 32, "ngroups": 1, "d_state": 128},
        "d_inner is 64, expected a multiple of 128 for int8 convolutions",
    ),
}


@pytest.mark.parametrize(
    ("family", "changes", "message"), REFUSED_INT8_SIZES.values(), ids=REFUSED_INT8_SIZES
)
def test_an_int8_model_of_sizes_without_kernels(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuambaError, match=message):
        zoo_config_of(zoo_plan(family, "W8A8", embedding="float", model=changes))


@pytest.mark.parametrize("head", ["W4A16", "FP16"])
def test_4_bit_weights_of_one_group_of_columns(head: str) -> None:
    with pytest.raises(QuambaError, match=r"d_model is 128, expected more than 128 .* recipe 'zoo-w8a8'"):
        zoo_config_of(zoo_plan("mamba", "W4A16", model={"d_model": 128}, head=head))


def test_4_bit_weights_with_part_of_a_group_of_columns() -> None:
    plan = replace(zoo_plan("mamba", "W4A16"), config=model_config("mamba", d_model=192))
    with pytest.raises(QuambaError, match="d_model is 192, expected a multiple of 128 for 4-bit weights"):
        zoo_config_of(plan)


def test_an_embedding_of_a_width_without_kernels() -> None:
    with pytest.raises(
        QuambaError, match="d_model is 16, expected a multiple of 32 for an integer embedding"
    ):
        zoo_config_of(zoo_plan("mamba", "W8A8", embedding="int4", model={"d_model": 16, "dt_rank": 16}))


def test_layer_norm_is_refused() -> None:
    plan = resolve(Recipe(name="none", blocks=Precision()), model_config("mamba", rms_norm=False))
    with pytest.raises(QuambaError, match="rms_norm False, expected True"):
        zoo_config_of(plan)


REFUSED_RECIPES: dict[str, tuple[Plan, str]] = {
    "no-rotation": (zoo_plan(rotate=False), "not rotated"),
    "float-blocks": (zoo_plan(blocks=Precision()), "FP16 blocks, expected all blocks in one of W8A8"),
    "weights-only-int8": (
        zoo_plan(blocks=Precision(weights="int8")),
        "W8A16 blocks, expected all blocks in one of W8A8",
    ),
    "mixed-mamba1": (
        zoo_plan(overrides=(Override(blocks=(1,), precision=W4A16),)),
        "W4A16 and W4A8 blocks, expected all blocks in one of W8A8, W4A8, W4A16;",
    ),
    "mixed-with-w8a8": (
        zoo_plan("mamba2", overrides=(Override(blocks=(1,), precision=W8A8),)),
        "W4A8 and W8A8 blocks, .* or a mix of W4A8 and W4A16",
    ),
    "float-state": (
        zoo_plan(blocks=Precision(weights="int4", activations="int8", state="fp16")),
        "Block 0 caches its SSM state in fp16, expected int8",
    ),
    "wide-state": (
        zoo_plan("mamba", "W4A16", blocks=Precision(weights="int4", state="fp32")),
        "SSM state in fp32, expected fp16",
    ),
    "float-parameters": (zoo_plan(parameters="float16"), "A_log, D and biases in floats, expected int8"),
    "conv-scales": (zoo_plan(conv_scales="channel"), "convolution of block 0 has a scale a channel"),
    "activation-scales": (zoo_plan(activation_scales="channel"), "activation scales of single channels"),
    "one-level": (zoo_plan(int4=GROUPED), "in_proj of block 0 .* 'group' of 128, expected .* 'two_level'"),
    "other-groups": (
        zoo_plan("mamba2", "W4A16", int4=WeightFormat(4, "group", 64)),
        "'group' of 64, expected 4 bits with float16 scales of granularity 'group' of 128",
    ),
    "float32-group-scales": (
        zoo_plan("mamba2", "W4A16", int4=WeightFormat(4, "group", 128, scale_bits=32)),
        "float32 scales .* expected 4 bits with float16 scales",
    ),
    "int8-scales-of-rows": (
        zoo_plan("mamba", "W8A8", int8=WeightFormat(8, "channel")),
        "in_proj of block 0 has 8 bits with float32 scales of granularity 'channel', expected .* 'tensor'",
    ),
    "int8-out-proj-scales": (
        zoo_plan("mamba2", "W8A8", True, int8=WeightFormat(8, "channel")),
        "out_proj of block 0 has .* 'channel', expected .* 'tensor'",
    ),
    "int8-in-proj-groups": (
        zoo_plan("mamba2", "W8A8", int8=WeightFormat(8, "group", 128)),
        "in_proj of block 0 has .* 'group' of 128, expected .* 'tensor'",
    ),
    "int4-dt-proj": (
        zoo_plan(dt_proj="int4", model={"d_model": 2048}),
        "dt_proj of block 0 has 4 bits .* expected 8 bits",
    ),
    "int8-dt-proj": (
        zoo_plan("mamba", "W4A16", dt_proj="int8"),
        "dt_proj of block 0 has 8 bits .* expected floats",
    ),
    "embedding-in-groups": (
        zoo_plan(embedding_int4=GROUPED),
        "embedding has 4 bits with float16 scales of granularity 'group' of 128, expected .* 'channel'",
    ),
    "embedding-in-float32-scales": (
        zoo_plan("mamba", "W8A8", embedding_int8=WeightFormat(8, "channel")),
        "embedding has 8 bits with float32 scales of granularity 'channel', expected 8 bits with float16",
    ),
    "head-of-other-activations": (
        zoo_plan("mamba", "W4A16", head="W4A8"),
        "head is in W4A8 behind W4A16 blocks, expected W4A16 or a float head",
    ),
    "head-w4a16": (zoo_plan(head="W4A16"), "head is in W4A16 behind W4A8 blocks, expected W4A8"),
    "head-w8a16": (
        resolve(
            zoo_plan("mamba", "W4A16").recipe.replace(head=Precision(weights="int8")), model_config("mamba")
        ),
        "head is in W8A16, expected one of W8A8, W4A8, W4A16",
    ),
    "hybrid-embedding": (
        zoo_plan("mamba2", "W4AX", embedding="int8"),
        "embedding in int8 and the head in W4A8, expected int4 and W4A8",
    ),
    "hybrid-head": (
        zoo_plan("mamba2", "W4AX", head="FP16"),
        "embedding in int4 and the head in FP16, expected int4 and W4A8",
    ),
    "head-groups": (
        zoo_plan("mamba2", group_heads=HeadGroups(heads=2, channels=4)),
        "2 x 4 groups of heads and channels, expected 4 x 4",
    ),
    "our-w8a8": (resolve(load_recipe("w8a8"), model_config("mamba")), "quantize with recipe 'zoo-w8a8'"),
    "our-w4a8": (resolve(load_recipe("w4a8"), model_config("mamba2")), "quantize with recipe 'zoo-w4a8'"),
    "our-w4a16": (resolve(load_recipe("w4a16"), model_config("mamba2")), "quantize with recipe 'zoo-w4a16'"),
}


@pytest.mark.parametrize(("plan", "message"), REFUSED_RECIPES.values(), ids=REFUSED_RECIPES)
def test_a_recipe_that_the_format_cannot_hold(plan: Plan, message: str, tmp_path: Path) -> None:
    with pytest.raises(QuambaError, match=message) as caught:
        write_zoo(tmp_path / "zoo", MambaLM.empty(plan.config), plan)
    assert str(caught.value).count(". ") == 0
    assert list(tmp_path.iterdir()) == []


def bumped(name: str, index: Any, plan: str, by: float = 2.0) -> tuple[MambaLM, Plan]:
    """A network in which one scale is not that of its fellows."""
    network = random_network(RANDOM[plan])
    value = network.named_tensors()[name].clone()
    value[index] *= by
    return with_tensor(network, name, value), RANDOM[plan]


MIXER = "backbone.layers.0.mixer."
UNEVEN = {
    "in_proj-of-mamba": ("mamba-w8a8", "in_proj.out_scale", 3, "one for the whole tensor"),
    "conv-of-mamba": ("mamba-w4a8", "conv1d.out_scale", 3, "one for the whole tensor"),
    "x_proj": ("mamba-w4a8", "x_proj.out_scale", 30, "one for the whole tensor"),
    "dt_proj": ("mamba-w8a8", "dt_proj.out_scale", 3, "one for the whole tensor"),
    "z": ("mamba2-w8a8-grouped", "in_proj.out_scale", 3, "one for each of z, x, B, C, dt"),
    "dt": ("mamba2-w4a8-grouped", "in_proj.out_scale", -1, "one for each of z, x, B, C, dt"),
    "conv-weight": ("mamba2-w8a8-grouped", "conv1d.weight.scale", 3, "one for each of x, B, C"),
    "conv-bias": ("mamba2-w8a8-grouped", "conv1d.bias.scale", -1, "one for each of x, B, C"),
    "x-of-a-group": ("mamba2-w8a8-grouped", "conv1d.out_scale", 3, "each of the 4 x 4 head groups for x"),
    "B": ("mamba2-w8a8-grouped", "conv1d.out_scale", 512 + 3, "each SSD group for B and C"),
    "C": ("mamba2-w8a8-grouped", "conv1d.out_scale", -1, "each SSD group for B and C"),
    "x-without-groups": ("mamba2-w8a8-ungrouped", "conv1d.out_scale", 3, "one for each of x, B, C"),
    "B-without-groups": (
        "mamba2-w8a8-ungrouped",
        "conv1d.out_scale",
        slice(512, 576),
        "one for each of x, B, C",
    ),
}


@pytest.mark.parametrize(("plan", "leaf", "index", "message"), UNEVEN.values(), ids=UNEVEN)
def test_scales_finer_than_the_format_has(
    plan: str, leaf: str, index: Any, message: str, tmp_path: Path
) -> None:
    network, whole = bumped(MIXER + leaf, index, plan)
    with pytest.raises(QuambaError, match=message) as caught:
        write_zoo(tmp_path / "zoo", network, whole)
    assert MIXER + leaf in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["heads", "channels", "of-another-head", "of-another-ssd-group"])
def test_head_groups_that_are_no_ranges(kind: str, tmp_path: Path) -> None:
    plan = RANDOM["mamba2-w8a8-grouped"]
    network = random_network(plan)
    group = network.named_tensors()[GROUP_NAME].clone().view(2, 4, 64)
    if kind == "heads":
        group[0] = group[0].flip(0)
    elif kind == "channels":
        group[0, 1] = group[0, 1].flip(0)
    elif kind == "of-another-head":
        group[1, 2] = group[1, 1]
        group[1, 2, 5:] = group[1, 2, 5:].flip(0)
    else:
        group = group.flip(0)
    with pytest.raises(QuambaError, match="not made of 4 consecutive ranges of heads"):
        write_zoo(tmp_path / "zoo", with_tensor(network, GROUP_NAME, group.flatten()), plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [7e4, math.nan], ids=["large", "nan"])
def test_a_value_that_float16_does_not_hold(value: float, tmp_path: Path) -> None:
    plan = RANDOM["mamba2-w4a16"]
    network = random_network(plan)
    name = f"{MIXER}norm.weight"
    weight = network.named_tensors()[name].clone()
    weight[3] = value
    with pytest.raises(QuambaError, match="expected no more than the 65504 that float16 holds"):
        write_zoo(tmp_path / "zoo", with_tensor(network, name, weight), plan)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_another_plan_is_refused(tmp_path: Path) -> None:
    network = random_network(RANDOM["mamba-w4a8"])
    with pytest.raises(QuambaError, match=r"tensors do not fit its plan, first 'backbone\.embedding"):
        write_zoo(tmp_path / "zoo", network, RANDOM["mamba-w8a8"])


# --- the folder ---


def test_tokenizer_files_go_with_the_model(tmp_path: Path) -> None:
    plan = RANDOM["mamba-w8a8"]
    (tmp_path / "tokenizer.json").write_text("{}")
    write_zoo(tmp_path / "zoo", random_network(plan), plan, tokenizer_files=[tmp_path / "tokenizer.json"])
    files = sorted(file.name for file in (tmp_path / "zoo").iterdir())
    assert files == ["config.json", "pytorch_model.bin", "tokenizer.json"]


def test_a_folder_is_replaced_only_where_asked(tmp_path: Path) -> None:
    plan = RANDOM["mamba-w8a8"]
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(QuambaError, match="exists and is not empty"):
        write_zoo(folder, random_network(plan), plan)
    assert [file.name for file in folder.iterdir()] == ["old"]
    write_zoo(folder, random_network(plan), plan, overwrite=True)
    assert not (folder / "old").exists()
