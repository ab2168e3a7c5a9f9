"""The list of expected tensors against the model that is built from the same config."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

from quamba.models.lm import MambaLM
from quamba.models.shapes import expected_shapes

CHANGES = [
    {},
    {"bias": True, "conv_bias": False, "tie_embeddings": False, "rms_norm": False},
    {"vocab_size": 64, "d_conv": 3, "expand": 3},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_names_and_shapes_are_those_of_the_model(family, changes):
    config = tiny_config(family, **changes)
    model = {name: tuple(tensor.shape) for name, tensor in MambaLM.empty(config).named_tensors().items()}
    assert expected_shapes(config) == model


@pytest.mark.parametrize("changes", [{"ngroups": 2}, {"D_has_hdim": True}, {"norm_before_gate": True}])
def test_mamba2_switches(changes):
    config = tiny_config("mamba2", **changes)
    model = {name: tuple(tensor.shape) for name, tensor in MambaLM.empty(config).named_tensors().items()}
    assert expected_shapes(config) == model


def test_falcon_mamba_norms_have_no_tensors():
    config = tiny_config("mamba", bcdt_rms_eps=1e-6)
    model = {name: tuple(tensor.shape) for name, tensor in MambaLM.empty(config).named_tensors().items()}
    assert expected_shapes(config) == expected_shapes(tiny_config("mamba")) == model
