"""From statistics to the scales of a block: shapes, groups, percentile, and the value itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import RMS_VARIANTS, calibration_set, shipped, with_state

from quamba.calibration.collect import collect
from quamba.calibration.sites import SMALLEST_MAXIMUM, BlockObservers, BlockScales, scale_of
from quamba.models.lm import MambaLM
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.sites import SCALAR_SITES, block_segments
from quamba.recipes.skeleton import skeleton


def scales(model: MambaLM, plan: Plan, layer: int, x_groups: torch.Tensor | None = None) -> BlockScales:
    observers = BlockObservers(plan, layer, x_groups, model.device)
    collect(model, calibration_set(model.config).batches(), observers.watches, observers.state_watches)
    return observers.scales()


def outputs(model: MambaLM, leaf: str) -> torch.Tensor:
    """What a leaf of block 0 gives for every unpadded calibration token, (tokens, channels)."""
    seen: list[torch.Tensor] = []
    module = model.blocks[0].get_submodule(leaf)

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = module.register_forward_hook(keep)
    for sequence in calibration_set(model.config).sequences:
        model(sequence[None])
    handle.remove()
    return torch.cat(seen)


def test_scale_of() -> None:
    found = scale_of(torch.tensor([127.0, 0.0, 63.5], dtype=torch.float64))
    assert found.dtype == torch.float32
    assert found[0] == 1.0
    assert found[2] == 0.5
    assert 0 < found[1] == torch.tensor(SMALLEST_MAXIMUM) / 127


@pytest.mark.parametrize("state", ["int8", "fp16"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "quamba1-w8a8"])
@pytest.mark.parametrize("name", RMS_VARIANTS)
def test_shapes_are_those_of_the_skeleton(name: str, recipe: str, state: str) -> None:
    config = RMS_VARIANTS[name]
    plan = resolve(with_state(shipped(recipe, config), state), config)
    groups = None
    if plan.group_heads is not None:
        groups = torch.arange(config.d_inner) % plan.state_groups
    found = scales(tiny_model(config), plan, 0, groups)
    block = skeleton(plan).blocks[0]
    assert found.activations
    for leaf, scale in found.activations.items():
        expected = block.get_submodule(leaf).out_scale
        assert scale.shape == expected.shape, leaf
        assert scale.dtype == expected.dtype == torch.float32
        assert (scale > 0).all()
    expected_leaves = {n for n, m in block.named_modules() if getattr(m, "out_scale", None) is not None}
    assert set(found.activations) == expected_leaves
    if state != "int8":
        assert found.state_scale is found.state_group is None
        assert block.mixer.ssm.state_scale is block.mixer.ssm.state_group is None
        return
    assert found.state_scale.shape == block.mixer.ssm.state_scale.shape
    assert found.state_scale.dtype == block.mixer.ssm.state_scale.dtype == torch.float32
    assert (found.state_scale > 0).all()
    if groups is None:
        assert found.state_group is None
    else:
        assert torch.equal(found.state_group.long(), groups)
        assert found.state_group.dtype == block.mixer.ssm.state_group.dtype


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_scales_are_maxima(family: str) -> None:
    config = tiny_config(family)
    plan = resolve(shipped("w8a8", config, percentile_alpha=1.0, group_heads=None), config)
    model = tiny_model(config)
    found = scales(model, plan, 0)
    for leaf, scale in found.activations.items():
        maxima = outputs(model, leaf).abs().amax(0)
        for segment in block_segments(plan, None)[leaf]:
            part = slice(segment.start, segment.start + len(segment.groups))
            for group in segment.groups.unique():
                expected = maxima[part][segment.groups == group].max() / 127
                actual = scale if leaf in SCALAR_SITES else scale[part][segment.groups == group]
                torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-5, atol=0)


def test_segments_cover_every_channel_once() -> None:
    for config in RMS_VARIANTS.values():
        plan = resolve(shipped("w8a8", config), config)
        model = tiny_model(config)
        for leaf, segments in block_segments(plan, None).items():
            position = 0
            for segment in segments:
                assert segment.start == position
                position += len(segment.groups)
            assert position == outputs(model, leaf).shape[-1]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_percentile_is_for_x_alone(family: str) -> None:
    config = tiny_config(family)
    recipe = shipped("w8a8", config, group_heads=None, activation_scales="tensor")
    model = tiny_model(config)
    whole = scales(model, resolve(recipe.replace(percentile_alpha=1.0), config), 0)
    clipped = scales(model, resolve(recipe.replace(percentile_alpha=0.9), config), 0)
    for leaf, scale in whole.activations.items():
        if leaf != "mixer.conv1d":
            assert torch.equal(clipped.activations[leaf], scale)
    x = slice(0, config.d_inner)
    assert (clipped.activations["mixer.conv1d"][x] < 0.8 * whole.activations["mixer.conv1d"][x]).all()
    rest = slice(config.d_inner, None)
    assert torch.equal(clipped.activations["mixer.conv1d"][rest], whole.activations["mixer.conv1d"][rest])


def test_head_groups_share_scales() -> None:
    config = tiny_config("mamba2")
    plan = resolve(shipped("w8a8", config), config)
    groups = torch.arange(config.d_inner) % plan.state_groups
    found = scales(tiny_model(config), plan, 0, groups)
    x = found.activations["mixer.conv1d"][: config.d_inner]
    assert len(x.unique()) == plan.state_groups
    assert all(len(x[groups == g].unique()) == 1 for g in range(plan.state_groups))


def test_float_blocks_have_no_observers() -> None:
    config = tiny_config("mamba2")
    observers = BlockObservers(resolve(shipped("w4a16", config), config), 0, None, torch.device("cpu"))
    assert observers.watches == observers.state_watches == []
    assert observers.scales() == BlockScales()
