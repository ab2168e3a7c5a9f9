"""``config.json`` of the published checkpoints: the model's sizes, and a class name for every part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quamba.checkpoints.upstream import config_from_state_spaces, config_to_state_spaces
from quamba.errors import QuambaError, one_of
from quamba.models.config import Family, ModelConfig

#: Keys that only these files have.
ZOO_KEYS = ("norm_cfg", "embedding_cfg", "lm_head_cfg")

LABELS = ("W8A8", "W4A8", "W4A16")
HYBRID_LABELS = ("W4A8", "W4A16")
EMBEDDINGS = {"W8O16Embedding": "int8", "W4O16Embedding": "int4", "Embedding": "float"}
HEADS = {
    "W8A8B16O16Linear": "W8A8",
    "W4A8B16O16Linear": "W4A8",
    "W4A16B16O16Linear": "W4A16",
    "Linear": "FP16",
}
NORMS = ("QRMSNorm", "RMSNorm")
_FAMILY_SUFFIX: dict[Family, str] = {"mamba": "QMamba", "mamba2": "QMamba2"}
_MIXERS = {label + suffix: (label, family) for family, suffix in _FAMILY_SUFFIX.items() for label in LABELS}


@dataclass(frozen=True, kw_only=True)
class ZooConfig:
    """What a published ``config.json`` says.

    layers     precision of each block: "W8A8", "W4A8" or "W4A16"
    hybrid     whether blocks are stored under the name of their precision
    embedding  "int8", "int4" or "float"
    head       "W8A8", "W4A8", "W4A16", or "FP16" for a float head
    """

    model: ModelConfig
    layers: tuple[str, ...]
    hybrid: bool
    embedding: str
    head: str

    def layer_prefixes(self, i: int) -> tuple[str, str]:
        """Where the names of a block's norm and mixer begin."""
        block = f"backbone.layers.{i}."
        if not self.hybrid:
            return f"{block}norm.", f"{block}mixer."
        return f"{block}norms.{self.layers[i]}.", f"{block}mixers.{self.layers[i]}."


def is_zoo_config(fields: Mapping[str, Any]) -> bool:
    return any(fields.get(key) is not None for key in ZOO_KEYS)


def parse_zoo_config(fields: Mapping[str, Any]) -> ZooConfig:
    """Read the fields of a ``config.json``; every key is understood or refused by name."""
    fields = dict(fields)
    classes = {key: _object(fields.pop(key, None), key) for key in ZOO_KEYS}
    ssm = _object(fields.get("ssm_cfg"), "ssm_cfg")
    stored_hybrid = fields.pop("is_hybrid", False)
    layer = ssm.get("layer")
    hybrid = isinstance(layer, list)
    if stored_hybrid is not hybrid:
        raise QuambaError(
            f"config.json has is_hybrid {stored_hybrid!r} and a 'layer' in ssm_cfg that is"
            f" {'a list' if hybrid else 'one name'}, expected both to say whether blocks differ."
        )
    first, family = _mixer(_single(layer[0], "block 0 of config.json")[1] if hybrid and layer else layer)
    fields["ssm_cfg"] = {**ssm, "layer": "Mamba1" if family == "mamba" else "Mamba2"}
    model = config_from_state_spaces(fields)
    if model.tie_embeddings:
        raise QuambaError("config.json ties the embedding to the head, expected tie_embeddings false.")
    if isinstance(layer, list):
        return _hybrid(model, layer, classes)
    _check_norm(_named(classes, "norm_cfg", "norm"), first)
    return ZooConfig(
        model=model,
        layers=(first,) * model.n_layer,
        hybrid=False,
        embedding=_of(EMBEDDINGS, _named(classes, "embedding_cfg", "layer"), "embedding_cfg"),
        head=_of(HEADS, _named(classes, "lm_head_cfg", "layer"), "lm_head_cfg"),
    )


def zoo_config_fields(config: ZooConfig) -> dict[str, Any]:
    """The published ``config.json`` of a model; inverse of ``parse_zoo_config``."""
    fields = config_to_state_spaces(config.model)
    suffix = _FAMILY_SUFFIX[config.model.family]
    mixers: Any = [{label: label + suffix} for label in config.layers]
    norms: Any = [{label: norm_class(label)} for label in config.layers]
    if not config.hybrid:
        mixers, norms = config.layers[0] + suffix, norm_class(config.layers[0])
    embeddings = {value: key for key, value in EMBEDDINGS.items()}
    heads = {value: key for key, value in HEADS.items()}
    fields["ssm_cfg"] = {**_needed(config.model, fields["ssm_cfg"]), "layer": mixers}
    fields["tie_embeddings"] = False
    fields["norm_cfg"] = {"norm": norms}
    fields["embedding_cfg"] = {"layer": embeddings[config.embedding]}
    fields["lm_head_cfg"] = {"layer": heads[config.head]}
    return {**fields, "is_hybrid": True} if config.hybrid else fields


def norm_class(label: str) -> str:
    return "RMSNorm" if label == "W4A16" else "QRMSNorm"


def _needed(model: ModelConfig, ssm: dict[str, Any]) -> dict[str, Any]:
    """The mixer's arguments that are not its defaults: those constructors do not take all of them."""
    plain = type(model)(d_model=model.d_model, n_layer=1, vocab_size=1)
    defaults = config_to_state_spaces(plain)["ssm_cfg"]
    return {key: value for key, value in ssm.items() if defaults[key] != value}


def _hybrid(model: ModelConfig, layers: list[Any], classes: dict[str, dict[str, Any]]) -> ZooConfig:
    if model.family != "mamba2":
        raise QuambaError(
            "config.json has hybrid Mamba1 blocks, expected hybrid blocks in Mamba2 models only."
        )
    norms = _named(classes, "norm_cfg", "norm")
    for name, listed in (("layer", layers), ("norm", norms)):
        if not isinstance(listed, list) or len(listed) != model.n_layer:
            found = len(listed) if isinstance(listed, list) else repr(listed)
            raise QuambaError(
                f"config.json lists {found} entries under '{name}' for hybrid blocks,"
                f" expected {model.n_layer}: one for each block."
            )
    labels = []
    for i, (mixer, norm) in enumerate(zip(layers, norms, strict=True)):
        where = f"block {i} of config.json"
        (label, mixer_class), (norm_label, norm_name) = _single(mixer, where), _single(norm, where)
        if label not in HYBRID_LABELS:
            raise one_of(f"The precision of {where}", label, HYBRID_LABELS)
        if _mixer(mixer_class) != (label, "mamba2") or norm_label != label:
            raise QuambaError(
                f"{where.capitalize()} names {label}, {mixer_class} and {norm_label},"
                " expected one precision in all three."
            )
        _check_norm(norm_name, label)
        labels.append(label)
    # The published loader takes these two as given, whatever the file says.
    embedding = _of(EMBEDDINGS, _named(classes, "embedding_cfg", "layer"), "embedding_cfg")
    head = _of(HEADS, _named(classes, "lm_head_cfg", "layer"), "lm_head_cfg")
    return ZooConfig(model=model, layers=tuple(labels), hybrid=True, embedding=embedding, head=head)


def _single(entry: Any, where: str) -> tuple[str, Any]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise QuambaError(
            f"{where.capitalize()} holds {entry!r}, expected one precision with one class name."
        )
    return next(iter(entry.items()))


def _mixer(name: Any) -> tuple[str, Family]:
    if not isinstance(name, str) or name not in _MIXERS:
        raise one_of("The mixer class in ssm_cfg of config.json", name, _MIXERS)
    return _MIXERS[name]


def _check_norm(name: Any, label: str) -> None:
    if name not in NORMS:
        raise one_of("The norm class in config.json", name, NORMS)
    if name != norm_class(label):
        raise QuambaError(f"config.json gives {label} blocks the norm {name}, expected {norm_class(label)}.")


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise QuambaError(
            f"'{key}' in config.json is {value!r}, expected the object of a published Quamba checkpoint."
        )
    return value


def _named(classes: dict[str, dict[str, Any]], key: str, entry: str) -> Any:
    fields = classes[key]
    if set(fields) != {entry}:
        raise QuambaError(f"'{key}' in config.json has the keys {sorted(fields)}, expected '{entry}' alone.")
    return fields[entry]


def _of(table: Mapping[str, str], name: Any, key: str) -> str:
    if not isinstance(name, str) or name not in table:
        raise one_of(f"The class in {key} of config.json", name, table)
    return table[name]
