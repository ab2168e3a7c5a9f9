"""The checkpoint format of the state-spaces code base: its config.json and tensor names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quamba.checkpoints.fields import ConfigFields
from quamba.checkpoints.tensors import MAX_SHARD_BYTES, write_tensors, written_beside
from quamba.errors import QuambaError
from quamba.models.config import Family, Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM

#: Keys of ssm_cfg that only choose a random initialisation or a code path.
_NO_EFFECT = (
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "A_init_range",
    "conv_init",
    "use_fast_path",
    "use_mem_eff_path",
)
#: Labels that some uploads add at the top level.
_LABELS = (
    "model_type",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_NORM_EPS = 1e-5  # fixed in the state-spaces code: its config has no key for it


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names (``docs/architecture.md``) of a float model's tensors to their shapes, in its order."""
    return {name: tuple(tensor.shape) for name, tensor in MambaLM.empty(config).named_tensors().items()}


def config_from_state_spaces(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a state-spaces ``config.json``; absent keys mean the defaults of that code base.

    Every key is honoured, known to have no effect, or refused by name.
    """
    top = ConfigFields(fields, "config.json")
    ssm_fields = top.value("ssm_cfg", {})
    if not isinstance(ssm_fields, dict):
        raise QuambaError(f"'ssm_cfg' in config.json is {ssm_fields!r}, expected an object.")
    ssm = ConfigFields(ssm_fields, "ssm_cfg of config.json")
    top.ignore(("fused_add_norm", "attn_cfg", *_LABELS))
    ssm.ignore(_NO_EFFECT)
    _refuse_other_layers(top)
    layer = ssm.choice("layer", ("Mamba1", "Mamba2"), "Mamba1")
    common: dict[str, Any] = {
        "d_model": top.integer("d_model"),
        "n_layer": top.integer("n_layer"),
        "vocab_size": top.integer("vocab_size"),
        "rms_norm": top.boolean("rms_norm", True),
        "residual_in_fp32": top.boolean("residual_in_fp32", True),
        "tie_embeddings": top.boolean("tie_embeddings", True),
        "pad_vocab_size_multiple": top.integer("pad_vocab_size_multiple", 8),
        "d_conv": ssm.integer("d_conv", 4),
        "expand": ssm.integer("expand", 2),
        "bias": ssm.boolean("bias", False),
        "conv_bias": ssm.boolean("conv_bias", True),
        "norm_eps": _NORM_EPS,
    }
    config = _mamba2(ssm, common) if layer == "Mamba2" else _mamba1(ssm, common)
    top.refuse_rest()
    ssm.refuse_rest()
    return config


def config_to_state_spaces(config: ModelConfig) -> dict[str, Any]:
    """Inverse of ``config_from_state_spaces``; a config that has no such form is an error."""
    if isinstance(config, MambaConfig) and config.bcdt_rms_eps is not None:
        raise QuambaError("A Falcon Mamba has no state-spaces form: that format has no norms of B, C and dt.")
    if config.norm_eps != _NORM_EPS:
        raise QuambaError(
            f"norm_eps {config.norm_eps} has no state-spaces form: that format fixes {_NORM_EPS}."
        )
    names = ["d_state", "d_conv", "expand", "bias", "conv_bias"]
    if isinstance(config, Mamba2Config):
        names += ["headdim", "ngroups", "chunk_size", "D_has_hdim", "norm_before_gate"]
        extra: dict[str, Any] = {"layer": "Mamba2", "dt_limit": list(config.dt_limit)}
    else:
        extra = {"layer": "Mamba1", "dt_rank": config.dt_rank}
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {**extra, **{name: getattr(config, name) for name in names}},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.rms_norm,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def canonical_name(name: str, family: Family) -> str:
    """The name in ``docs/architecture.md`` of a tensor of a state-spaces or Hugging Face checkpoint."""
    name = re.sub(r"^model\.(?=backbone\.|lm_head\.)", "", name)
    name = re.sub(r"^backbone\.embeddings\.", "backbone.embedding.", name)
    if family == "mamba":
        name = re.sub(r"\.mixer\.dt_proj\.bias$", ".mixer.ssm.dt_bias", name)
        return re.sub(r"\.mixer\.(A_log|D)$", r".mixer.ssm.\1", name)
    return re.sub(r"\.mixer\.(A_log|D|dt_bias)$", r".mixer.ssm.\1", name)


def state_spaces_name(name: str, family: Family) -> str:
    """Inverse of ``canonical_name`` for the state-spaces format."""
    if family == "mamba":
        name = name.replace(".mixer.ssm.dt_bias", ".mixer.dt_proj.bias")
    return name.replace(".mixer.ssm.", ".mixer.")


def write_state_spaces(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_files: Iterable[Path] = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a float model as ``config.json`` and ``model.safetensors`` in the state-spaces layout.

    tensors          canonical names to tensors, exactly those of ``expected_shapes(config)``; dtypes are kept
    tokenizer_files  copied into the folder
    folder           appears complete or not at all; one that is there and not empty needs ``overwrite``
    """
    fields = config_to_state_spaces(config)
    shapes = expected_shapes(config)
    wrong = [name for name in shapes.keys() | tensors.keys() if not _fits(tensors, shapes, name)]
    if wrong:
        raise QuambaError(f"The tensors do not fit the config, first '{min(wrong)}'.")
    stored = {}
    for name in shapes:
        tensor = tensors[name]
        stored[state_spaces_name(name, config.family)] = (
            tensor.unsqueeze(1) if name.endswith(".conv1d.weight") else tensor
        )
    with written_beside(folder, overwrite=overwrite) as new:
        for file in tokenizer_files:
            shutil.copyfile(file, new / file.name)
        (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        write_tensors(new, stored, max_shard_bytes=max_shard_bytes)


def _fits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    return name in tensors and name in shapes and tuple(tensors[name].shape) == shapes[name]


def _refuse_other_layers(top: ConfigFields) -> None:
    if top.value("attn_layer_idx", []):
        raise QuambaError(
            "config.json has attention layers (attn_layer_idx), expected a model of Mamba layers only."
        )
    if top.value("d_intermediate", 0):
        raise QuambaError(
            "config.json has MLP blocks (d_intermediate > 0), expected a model of Mamba layers only."
        )


def _mamba1(ssm: ConfigFields, common: dict[str, Any]) -> MambaConfig:
    return MambaConfig(d_state=ssm.integer("d_state", 16), dt_rank=ssm.rank("dt_rank"), **common)


def _mamba2(ssm: ConfigFields, common: dict[str, Any]) -> Mamba2Config:
    config = Mamba2Config(
        d_state=ssm.integer("d_state", 128),
        headdim=ssm.integer("headdim", 64),
        ngroups=ssm.integer("ngroups", 1),
        chunk_size=ssm.integer("chunk_size", 256),
        D_has_hdim=ssm.boolean("D_has_hdim", False),
        norm_before_gate=ssm.boolean("norm_before_gate", False),
        dt_limit=ssm.limits("dt_limit"),
        **common,
    )
    ssm.choice("activation", ("silu", "swish"), "silu")
    if not ssm.boolean("rmsnorm", True):
        raise QuambaError(
            "ssm_cfg has rmsnorm false, expected true: a Mamba2 without the gated norm is not supported."
        )
    if ssm.boolean("learnable_init_states", False):
        raise QuambaError("ssm_cfg has learnable_init_states true, expected false: the state starts at zero.")
    d_ssm = ssm.value("d_ssm", None)
    if d_ssm not in (None, config.d_inner):
        raise QuambaError(
            f"ssm_cfg has d_ssm {d_ssm!r}, expected null or d_inner {config.d_inner}: "
            "a partial MLP in the mixer is not supported."
        )
    return config
