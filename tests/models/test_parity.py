"""Our float models against the public implementations, on tiny random weights in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from quamba.models.config import ModelConfig

transformers = pytest.importorskip("transformers", reason="parity tests need the package 'transformers'")


def _hf_twin(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The transformers model of the same sizes holding the same weights, float64."""
    common = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if config.family == "mamba2":
        model = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **common,
                num_heads=config.nheads,
                head_dim=config.headdim,
                n_groups=config.ngroups,
                chunk_size=config.chunk_size,
                time_step_limit=config.dt_limit,
            )
        )
    elif config.bcdt_rms_eps is not None:
        model = transformers.FalconMambaForCausalLM(
            transformers.FalconMambaConfig(
                **common,
                time_step_rank=config.dt_rank,
                mixer_rms_eps=config.bcdt_rms_eps,
                intermediate_size=config.d_inner,
            )
        )
    else:
        model = transformers.MambaForCausalLM(
            transformers.MambaConfig(
                **common, time_step_rank=config.dt_rank, intermediate_size=config.d_inner
            )
        )
    state = {}
    for name, value in tensors.items():
        name = name.replace("backbone.embedding.", "backbone.embeddings.")
        if config.family == "mamba":
            name = name.replace("mixer.ssm.dt_bias", "mixer.dt_proj.bias")
        name = name.replace("mixer.ssm.", "mixer.")
        state[name] = value.unsqueeze(1) if name.endswith("conv1d.weight") else value
    missing, unexpected = model.double().load_state_dict(state, strict=False)
    assert not unexpected
    assert all("layernorm" in m or m == "lm_head.weight" for m in missing)
    if config.tie_embeddings:
        model.tie_weights()
    return model.double().eval()


CONFIGS = {
    "mamba": tiny_config("mamba"),
    "mamba-bias-untied": tiny_config("mamba", bias=True, conv_bias=False, tie_embeddings=False),
    "falcon-mamba": tiny_config("mamba", bcdt_rms_eps=1e-6),
    "mamba2": tiny_config("mamba2"),
    "mamba2-groups2": tiny_config("mamba2", ngroups=2, bias=True),
    "mamba2-groups8": tiny_config("mamba2", ngroups=8, tie_embeddings=False, chunk_size=64),
    "mamba2-dt-limit": tiny_config("mamba2", dt_limit=(0.05, 0.3)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 3, 63, 65])
def test_logits_equal_transformers(name: str, length: int) -> None:
    config = CONFIGS[name]
    ours = tiny_model(config, dtype=torch.float64)
    theirs = _hf_twin(config, ours.named_tensors())
    ids = torch.randint(0, config.vocab_size, (3, length))
    with torch.no_grad():
        expected = theirs(ids).logits
        actual = ours(ids)
    # transformers computes norms, A and the scan in float32 whatever the model's dtype.
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2-groups2"])
def test_left_padding_equals_transformers(name: str) -> None:
    config = CONFIGS[name]
    if config.bias:  # transformers lets the projection's bias through its padding
        config = tiny_config("mamba2", ngroups=2)
    ours = tiny_model(config, dtype=torch.float64)
    theirs = _hf_twin(config, ours.named_tensors())
    ids = torch.randint(0, config.vocab_size, (2, 21))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, :8] = False
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).logits
        actual = ours(ids, mask=mask)
    torch.testing.assert_close(actual[mask], expected[mask].to(actual.dtype), rtol=3e-5, atol=3e-5)
