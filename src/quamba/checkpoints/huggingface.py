"""The config.json of Hugging Face transformers: model types mamba, falcon_mamba and mamba2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quamba.checkpoints.fields import ConfigFields
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig

MODEL_TYPES = ("mamba", "falcon_mamba", "mamba2")

#: Keys of the three config classes that only choose an initialisation or a code path. In ``mamba2``,
#: transformers reads neither norm_before_gate (it always gates first) nor time_step_rank.
_NO_EFFECT = (
    "initializer_range",
    "rescale_prenorm_residual",
    "time_step_scale",
    "time_step_min",
    "time_step_max",
    "time_step_init_scheme",
    "time_step_floor",
    "use_cache",
    "use_mambapy",
    "use_falcon_mambapy",
    "use_associative_scan",
    "gradient_checkpointing",
)
_NO_EFFECT_MAMBA2 = ("norm_before_gate", "time_step_rank", "intermediate_size")

#: Keys of every transformers config, over its versions: labels, output switches, task heads, defaults
#: of generation. Keys with a leading underscore are transformers' own too.
_GENERIC = frozenset(
    {
        "model_type",
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "name_or_path",
        "unsloth_version",
        "tokenizer_class",
        "prefix",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "id2label",
        "label2id",
        "num_labels",
        "output_hidden_states",
        "output_attentions",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "remove_invalid_values",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    }
)

#: The first conversions kept the state-spaces keys beside the new ones. transformers reads only the
#: new ones, so the old ones must agree.
_OLD_NAMES = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_inner": "intermediate_size"}
_OLD_NO_EFFECT = ("ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple")


def config_from_huggingface(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a transformers ``config.json``; absent keys mean the defaults of the config class.

    The embedding has exactly ``vocab_size`` rows, so the padding multiple is 1.
    Every key is honoured, known to have no effect, or refused by name.
    """
    read = ConfigFields(fields, "config.json")
    model_type = read.choice("model_type", MODEL_TYPES)
    read.ignore(_GENERIC | set(_NO_EFFECT) | set(_OLD_NO_EFFECT))
    read.ignore(key for key in fields if key.startswith("_"))
    _check_common(read)
    common: dict[str, Any] = {
        "d_model": read.integer("hidden_size"),
        "n_layer": read.integer("num_hidden_layers"),
        "vocab_size": read.integer("vocab_size"),
        "d_conv": read.integer("conv_kernel", 4),
        "bias": read.boolean("use_bias", False),
        "conv_bias": read.boolean("use_conv_bias", True),
        "residual_in_fp32": read.boolean("residual_in_fp32", True),
        "tie_embeddings": read.boolean("tie_word_embeddings", model_type != "mamba2"),
        "norm_eps": read.positive("layer_norm_epsilon", 1e-5),
        "pad_vocab_size_multiple": 1,
    }
    config = _mamba2(read, common) if model_type == "mamba2" else _mamba1(read, common, model_type)
    read.refuse_rest()
    return config


def _check_common(read: ConfigFields) -> None:
    read.choice("hidden_act", ("silu", "swish"), "silu")
    if not read.boolean("rms_norm", True):
        raise QuambaError(
            "config.json has rms_norm false (LayerNorm), expected true: only RMSNorm is supported."
        )
    if read.value("per_layer_config", None):
        raise QuambaError("config.json has per_layer_config, expected layers that are all alike.")
    others = set(read.value("layer_types", None) or ()) - {"linear_attention", "mamba", "mamba2"}
    if others:
        raise QuambaError(
            f"config.json has layers of type {min(others)!r}, expected a model of Mamba layers only."
        )
    for old, new in _OLD_NAMES.items():
        stale, current = read.value(old, None), read.fields.get(new)
        if stale is not None and current is not None and stale != current:
            raise QuambaError(
                f"config.json has {old} {stale!r} but {new} {current!r}, expected the same number."
            )


def _mamba1(read: ConfigFields, common: dict[str, Any], model_type: str) -> MambaConfig:
    d_model = common["d_model"]
    expand = read.integer("expand", 2)
    # Where both are given, transformers takes intermediate_size (falcon-mamba-7b: expand 16, width 2 x 4096).
    inner = read.integer("intermediate_size", expand * d_model)
    if d_model <= 0 or inner % d_model:
        raise QuambaError(f"intermediate_size {inner} is no multiple of hidden_size {d_model}.")
    return MambaConfig(
        expand=inner // d_model,
        d_state=read.integer("state_size", 16),
        dt_rank=read.rank("time_step_rank"),
        bcdt_rms_eps=read.positive("mixer_rms_eps", 1e-6) if model_type == "falcon_mamba" else None,
        **common,
    )


def _mamba2(read: ConfigFields, common: dict[str, Any]) -> Mamba2Config:
    read.ignore(_NO_EFFECT_MAMBA2)
    heads, headdim = read.integer("num_heads", 128), read.integer("head_dim", 64)
    expand = read.integer("expand", 2)
    if heads * headdim != expand * common["d_model"]:
        raise QuambaError(
            f"num_heads {heads} x head_dim {headdim} is {heads * headdim}, "
            f"expected expand {expand} x hidden_size {common['d_model']} = {expand * common['d_model']}."
        )
    return Mamba2Config(
        expand=expand,
        d_state=read.integer("state_size", 128),
        headdim=headdim,
        ngroups=read.integer("n_groups", 8),
        chunk_size=read.integer("chunk_size", 256),
        dt_limit=read.limits("time_step_limit"),
        **common,
    )
