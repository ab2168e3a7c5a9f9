"""The transformers format: models that transformers itself saves, and its config key by key."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quamba.checkpoints.float import read_float
from quamba.checkpoints.huggingface import config_from_huggingface
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, MambaConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 8}
MAMBA = {"model_type": "mamba", **SMALL}
FALCON = {"model_type": "falcon_mamba", **SMALL}
MAMBA2 = {"model_type": "mamba2", **SMALL, "num_heads": 8, "head_dim": 8, "n_groups": 2}

CASES = [
    ("Mamba", {}),
    ("Mamba", {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 5}),
    ("FalconMamba", {"mixer_rms_eps": 1e-4}),
    ("FalconMamba", {"tie_word_embeddings": False, "conv_kernel": 3}),
    ("Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    (
        "Mamba2",
        {"num_heads": 16, "head_dim": 4, "n_groups": 8, "tie_word_embeddings": True, "use_bias": True},
    ),
]


def hf_model(kind: str, changes: dict):
    transformers = pytest.importorskip("transformers", reason="these tests need the package 'transformers'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as constants: make them tell apart
            parameter.normal_()
    return model


def our_name(name: str, kind: str) -> str:
    name = name.replace("backbone.embeddings.", "backbone.embedding.")
    if kind != "Mamba2":
        name = name.replace("mixer.dt_proj.bias", "mixer.ssm.dt_bias")
    for leaf in ("A_log", "D", "dt_bias"):
        if name.endswith(f"mixer.{leaf}"):
            name = name.replace(f"mixer.{leaf}", f"mixer.ssm.{leaf}")
    return name


@pytest.mark.parametrize("shard", [None, "4KB"])
@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_every_tensor_of_a_saved_model(tmp_path, kind, changes, shard):
    model = hf_model(kind, changes)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
    read = read_float(tmp_path)
    expected = {our_name(name, kind): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        assert torch.equal(expected.pop("lm_head.weight"), expected["backbone.embedding.weight"])
    assert read.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("conv1d.weight"):
            tensor = tensor.squeeze(1)
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor), name


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_config_of_a_saved_model(tmp_path, kind, changes):
    model = hf_model(kind, changes)
    model.save_pretrained(tmp_path)
    ours, theirs = read_float(tmp_path).config, model.config
    pairs = {
        "d_model": "hidden_size",
        "d_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "tie_embeddings": "tie_word_embeddings",
        "norm_eps": "layer_norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
    }
    own = {
        "Mamba": {"dt_rank": "time_step_rank"},
        "FalconMamba": {"dt_rank": "time_step_rank", "bcdt_rms_eps": "mixer_rms_eps"},
        "Mamba2": {
            "nheads": "num_heads",
            "headdim": "head_dim",
            "ngroups": "n_groups",
            "chunk_size": "chunk_size",
        },
    }
    for mine, name in {**pairs, **own[kind]}.items():
        if name == "intermediate_size" and kind == "Mamba2":
            continue
        assert getattr(ours, mine) == getattr(theirs, name), name
    if kind == "Mamba":
        assert ours.bcdt_rms_eps is None


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Mamba2"])
def test_every_key_that_transformers_writes_is_known(kind):
    transformers = pytest.importorskip("transformers", reason="this test needs the package 'transformers'")
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, **({"num_heads": 8, "head_dim": 8} if kind == "Mamba2" else {})
    )
    config_from_huggingface(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("base", [MAMBA, FALCON, MAMBA2])
def test_absent_keys_mean_the_defaults_of_transformers(base):
    transformers = pytest.importorskip("transformers", reason="this test needs the package 'transformers'")
    kind = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}[base["model_type"]]
    sizes = {"hidden_size": 4096, "num_hidden_layers": 1, "vocab_size": 8}
    full = getattr(transformers, f"{kind}Config")(**sizes).to_dict()
    assert config_from_huggingface({"model_type": base["model_type"], **sizes}) == config_from_huggingface(
        full
    )


def test_the_width_is_intermediate_size_where_both_are_given():
    config = config_from_huggingface({**FALCON, "expand": 16, "intermediate_size": 64})
    assert (config.expand, config.d_inner) == (2, 64)


@pytest.mark.parametrize("high", [math.inf, None, {"__float__": "Infinity"}])
def test_an_open_time_step_limit(high):
    assert config_from_huggingface({**MAMBA2, "time_step_limit": [0.0, high]}).dt_limit == (0.0, math.inf)


def test_a_closed_time_step_limit():
    assert config_from_huggingface({**MAMBA2, "time_step_limit": [0.01, 0.5]}).dt_limit == (0.01, 0.5)


def test_configs_of_older_versions():
    kept = {
        "d_model": 32,
        "n_layer": 2,
        "d_inner": 64,
        "ssm_cfg": {},
        "fused_add_norm": True,
        "rms_norm": True,
    }
    older = {
        "torch_dtype": "float32",
        "pad_vocab_size_multiple": 8,
        "intermediate_size": 64,
        "_name_or_path": "x",
    }
    assert config_from_huggingface({**MAMBA, **kept, **older}) == config_from_huggingface(MAMBA)
    mamba2 = {"norm_before_gate": True, "rms_norm": True, "intermediate_size": 64, "time_step_rank": 256}
    generic = {
        "time_step_init_scheme": "random",
        "time_step_scale": 1.0,
        "architectures": ["Mamba2ForCausalLM"],
    }
    assert config_from_huggingface({**MAMBA2, **mamba2, **generic}) == config_from_huggingface(MAMBA2)
    assert config_from_huggingface(MAMBA2).norm_before_gate is False


def test_the_families():
    assert isinstance(config_from_huggingface(MAMBA), MambaConfig)
    assert config_from_huggingface(FALCON).bcdt_rms_eps == 1e-6
    assert isinstance(config_from_huggingface(MAMBA2), Mamba2Config)
    assert config_from_huggingface(MAMBA).padded_vocab_size == 61


REFUSED = [
    (MAMBA, {"hidden_act": "gelu"}, "'hidden_act' in config.json is 'gelu', expected one of 'silu', 'swish'"),
    (MAMBA, {"state_sise": 8}, r"Unknown key 'state_sise' in config.json. Did you mean 'state_size'\?"),
    (MAMBA, {"mixer_rms_eps": 1e-6}, "Unknown key 'mixer_rms_eps'"),
    (MAMBA, {"n_groups": 2}, "Unknown key 'n_groups'"),
    (MAMBA2, {"attn_layer_idx": [1]}, "Unknown key 'attn_layer_idx'"),
    (MAMBA, {"intermediate_size": 65}, "intermediate_size 65 is no multiple of hidden_size 32"),
    (MAMBA, {"time_step_rank": "all"}, "'time_step_rank' in config.json is 'all'"),
    (
        MAMBA,
        {"layer_norm_epsilon": 0},
        "'layer_norm_epsilon' in config.json is 0, expected a positive number",
    ),
    (MAMBA, {"rms_norm": False}, "rms_norm false"),
    (MAMBA, {"d_model": 64}, "d_model 64 but hidden_size 32"),
    (MAMBA, {"layer_types": ["linear_attention", "full_attention"]}, "layers of type 'full_attention'"),
    (MAMBA, {"per_layer_config": {"0": {"expand": 4}}}, "has per_layer_config"),
    (MAMBA2, {"num_heads": 4}, "num_heads 4 x head_dim 8 is 32, expected expand 2 x hidden_size 32 = 64"),
    (MAMBA2, {"n_groups": 3}, "ngroups 3 does not divide the number of heads 8"),
    (MAMBA2, {"time_step_limit": [0.0]}, "'time_step_limit' in config.json is .*, expected two numbers"),
]


@pytest.mark.parametrize(("base", "changes", "sentence"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(base, changes, sentence):
    with pytest.raises(QuambaError, match=sentence):
        config_from_huggingface({**base, **changes})


@pytest.mark.parametrize("leaf", ["b_layernorm.weight", "dt_rms"])
@pytest.mark.parametrize("ones", [True, False])
def test_weightless_norms_of_falcon_mamba(tmp_path, leaf, ones):
    model = hf_model("FalconMamba", {})
    extra = torch.ones(8)
    extra[-1] = 1.0 if ones else 1.5
    state = {**model.state_dict(), f"backbone.layers.1.mixer.{leaf}": extra}
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    if ones:
        assert not any(leaf in name for name in read_float(tmp_path).tensors)
    else:
        with pytest.raises(QuambaError, match=f"'backbone.layers.1.mixer.{leaf}' is not all ones"):
            read_float(tmp_path)


def test_weightless_norms_are_unexpected_elsewhere(tmp_path):
    model = hf_model("Mamba", {})
    model.config.save_pretrained(tmp_path)
    state = {**model.state_dict(), "backbone.layers.1.mixer.b_layernorm.weight": torch.ones(8)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(QuambaError, match=r"unexpected backbone.layers.1.mixer.b_layernorm.weight"):
        read_float(tmp_path)
