"""Read a float model, in either of the two published formats, into canonical tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quamba.checkpoints.huggingface import MODEL_TYPES, config_from_huggingface
from quamba.checkpoints.quantized import describe_quantized
from quamba.checkpoints.source import read_json, resolve
from quamba.checkpoints.tensors import TensorSource, open_tensors
from quamba.checkpoints.upstream import canonical_name, config_from_state_spaces, expected_shapes
from quamba.errors import QuambaError, one_of
from quamba.models.config import MambaConfig, ModelConfig

_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
#: Norms of B, C and dt in Falcon Mamba: they have no weight, though a file may carry one of ones.
_WEIGHTLESS = ("b_layernorm.weight", "c_layernorm.weight", "dt_layernorm.weight", "b_c_rms", "dt_rms")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FloatCheckpoint:
    """A float model as read.

    tensors  canonical names (``docs/architecture.md``) to CPU tensors in the dtype of the file:
             exactly those of ``expected_shapes(config)``, in its order
    folder   where the files are
    source   what was asked for: a path or a hub id
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    folder: Path
    source: str


def read_float(path_or_id: str | Path) -> FloatCheckpoint:
    """Read a float checkpoint in state-spaces or Hugging Face format from a folder or the hub.

    Raises QuambaError when the config has a key that is not understood, or when the tensors are not
    exactly those that the config asks for.
    """
    folder = resolve(path_or_id)
    config = read_float_config(folder)
    return FloatCheckpoint(config, _canonical_tensors(open_tensors(folder), config), folder, str(path_or_id))


def read_float_config(folder: str | Path) -> ModelConfig:
    """The model config in a checkpoint folder, whichever of the two formats it has."""
    folder = Path(folder)
    fields = read_json(folder / "config.json")
    quantized = describe_quantized(fields)
    if quantized is not None:
        raise QuambaError(f"'{folder}' is {quantized}, expected a float model.")
    if "hidden_size" in fields and fields.get("model_type") in MODEL_TYPES:
        return config_from_huggingface(fields)
    if "d_model" in fields:
        return config_from_state_spaces(fields)
    if "model_type" in fields:
        raise one_of(f"model_type in the config.json of '{folder}'", fields["model_type"], MODEL_TYPES)
    raise QuambaError(
        f"The config.json of '{folder}' has neither 'd_model' (state-spaces) nor 'model_type' (Hugging Face)."
    )


def _canonical_tensors(source: TensorSource, config: ModelConfig) -> dict[str, Tensor]:
    folder = source.files[0].parent
    stored = _stored_names(source, config)
    _drop_weightless(source, stored, config)
    _drop_tied_head(source, stored, config)
    expected = expected_shapes(config)
    shapes = {name: _canonical_shape(name, source.shape(old)) for name, old in stored.items()}
    faults = _listed("missing", (name for name in expected if name not in stored))
    faults += _listed("unexpected", (stored[name] for name in stored if name not in expected))
    faults += _listed(
        "misshapen",
        (
            f"{stored[name]} {list(shapes[name])} instead of {list(expected[name])}"
            for name in expected
            if name in shapes and shapes[name] != expected[name]
        ),
    )
    if faults:
        raise QuambaError(f"The tensors in '{folder}' do not fit its config.json: {'; '.join(faults)}.")
    for name in expected:
        dtype = source.dtype(stored[name])
        if dtype not in _FLOATS:
            raise QuambaError(f"Tensor '{stored[name]}' in '{folder}' is {dtype}, expected a float model.")
    return {name: source.get(stored[name]).reshape(shape) for name, shape in expected.items()}


def _stored_names(source: TensorSource, config: ModelConfig) -> dict[str, str]:
    """Canonical names to names in the file."""
    folder = source.files[0].parent
    for name, value in source.values.items():
        raise QuambaError(f"'{folder}' holds a {type(value).__name__} under '{name}', expected tensors only.")
    stored: dict[str, str] = {}
    for old in source:
        name = canonical_name(old, config.family)
        if name in stored:
            raise QuambaError(f"'{folder}' holds '{stored[name]}' and '{old}', which are the same tensor.")
        stored[name] = old
    return stored


def _drop_weightless(source: TensorSource, stored: dict[str, str], config: ModelConfig) -> None:
    if not isinstance(config, MambaConfig) or config.bcdt_rms_eps is None:
        return
    for name in [name for name in stored if name.endswith(tuple(f".mixer.{end}" for end in _WEIGHTLESS))]:
        if not bool((source.get(stored[name]) == 1).all()):
            raise QuambaError(
                f"'{stored[name]}' is not all ones, expected a norm of B, C or dt without weight."
            )
        del stored[name]


def _drop_tied_head(source: TensorSource, stored: dict[str, str], config: ModelConfig) -> None:
    if not config.tie_embeddings or _HEAD not in stored or _EMBEDDING not in stored:
        return
    head, embedding = source.get(stored[_HEAD]), source.get(stored[_EMBEDDING])
    wide = torch.promote_types(head.dtype, embedding.dtype)
    if not torch.equal(head.to(wide), embedding.to(wide)):
        raise QuambaError(
            f"config.json ties the head to the embedding, but '{stored[_HEAD]}' and "
            f"'{stored[_EMBEDDING]}' differ."
        )
    del stored[_HEAD]


def _canonical_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the middle dimension that PyTorch gives a depthwise convolution: [channels, 1, d_conv]."""
    if name.endswith(".conv1d.weight") and len(shape) == 3 and shape[1] == 1:
        return (shape[0], shape[2])
    return shape


def _listed(what: str, names: Iterable[str], shown: int = 3) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{what} {', '.join(names[:shown])}{more}"]
