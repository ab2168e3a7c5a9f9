"""The config of a Megatron checkpoint, from its own arguments where it has them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from quamba.checkpoints.megatron.layout import local_shape, split_of
from quamba.checkpoints.megatron.ranks import Ranks
from quamba.checkpoints.upstream import expected_shapes, state_spaces_name
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config

#: Of nvidia/mamba2-8b-3t-4k, whose training code fixed what later became arguments. Width, layers and
#: vocabulary can be read off the tensors.
PUBLISHED_8B = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8}
_EXPAND, _CHUNK, _DIVISIBLE_BY = 2, 128, 128
#: The embedding is padded for this many ranks, whatever number saved the checkpoint later.
_MOST_RANKS = 8
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


def model_config(ranks: Ranks, ids: int) -> Mamba2Config:
    """The sizes of the model, all of them checked against the tensors.

    ids     how many the tokenizer has: the embedding has this many rows and padding
    raises  QuambaError for layers other than Mamba2's (hybrid models), for arguments that ask for a model
            that cannot be built here, and for tensors of other shapes
    """
    arguments, where = ranks.arguments, str(ranks.files[0])
    _refuse_other_layers(ranks, where)
    _refuse_arguments(arguments, where)
    embedding = ranks.shapes.get(_EMBEDDING)
    if embedding is None or len(embedding) != 2:
        raise QuambaError(
            f"'{where}' has no embedding.word_embeddings.weight, expected that of a whole model."
        )
    d_model = _size(arguments, "hidden_size", embedding[1], where)
    headdim = _size(arguments, "mamba_head_dim", PUBLISHED_8B["mamba_head_dim"], where)
    heads = _size(arguments, "mamba_num_heads", max(1, _EXPAND * d_model // headdim), where)
    if heads * headdim % d_model:
        raise QuambaError(
            f"'{where}' has {heads} heads of {headdim} channels, {heads * headdim} in all, expected a "
            f"multiple of its width {d_model}."
        )
    rows = _size(arguments, "padded_vocab_size", embedding[0] * len(ranks), where)
    untied = arguments.get("untie_embeddings_and_output_weights")
    config = Mamba2Config(
        d_model=d_model,
        n_layer=_size(arguments, "num_layers", _layers(ranks), where),
        vocab_size=rows,
        pad_vocab_size_multiple=1,
        d_state=_size(arguments, "mamba_state_dim", PUBLISHED_8B["mamba_state_dim"], where),
        headdim=headdim,
        ngroups=_size(arguments, "mamba_num_groups", PUBLISHED_8B["mamba_num_groups"], where),
        expand=heads * headdim // d_model,
        chunk_size=_CHUNK,
        d_conv=next((s[-1] for n, s in ranks.shapes.items() if n.endswith(".conv1d.weight")), 4),
        tie_embeddings=_HEAD not in ranks.shapes if untied is None else not untied,
        norm_eps=_epsilon(arguments, where),
    )
    _check_shapes(ranks, config, where)
    multiple = _padding(arguments, rows, ids, len(ranks))
    return dataclasses.replace(config, vocab_size=ids, pad_vocab_size_multiple=multiple)


def stored_shapes(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    """Names in the state-spaces format to the shapes there: a convolution is [channels, 1, d_conv]."""
    return {
        state_spaces_name(name, config.family): (
            (shape[0], 1, shape[1]) if name.endswith(".conv1d.weight") else shape
        )
        for name, shape in expected_shapes(config).items()
    }


def _refuse_other_layers(ranks: Ranks, where: str) -> None:
    for name in ranks.shapes:
        layer = _LAYER.fullmatch(name)
        if layer and layer[2].split(".")[0] not in ("mixer", "norm"):
            raise QuambaError(
                f"Layer {layer[1]} of '{where}' has '{layer[2]}', expected Mamba2 layers only: hybrid models "
                "such as mamba2-hybrid-8b, with attention or MLP layers, are not supported."
            )
        if layer and layer[2].startswith(("mixer.x_proj.", "mixer.dt_proj.")):
            raise QuambaError(
                f"Layer {layer[1]} of '{where}' is a Mamba1 layer, expected Mamba2 layers only."
            )


def _refuse_arguments(arguments: Mapping[str, Any], where: str) -> None:
    norm = arguments.get("normalization") or "RMSNorm"
    if norm != "RMSNorm":
        raise QuambaError(f"'{where}' was trained with normalization {norm!r}, expected 'RMSNorm'.")
    for name in ("apply_layernorm_1p", "layernorm_zero_centered_gamma"):
        if arguments.get(name):
            raise QuambaError(f"'{where}' was trained with {name}, expected plain weights of the norms.")


def _size(arguments: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """An argument, or the default where the checkpoint does not have it."""
    value = arguments.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise QuambaError(f"The argument {name} of '{where}' is {value!r}, expected a positive integer.")
    return value


def _epsilon(arguments: Mapping[str, Any], where: str) -> float:
    value = arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5
    if value != 1e-5:
        raise QuambaError(f"'{where}' was trained with norm_epsilon {value!r}, expected 1e-05.")
    return 1e-5


def _layers(ranks: Ranks) -> int:
    return 1 + max((int(m[1]) for name in ranks.shapes if (m := _LAYER.fullmatch(name))), default=0)


def _padding(arguments: Mapping[str, Any], rows: int, ids: int, ranks: int) -> int:
    """The multiple that makes ``rows`` of ``ids``: Megatron's own rule first, then those of other ranks."""
    divisor = arguments.get("make_vocab_size_divisible_by")
    divisor = divisor if isinstance(divisor, int) and divisor > 0 else _DIVISIBLE_BY
    multiples = [divisor * n for n in (ranks, *range(1, _MOST_RANKS + 1))]
    for multiple in multiples:
        if -(-ids // multiple) * multiple == rows:
            return multiple
    raise QuambaError(
        f"The tokenizer has {ids} ids, which no padding by {divisor} to {max(multiples)} makes the {rows} "
        "rows of the checkpoint's embedding, expected the tokenizer of this model."
    )


def _check_shapes(ranks: Ranks, config: Mamba2Config, where: str) -> None:
    expected = stored_shapes(config)
    missing = [name for name in expected if name not in ranks.shapes]
    unknown = [ranks.names[name] for name in ranks.shapes if name not in expected]
    if missing or unknown:
        faults = [
            f"{what} {_first(names)}" for what, names in (("lack", missing), ("have also", unknown)) if names
        ]
        raise QuambaError(
            f"The tensors of '{where}' {' and '.join(faults)}, expected those of {config.n_layer} layers."
        )
    for name, shape in expected.items():
        split = split_of(name, config)
        if split is not None and any(part % len(ranks) for part in split.parts):
            raise QuambaError(
                f"'{ranks.names[name]}' cannot be shared by the {len(ranks)} ranks of '{where}'."
            )
        local = local_shape(shape, split, len(ranks))
        if ranks.shapes[name] != local:
            told = [key for key in PUBLISHED_8B if ranks.arguments.get(key) is not None]
            sizes = (
                "its arguments" if len(told) == len(PUBLISHED_8B) else "its arguments and those of mamba2-8b"
            )
            raise QuambaError(
                f"'{ranks.names[name]}' in '{where}' is {list(ranks.shapes[name])}, expected {list(local)} "
                f"by {sizes}: width {config.d_model}, {config.nheads} heads of {config.headdim}, "
                f"{config.ngroups} groups of {config.d_state} states, ranks {len(ranks)}."
            )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
