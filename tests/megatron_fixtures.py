"""Checkpoints as Megatron-LM writes them: a file a tensor-parallel rank, training state beside the weights.

How ranks share a tensor is written here a second time, from the side of training: each part of a tensor is
cut into equal chunks, and a rank has its chunk of every part.
"""

from __future__ import annotations

import argparse
import enum
import io
import random
import signal
import struct
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quamba.checkpoints.upstream import state_spaces_name
from quamba.models.config import Mamba2Config

FILE = "model_optim_rng.pt"
WORDS = ["sea", "ship", "storm", "harbour", "captain", "rope", "water", "wind"]
_TRAINED = 61


def write_checkpoint(
    root: Path,
    config: Mamba2Config,
    tensors: Mapping[str, Tensor],
    ranks: int = 1,
    *,
    changes: Mapping[str, Any] | None = None,
    fused: bool = False,
    with_arguments: bool = True,
) -> Path:
    """``root/iter_0000500/mp_rank_XX/model_optim_rng.pt`` and the file that names the iteration.

    tensors  canonical names
    changes  of the training run's arguments; None removes one
    fused    names of layers that keep their norm with in_proj, and of the newest convolution
    """
    whole = {_megatron_name(state_spaces_name(k, "mamba2"), fused): v for k, v in tensors.items()}
    arguments = {**training_arguments(config, ranks), **(changes or {})}
    namespace = argparse.Namespace(**{k: v for k, v in arguments.items() if v is not None})
    for rank in range(ranks):
        model: dict[str, Any] = {name: shard(name, t, config, rank, ranks) for name, t in whole.items()}
        model["decoder.layers.0.mixer.in_proj._extra_state"] = io.BytesIO(b"scales")
        model["decoder.layers.0.mixer.out_proj._extra_state"] = None
        with training_classes() as (kind, mode):
            content = {
                "args": namespace,
                "checkpoint_version": 3.0,
                "iteration": 500,
                "model": model,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "scheme": mode.on},
                "rng_state": [
                    {
                        "random": random.getstate(),
                        "numpy": np.random.get_state(),
                        "cuda": torch.Generator(),
                    }
                ],
            }
            namespace.model_type = kind.decoder
            folder = root / "iter_0000500" / f"mp_rank_{rank:02d}"
            folder.mkdir(parents=True)
            torch.save(content if with_arguments else {"model": model}, folder / FILE)
    (root / "latest_checkpointed_iteration.txt").write_text("500")
    return root


def sentencepiece_model(size: int) -> bytes:
    """A SentencePiece model of exactly so many pieces; those beyond the first 61 are words like ``w7``."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    lines = [" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(50)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=min(size, _TRAINED),
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue() + _more_pieces(max(0, size - _TRAINED))


def _more_pieces(count: int) -> bytes:
    """Pieces in the wire format of protobuf, whose messages may be continued: a text and a score each."""
    pieces = [f"\u2581w{i}".encode() for i in range(count)]
    scores = [struct.pack("<f", -100.0 - i) for i in range(count)]
    bodies = [b"\x0a" + bytes([len(p)]) + p + b"\x15" + s for p, s in zip(pieces, scores, strict=True)]
    return b"".join(b"\x0a" + bytes([len(body)]) + body for body in bodies)


def training_arguments(config: Mamba2Config, ranks: int) -> dict[str, Any]:
    """What of Megatron's arguments tells about the model, and a few that do not."""
    return {
        "num_layers": config.n_layer,
        "hidden_size": config.d_model,
        "mamba_state_dim": config.d_state,
        "mamba_head_dim": config.headdim,
        "mamba_num_groups": config.ngroups,
        "padded_vocab_size": config.padded_vocab_size,
        "make_vocab_size_divisible_by": config.pad_vocab_size_multiple // ranks,
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": config.norm_eps,
        "tensor_model_parallel_size": ranks,
        "pipeline_model_parallel_size": 1,
        "params_dtype": torch.bfloat16,
        "data_path": ["a", Path("b")],
        "exit_signal": signal.SIGTERM,
        "extra": types.SimpleNamespace(a={1, 2}),
    }


def shard(name: str, tensor: Tensor, config: Mamba2Config, rank: int, ranks: int) -> Tensor:
    """A rank's share of a tensor of Megatron's."""
    bc = config.ngroups * config.d_state
    if tensor.ndim == 2 and tensor.stride(0) < tensor.shape[1]:  # rows that overlap stay so
        return tensor.chunk(ranks)[rank]
    if ".conv1d" in name and "weight" in name:
        tensor = tensor.reshape(tensor.shape[0], 1, -1)
    if name.endswith("mixer.out_proj.weight"):
        return tensor.chunk(ranks, dim=1)[rank].clone()
    if name.endswith(".layer_norm_weight") or name.endswith((".norm.weight", "final_norm.weight")):
        return tensor.chunk(ranks)[rank].clone() if ".mixer.norm." in name else tensor.clone()
    parts = [tensor.shape[0]]
    if name.endswith("mixer.in_proj.weight"):
        parts = [config.d_inner, config.d_inner, bc, bc, config.nheads]
    elif ".conv1d" in name:
        parts = [config.d_inner, bc, bc]
    return torch.cat([part.chunk(ranks)[rank] for part in tensor.split(parts)])


@contextmanager
def training_classes() -> Iterator[tuple[Any, Any]]:
    """Two enums of modules that exist while a file is written, and not when it is read."""
    names = ("megatron", "megatron.core", "megatron.core.enums", "transformer_engine")
    made = {name: types.ModuleType(name) for name in names}
    kind = enum.Enum("ModelType", {"decoder": 1}, module="megatron.core.enums")
    mode = enum.Enum("Recipe", {"on": "on"}, module="transformer_engine")
    made["megatron.core.enums"].ModelType = kind  # type: ignore[attr-defined]
    made["transformer_engine"].Recipe = mode  # type: ignore[attr-defined]
    assert not made.keys() & sys.modules.keys()
    sys.modules.update(made)
    try:
        yield kind, mode
    finally:
        for name in names:
            del sys.modules[name]


def edit(file: Path, change: Any) -> None:
    """Rewrite one file, which this module wrote, after ``change(content)``."""
    with training_classes():
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)


def _megatron_name(name: str, fused: bool) -> str:
    name = name.replace("backbone.embedding.", "embedding.word_embeddings.")
    name = name.replace("backbone.norm_f.", "decoder.final_norm.").replace("lm_head.", "output_layer.")
    name = name.replace("backbone.layers.", "decoder.layers.")
    if fused and name.endswith(".norm.weight") and ".mixer." not in name and ".layers." in name:
        name = name.replace(".norm.weight", ".mixer.in_proj.layer_norm_weight")
    return name.replace(".conv1d.", ".conv1d_") if fused else name
