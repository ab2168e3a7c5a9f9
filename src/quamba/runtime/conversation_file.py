"""A conversation as one file: what was said, the ids, and the recurrent state of the model.

A safetensors file with the tensors ``ids`` (int64) and, once something was read, ``layers.{i}.conv_state``
and ``layers.{i}.ssm_state`` in the format of the model's cache. The rest is JSON under ``conversation`` in
the metadata, beside ``format`` and ``version``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError
from quamba.models.cache import LayerCache, MambaCache
from quamba.models.lm import MambaLM

FORMAT, VERSION = "quamba-conversation", "1"

_ROLES = ("user", "assistant")
_STATES = ("conv_state", "ssm_state")
#: Elements of each weight that go into a fingerprint: enough to tell models apart, and read in no time.
_SAMPLES = 256


@dataclass(frozen=True)
class Message:
    """role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    turns  questions and answers by turns
    begun  answers so far, taken back ones included
    text   what the ids are the tokens of
    read   how many of the ids ``cache`` has read; it is None if that is 0
    """

    system: str
    turns: tuple[Message, ...]
    begun: int
    text: str
    ids: tuple[int, ...]
    read: int
    cache: MambaCache | None


def write_conversation(path: str | Path, stored: Stored, network: MambaLM, tokenizer: Tokenizer) -> None:
    """Write beside ``path`` and rename; a file there that holds no conversation is left as it is."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    if path.exists():
        _open(path, "; choose another name to save to")
    elif not path.parent.is_dir():
        raise QuambaError(f"'{path}' is in no folder that exists; make '{path.parent}' first.")
    fields = {
        "model": _identity(network, tokenizer),
        "system": stored.system,
        "turns": [asdict(message) for message in stored.turns],
        "begun": stored.begun,
        "text": stored.text,
        "read": stored.read,
    }
    tensors = {"ids": torch.tensor(stored.ids, dtype=torch.int64), **_cpu_states(stored.cache)}
    header = {"format": FORMAT, "version": VERSION, "conversation": json.dumps(fields)}
    new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, new, metadata=header)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise QuambaError(f"'{path}' cannot be written: {reason}.") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def read_conversation(path: str | Path, network: MambaLM, tokenizer: Tokenizer) -> Stored:
    """Read a file back for the model that wrote it; any other model or file raises QuambaError."""
    path = Path(path).expanduser()
    if not path.exists():
        raise QuambaError(f"The conversation '{path}' does not exist.")
    file, metadata = _open(path)
    if metadata.get("version") != VERSION:
        raise QuambaError(
            f"'{path}' is a conversation of format version {metadata.get('version')}, expected {VERSION}."
        )
    try:
        fields = json.loads(metadata["conversation"])
        _check_identity(path, fields["model"], _identity(network, tokenizer))
        ids = file.get_tensor("ids")
        stored = Stored(
            system=_typed(str, fields["system"]),
            turns=tuple(Message(_typed(str, m["role"]), _typed(str, m["content"])) for m in fields["turns"]),
            begun=_typed(int, fields["begun"]),
            text=_typed(str, fields["text"]),
            ids=tuple(ids.tolist()),
            read=_typed(int, fields["read"]),
            cache=_states(path, file, network) if fields["read"] else None,
        )
        _check(stored, network.config.vocab_size)
    except QuambaError:
        raise
    except Exception as error:  # a file that was tampered with may be wrong in any way
        raise QuambaError(f"The conversation '{path}' is damaged ({error!r}).") from error
    return stored


def fingerprint(network: MambaLM) -> str:
    """sha256, in hex, over every tensor's name, shape, dtype and some of its elements, evenly spaced."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.named_tensors().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _identity(network: MambaLM, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "config": network.config.to_dict(),
        "states": {name: _kind(tensor) for name, tensor in _cpu_states(network.new_cache(1)).items()},
        "weights": fingerprint(network),
        "tokenizer": tokenizer.fingerprint() if tokenizer.files else "",
    }


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The sentence for the first thing in which the models differ."""
    if found["config"] != expected["config"]:
        raise QuambaError(
            f"The conversation '{path}' is with another model, {_sizes(found['config'])}, expected this one, "
            f"{_sizes(expected['config'])}."
        )
    for name, kind in expected["states"].items():
        if (other := found["states"].get(name)) != kind:
            raise QuambaError(
                f"The conversation '{path}' has states of another format, {name} {other}, "
                f"expected {kind}: load the model with the recipe and on the kind of device it was held with."
            )
    if found["weights"] != expected["weights"]:
        raise QuambaError(
            f"The conversation '{path}' is with another model of the same sizes, expected this one's weights."
        )
    if found["tokenizer"] != expected["tokenizer"]:
        raise QuambaError(
            f"The conversation '{path}' was held with another tokenizer, expected this model's."
        )


def _sizes(config: Mapping[str, Any]) -> str:
    return f"{config['family']} with {config['n_layer']} layers and d_model {config['d_model']}"


def _open(path: Path, advice: str = "") -> tuple[Any, Mapping[str, str]]:
    """The open file and its metadata, if it holds a conversation."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
        metadata: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        metadata = {}
    if metadata.get("format") != FORMAT:
        raise QuambaError(f"'{path}' is no saved conversation{advice}.")
    return file, metadata


def _states(path: Path, file: Any, network: MambaLM) -> MambaCache:
    """The state in the file, in memory of its own on the model's device."""
    cache = network.new_cache(1)
    for i, layer in enumerate(cache.layers):
        for name in _STATES:
            mine, found = getattr(layer, name), file.get_tensor(f"layers.{i}.{name}")
            if _kind(found) != _kind(mine):
                raise QuambaError(
                    f"The conversation '{path}' is damaged (layers.{i}.{name}: {_kind(found)})."
                )
            mine.copy_(found)
    return cache


def _cpu_states(cache: MambaCache | None) -> dict[str, Tensor]:
    layers: list[LayerCache] = [] if cache is None else cache.layers
    return {
        f"layers.{i}.{name}": getattr(layer, name).cpu().contiguous()
        for i, layer in enumerate(layers)
        for name in _STATES
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _typed(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _check(stored: Stored, vocab: int) -> None:
    roles = [message.role for message in stored.turns]
    if len(roles) % 2 or roles != [*_ROLES] * (len(roles) // 2):
        raise ValueError(f"the roles are {roles}")
    if not 0 <= stored.read <= len(stored.ids) or stored.begun < 0:
        raise ValueError(f"{stored.read} of {len(stored.ids)} ids are read")
    if any(not 0 <= i < vocab for i in stored.ids):
        raise ValueError("an id is not in the vocabulary")
