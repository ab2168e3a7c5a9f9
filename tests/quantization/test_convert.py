"""Formats put into the leaves of one block."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from variants import calibration_set, shipped, with_state

from quamba.calibration.collect import collect
from quamba.calibration.sites import BlockObservers
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.quantization.convert import nearest, set_block_formats
from quamba.recipes.plan import resolve


@pytest.mark.parametrize(("state", "dtype"), [("int8", torch.int8), ("fp16", torch.float16)])
def test_x_proj_takes_the_scales_of_its_input(state: str, dtype: torch.dtype) -> None:
    """W (s * q) = (W diag(s)) q, with q the codes of the convolution's output."""
    config = tiny_config("mamba")
    model, plan = tiny_model(config), resolve(with_state(shipped("w8a8", config), state), config)
    observers = BlockObservers(plan, 0, None, model.device)
    collect(model, calibration_set(config).batches(), observers.watches, observers.state_watches)
    scales = observers.scales()
    block = model.blocks[0]
    before = block.mixer.x_proj.float_weight.clone()
    set_block_formats(block, plan.blocks[0], scales)
    x = scales.activations["mixer.conv1d"]
    assert x.shape == (config.d_inner,)
    assert torch.equal(block.mixer.x_proj.float_weight, before * x)
    assert block.mixer.x_proj.input_scale_folded
    assert isinstance(block.mixer.conv1d.weight, QuantizedWeight)
    assert block.mixer.conv1d.out_scale is x
    assert block.mixer.ssm.state_dtype == dtype
    assert (scales.state_scale is not None) == (state == "int8")
    assert block.mixer.ssm.state_scale is scales.state_scale
    assert isinstance(block.mixer.in_proj.weight, torch.nn.Parameter)  # projections come after


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_nearest(bits: int, granularity: str) -> None:
    weight = torch.randn(7, 32)
    format = WeightFormat(bits, granularity)
    by_maximum, by_square = nearest(weight, format), nearest(weight, format, "mse")
    step = by_maximum.scale
    # In 4 bits the positive side ends one step before the negative one.
    assert ((weight - by_maximum.dequantize()).abs() <= 0.5001 * step + (bits == 4) * 0.5001 * step).all()
    error = [(weight - q.dequantize()).square().sum() for q in (by_square, by_maximum)]
    assert error[0] <= error[1]
