"""The state-spaces format: its config key by key, its tensors one by one, and the way back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config

from quamba.checkpoints.float import read_float, read_float_config
from quamba.checkpoints.upstream import (
    canonical_name,
    config_from_state_spaces,
    config_to_state_spaces,
    expected_shapes,
    state_spaces_name,
    write_state_spaces,
)
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, MambaConfig

DEMO_MODELS = Path(__file__).resolve().parents[2] / "assets" / "models"

SIZES = {"d_model": 32, "n_layer": 2, "vocab_size": 61}


def random_tensors(config, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(s, generator=generator).to(dtype) for name, s in expected_shapes(config).items()
    }


def put(folder: Path, fields: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint under the names and in the shapes that the state-spaces code writes."""
    family = "mamba2" if fields.get("ssm_cfg", {}).get("layer") == "Mamba2" else "mamba"
    stored = {
        state_spaces_name(name, family): t.unsqueeze(1) if name.endswith("conv1d.weight") else t
        for name, t in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    torch.save(stored, folder / "pytorch_model.bin")
    return folder


def test_the_first_published_configs_are_short():
    config = config_from_state_spaces({**SIZES, "ssm_cfg": {}, "fused_add_norm": True})
    assert config == MambaConfig(
        **SIZES,
        dt_rank=2,
        d_state=16,
        rms_norm=True,
        residual_in_fp32=True,
        tie_embeddings=True,
        pad_vocab_size_multiple=8,
    )
    assert config.padded_vocab_size == 64


def test_mamba2_defaults_to_a_padding_multiple_of_8_too():
    config = config_from_state_spaces({**SIZES, "ssm_cfg": {"layer": "Mamba2", "headdim": 16}})
    assert config == Mamba2Config(**SIZES, headdim=16, pad_vocab_size_multiple=8)


MAMBA1_VALUES = {"d_state": 8, "d_conv": 3, "expand": 3, "bias": True, "conv_bias": False, "dt_rank": 5}
MAMBA2_VALUES = {
    "d_state": 8,
    "d_conv": 3,
    "expand": 3,
    "bias": True,
    "conv_bias": False,
    "headdim": 8,
    "ngroups": 4,
    "chunk_size": 32,
    "D_has_hdim": True,
    "norm_before_gate": True,
}


@pytest.mark.parametrize(("layer", "values"), [("Mamba1", MAMBA1_VALUES), ("Mamba2", MAMBA2_VALUES)])
def test_every_field_reaches_the_config(layer, values):
    top = {
        "rms_norm": False,
        "residual_in_fp32": False,
        "tie_embeddings": False,
        "pad_vocab_size_multiple": 4,
    }
    ssm = {"layer": layer, **values}
    if layer == "Mamba2":
        ssm["dt_limit"] = [0.001, 0.1]
    config = config_from_state_spaces({**SIZES, **top, "ssm_cfg": ssm})
    for name, value in {**SIZES, **top, **values}.items():
        assert getattr(config, name) == value, name
    if layer == "Mamba2":
        assert config.dt_limit == (0.001, 0.1)


@pytest.mark.parametrize("high", ["Infinity", "null"])
def test_an_open_dt_limit(tmp_path, high):
    ssm = f'{{"layer": "Mamba2", "headdim": 16, "dt_limit": [0.5, {high}]}}'
    (tmp_path / "config.json").write_text(
        f'{{"d_model": 32, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {ssm}}}'
    )
    assert read_float_config(tmp_path).dt_limit == (0.5, math.inf)


def test_keys_without_effect_are_accepted():
    shared = {"dt_min": 0.1, "dt_max": 1, "dt_init_floor": 1e-4, "conv_init": None, "use_mem_eff_path": True}
    first = {**shared, "dt_init": "random", "dt_scale": 1.0, "use_fast_path": True, "dt_rank": "auto"}
    second = {
        **shared,
        "A_init_range": [1, 16],
        "d_ssm": None,
        "rmsnorm": True,
        "activation": "swish",
        "headdim": 16,
    }
    top = {"attn_layer_idx": [], "attn_cfg": {"num_heads": 4}, "d_intermediate": 0}
    assert config_from_state_spaces({**SIZES, **top, "ssm_cfg": first}) == config_from_state_spaces(SIZES)
    plain = config_from_state_spaces({**SIZES, "ssm_cfg": {"layer": "Mamba2", "headdim": 16}})
    assert config_from_state_spaces({**SIZES, **top, "ssm_cfg": {"layer": "Mamba2", **second}}) == plain
    explicit = {"layer": "Mamba2", **second, "d_ssm": 64, "learnable_init_states": False}
    assert config_from_state_spaces({**SIZES, "ssm_cfg": explicit}) == plain


REFUSED = [
    ({"attn_layer_idx": [3]}, {}, "attention layers"),
    ({"d_intermediate": 64}, {}, "MLP blocks"),
    (
        {"tie_embedings": False},
        {},
        r"Unknown key 'tie_embedings' in config.json. Did you mean 'tie_embeddings'\?",
    ),
    ({}, {"d_stat": 8}, r"Unknown key 'd_stat' in ssm_cfg of config.json. Did you mean 'd_state'\?"),
    ({}, {"headdim": 16}, "Unknown key 'headdim' in ssm_cfg"),
    ({}, {"layer": "Mamba2", "dt_rank": 4}, "Unknown key 'dt_rank' in ssm_cfg"),
    (
        {},
        {"layer": "Mamba3"},
        "'layer' in ssm_cfg of config.json is 'Mamba3', expected one of 'Mamba1', 'Mamba2'",
    ),
    ({}, {"layer": [{"W4A8": "W4A8QMamba2"}]}, "expected one of 'Mamba1', 'Mamba2'"),
    ({}, {"layer": "Mamba2", "headdim": 16, "rmsnorm": False}, "rmsnorm false"),
    ({}, {"layer": "Mamba2", "headdim": 16, "d_ssm": 32}, "d_ssm 32, expected null or d_inner 64"),
    ({}, {"layer": "Mamba2", "headdim": 16, "learnable_init_states": True}, "learnable_init_states true"),
    ({}, {"layer": "Mamba2", "headdim": 16, "activation": "relu"}, "'activation' in .* is 'relu'"),
    ({}, {"layer": "Mamba2", "headdim": 16, "dt_limit": 3}, "'dt_limit' in .* is 3, expected two numbers"),
    ({}, {"dt_rank": 0}, "'dt_rank' in .* is 0, expected 'auto' or a positive integer"),
    ({}, {"d_state": "16"}, "'d_state' in .* is '16', expected an integer"),
    ({"rms_norm": 1}, {}, "'rms_norm' in config.json is 1, expected true or false"),
    ({"n_layer": True}, {}, "'n_layer' in config.json is True, expected an integer"),
    ({"n_layer": 0}, {}, "n_layer is 0"),
]


@pytest.mark.parametrize(("top", "ssm", "sentence"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(top, ssm, sentence):
    with pytest.raises(QuambaError, match=sentence):
        config_from_state_spaces({**SIZES, **top, "ssm_cfg": ssm})


@pytest.mark.parametrize("missing", SIZES)
def test_sizes_have_no_default(missing):
    with pytest.raises(QuambaError, match=f"config.json lacks '{missing}'"):
        config_from_state_spaces({key: value for key, value in SIZES.items() if key != missing})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({**SIZES, "norm_cfg": {"norm": "QRMSNorm"}}, "is a model of the published Quamba zoo.*norm_cfg"),
        (
            {**SIZES, "quantization_config": {"quant_method": "quamba"}},
            "is a model that quamba has quantized",
        ),
        (
            {**SIZES, "quantization_config": {"quant_method": "gptq"}},
            "by another program .quant_method 'gptq'",
        ),
        ({**SIZES, "quantization_config": "int8"}, "by another program"),
        ({"model_type": "llama", "hidden_size": 8}, "model_type in .* is 'llama', expected one of 'mamba'"),
        ({"layers": 3}, "has neither 'd_model'"),
    ],
)
def test_other_models(tmp_path, fields, sentence):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(QuambaError, match=sentence):
        read_float(tmp_path)


def test_names_map_both_ways():
    pairs = {
        "backbone.layers.3.mixer.A_log": "backbone.layers.3.mixer.ssm.A_log",
        "backbone.layers.3.mixer.D": "backbone.layers.3.mixer.ssm.D",
        "backbone.layers.3.mixer.conv1d.bias": "backbone.layers.3.mixer.conv1d.bias",
        "lm_head.weight": "lm_head.weight",
    }
    first = {**pairs, "backbone.layers.3.mixer.dt_proj.bias": "backbone.layers.3.mixer.ssm.dt_bias"}
    second = {**pairs, "backbone.layers.3.mixer.dt_bias": "backbone.layers.3.mixer.ssm.dt_bias"}
    for family, names in (("mamba", first), ("mamba2", second)):
        for stored, canonical in names.items():
            assert canonical_name(stored, family) == canonical
            assert state_spaces_name(canonical, family) == stored
            assert canonical_name(f"model.{stored}", family) == canonical
    assert canonical_name("backbone.embeddings.weight", "mamba") == "backbone.embedding.weight"


CONFIGS = [
    tiny_config("mamba"),
    tiny_config("mamba", tie_embeddings=False, bias=True, conv_bias=False, rms_norm=False, d_conv=3),
    tiny_config("mamba2", dt_limit=(0.0, 0.5)),
    tiny_config(
        "mamba2", ngroups=4, D_has_hdim=True, tie_embeddings=False, bias=True, dt_limit=(0.1, math.inf)
    ),
    tiny_config("mamba2", norm_before_gate=True, residual_in_fp32=False, chunk_size=8, expand=3),
]


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
@pytest.mark.parametrize("config", CONFIGS)
def test_writing_and_reading_gives_the_same_model(tmp_path, config, shard_bytes):
    tensors = random_tensors(config)
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].half()
    write_state_spaces(tmp_path / "model", config, tensors, max_shard_bytes=shard_bytes)
    assert (tmp_path / "model" / "model.safetensors").exists() == (shard_bytes > 5000)
    read = read_float(str(tmp_path / "model"))
    assert read.config == config
    assert read.folder == tmp_path / "model"
    assert read.source == str(tmp_path / "model")
    assert list(read.tensors) == list(expected_shapes(config))
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor), name


def test_a_written_convolution_has_the_upstream_shape(tmp_path):
    config = tiny_config("mamba")
    write_state_spaces(tmp_path / "model", config, random_tensors(config))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["backbone.layers.0.mixer.conv1d.weight"].shape == (config.d_inner, 1, config.d_conv)
    assert stored["backbone.layers.1.mixer.dt_proj.bias"].shape == (config.d_inner,)


def test_what_has_no_state_spaces_form(tmp_path):
    with pytest.raises(QuambaError, match=r"Falcon Mamba has no state-spaces form"):
        config_to_state_spaces(tiny_config("mamba", bcdt_rms_eps=1e-6))
    with pytest.raises(QuambaError, match=r"norm_eps 1e-06 has no state-spaces form"):
        config_to_state_spaces(tiny_config("mamba2", norm_eps=1e-6))
    config = tiny_config("mamba")
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    with pytest.raises(QuambaError, match=r"do not fit the config, first 'lm_head.weight'"):
        write_state_spaces(tmp_path / "model", config, tensors)
    assert list(tmp_path.iterdir()) == []


TIED = {**SIZES, "ssm_cfg": {"d_state": 8}}


def test_a_tied_head_is_dropped(tmp_path):
    tensors = random_tensors(config_from_state_spaces(TIED))
    head = tensors["backbone.embedding.weight"]
    read = read_float(put(tmp_path / "m", TIED, {**tensors, "lm_head.weight": head.double()}))
    assert "lm_head.weight" not in read.tensors


@pytest.mark.parametrize("head", ["other", "shape"])
def test_a_tied_head_that_differs_is_refused(tmp_path, head):
    tensors = random_tensors(config_from_state_spaces(TIED))
    table = tensors["backbone.embedding.weight"].clone()
    table[63, 31] += 1e-6
    tensors["lm_head.weight"] = table if head == "other" else table[:61]
    with pytest.raises(QuambaError, match=r"'lm_head.weight' and 'backbone.embedding.weight' differ"):
        read_float(put(tmp_path / "m", TIED, tensors))


def test_an_untied_head_is_required(tmp_path):
    fields = {**TIED, "tie_embeddings": False}
    with pytest.raises(QuambaError, match=r"do not fit its config.json: missing lm_head.weight"):
        read_float(put(tmp_path / "m", fields, random_tensors(config_from_state_spaces(TIED))))


def test_every_tensor_is_accounted_for(tmp_path):
    tensors = random_tensors(config_from_state_spaces(TIED))
    tensors["backbone.norm_f.bias"] = torch.zeros(32)
    tensors["backbone.embedding.weight"] = torch.zeros(61, 32)
    for leaf in ("A_log", "D", "dt_bias"):
        for layer in range(2):
            del tensors[f"backbone.layers.{layer}.mixer.ssm.{leaf}"]
    with pytest.raises(QuambaError) as caught:
        read_float(put(tmp_path / "m", TIED, tensors))
    message = str(caught.value)
    missing = ", ".join(f"backbone.layers.0.mixer.ssm.{leaf}" for leaf in ("A_log", "D", "dt_bias"))
    assert f"missing {missing} and 3 more; unexpected backbone.norm_f.bias; " in message
    assert message.endswith("misshapen backbone.embedding.weight [61, 32] instead of [64, 32].")


def test_a_tensor_given_twice(tmp_path):
    tensors = random_tensors(config_from_state_spaces(TIED))
    tensors["backbone.embeddings.weight"] = tensors["backbone.embedding.weight"]
    with pytest.raises(QuambaError, match=r"which are the same tensor"):
        read_float(put(tmp_path / "m", TIED, tensors))


def test_integer_weights_are_no_float_model(tmp_path):
    tensors = random_tensors(config_from_state_spaces(TIED))
    tensors["backbone.norm_f.weight"] = torch.ones(32, dtype=torch.int8)
    with pytest.raises(
        QuambaError, match=r"'backbone.norm_f.weight' .* is torch.int8, expected a float model"
    ):
        read_float(put(tmp_path / "m", TIED, tensors))


def test_a_number_among_the_tensors(tmp_path):
    folder = put(tmp_path / "m", TIED, random_tensors(config_from_state_spaces(TIED)))
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**stored, "norm.output_scale": 0.5}, folder / "pytorch_model.bin")
    with pytest.raises(QuambaError, match=r"holds a float under 'norm.output_scale'"):
        read_float(folder)


def test_a_prefix_of_one_wrapper_is_accepted(tmp_path):
    tensors = random_tensors(config_from_state_spaces(TIED))
    folder = put(tmp_path / "m", TIED, tensors)
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({f"model.{name}": t for name, t in stored.items()}, folder / "pytorch_model.bin")
    read = read_float(folder)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["mamba-demo", "mamba2-demo"])
def test_the_demo_models_round_trip(tmp_path, name):
    if not (DEMO_MODELS / name / "config.json").is_file():
        pytest.skip(f"assets/models/{name} is not in this checkout")
    read = read_float(DEMO_MODELS / name)
    assert (read.config.d_model, read.config.n_layer, read.config.vocab_size) == (384, 6, 4096)
    write_state_spaces(tmp_path / "copy", read.config, read.tensors)
    copy = read_float(tmp_path / "copy")
    assert copy.config == read.config
    assert copy.tensors.keys() == read.tensors.keys()
    for key, tensor in read.tensors.items():
        assert copy.tensors[key].dtype == tensor.dtype
        assert torch.equal(copy.tensors[key], tensor)
