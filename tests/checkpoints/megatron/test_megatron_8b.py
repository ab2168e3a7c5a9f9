"""The published 8B's widths and vocabulary, with two layers: from eight ranks to logits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron_fixtures import sentencepiece_model, write_checkpoint

import quamba
from quamba.checkpoints.megatron.convert import open_megatron, write_megatron
from quamba.checkpoints.upstream import expected_shapes
from quamba.models.config import Mamba2Config
from quamba.models.lm import MambaLM

CONFIG = Mamba2Config(
    d_model=4096,
    n_layer=2,
    vocab_size=256_000,
    pad_vocab_size_multiple=128,
    d_state=128,
    headdim=64,
    ngroups=8,
    chunk_size=128,
    tie_embeddings=False,
)
IDS = torch.tensor([[0, 1, 31_999, 32_000, 128_000, 255_999, 60]])


def overlapping_rows(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix whose rows overlap in memory: 2 GB of numbers from 1 MB of them."""
    store = torch.randn(2 * rows + columns, generator=generator).bfloat16() / 4
    return store.as_strided((rows, columns), (2, 1))


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(CONFIG).items():
        if shape == (256_000, 4096):
            tensors[name] = overlapping_rows(*shape, generator)
        elif name.endswith(".A_log"):
            tensors[name] = torch.linspace(0, 2.7, shape[0])
        else:
            scale = shape[1] ** -0.5 if len(shape) > 1 else 0.1
            offset = 1.0 if "norm" in name or name.endswith(".D") else 0.0
            tensors[name] = (offset + scale * torch.randn(shape, generator=generator)).bfloat16()
    return tensors


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_8b_at_full_width(scratch: Path) -> None:
    (scratch / "v.model").write_bytes(sentencepiece_model(256_000))
    tensors = weights()
    layers = {name: t for name, t in tensors.items() if t.shape != (256_000, 4096)}
    shared = {name: t for name, t in tensors.items() if name not in layers}
    checkpoint = write_checkpoint(scratch / "ckpt", CONFIG, tensors, 8)
    found = open_megatron(checkpoint, scratch / "v.model")
    assert (found.config, found.size_bytes) == (CONFIG, sum(t.nbytes for t in tensors.values()))
    write_megatron(found, scratch / "out")
    model = quamba.load(scratch / "out", dtype=torch.bfloat16, backend="reference")
    assert model.require_tokenizer().vocab_size == 256_000
    logits = model(IDS).logits
    stored = dict(model.network.named_tensors())
    assert all(torch.equal(stored[name], tensor) for name, tensor in layers.items())
    assert all(torch.equal(stored[name][r], t[r]) for name, t in shared.items() for r in (0, 99_999, -1))
    del model, stored
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    expected = MambaLM.from_tensors(CONFIG, whole).set_compute_dtype(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(logits, expected(IDS))
    assert logits.shape == (1, 7, 256_000) and logits.float().std() > 0.1
