"""The sizes of nvidia/mamba2-8b-3t-4k: 8 groups, chunks of 128, a vocabulary of 256,000, an untied head."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from quamba import api
from quamba.calibration.data import CalibrationSet, CalibrationSpec
from quamba.formats.weight import QuantizedWeight
from quamba.models.config import Mamba2Config
from quamba.quantization.memory import sequences_at_once
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import HeadGroups, Recipe, Solver, load_recipe
from quamba.recipes.skeleton import skeleton

GIB = 1 << 30
CONFIG = Mamba2Config(
    d_model=4096,
    n_layer=56,
    vocab_size=256_000,
    ngroups=8,
    chunk_size=128,
    tie_embeddings=False,
    pad_vocab_size_multiple=128,
)


def recipe(kind: str) -> Recipe:
    return load_recipe("w4a8").replace(
        group_heads=HeadGroups(), percentile_alpha=0.99999, solver=Solver(kind=kind, scale="absmax")
    )


def test_shapes_and_bytes_of_the_8b_in_w4a8() -> None:
    model = skeleton(resolve(recipe("gptq"), CONFIG))
    tensors = model.named_tensors()
    mixer = "backbone.layers.55.mixer"
    assert {name: tuple(t.shape) for name, t in tensors.items() if "layers.55.mixer" in name} == {
        f"{mixer}.in_proj.weight.data": (18_560, 2048),
        f"{mixer}.in_proj.weight.scale": (18_560, 32),
        f"{mixer}.in_proj.out_scale": (18_560,),
        f"{mixer}.conv1d.weight.data": (10_240, 4),
        f"{mixer}.conv1d.weight.scale": (10_240, 1),
        f"{mixer}.conv1d.bias": (10_240,),
        f"{mixer}.conv1d.out_scale": (10_240,),
        f"{mixer}.ssm.A_log": (128,),
        f"{mixer}.ssm.D": (128,),
        f"{mixer}.ssm.dt_bias": (128,),
        f"{mixer}.norm.weight": (8192,),
        f"{mixer}.rotate.out_scale": (),
        f"{mixer}.out_proj.weight.data": (4096, 4096),
        f"{mixer}.out_proj.weight.scale": (4096, 64),
    }
    assert tensors["backbone.embedding.weight.data"].shape == (256_000, 2048)
    assert tensors["lm_head.weight.data"].shape == (256_000, 2048)
    assert 4.2e9 < sum(t.nbytes for t in tensors.values()) < 4.4e9


def test_batches_of_the_8b_within_8_gib() -> None:
    assert sequences_at_once(CONFIG, 512, 8 * GIB) == 2


@pytest.mark.heavy
@pytest.mark.slow
def test_two_blocks_at_full_width(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized from files, saved, loaded, run; rows of the vocabulary beyond the last token are padding."""
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    large = importlib.import_module("large")
    options = ["--folder", str(tmp_path), "--layers", "2", "--vocab", "255900", "--device", "cpu"]
    large.make(large._options(options))
    model = api.open_float(tmp_path / "float")
    assert model.config == dataclasses.replace(CONFIG, n_layer=2, vocab_size=255_900)
    assert model.config.padded_vocab_size == 256_000
    generator = torch.Generator().manual_seed(0)
    lengths = (200, 64, 1)
    sequences = [torch.randint(0, 255_900, (n,), generator=generator) for n in lengths]
    texts = CalibrationSet(sequences, CalibrationSpec(num=3, seqlen=200), "random tokens", "0" * 64)
    small, _ = api.quantize(model, recipe("rtn"), texts, max_memory=12 * GIB)
    ids = torch.arange(7)[None] * 36_000
    expected = small(ids).logits
    assert expected.isfinite().all()
    folder = tmp_path / "w4a8"
    api.save(small, folder)
    loaded = api.load(folder)
    assert isinstance(loaded.network.lm_head.weight, QuantizedWeight)
    assert torch.equal(loaded.network.lm_head.weight.data, small.network.lm_head.weight.data)
    (first,) = loaded.generate(ids[0], max_new_tokens=4)
    assert first.ids
    # Against the float model in the dtype of its files, which need not be copied then.
    reference = api.load(tmp_path / "float", dtype=torch.bfloat16)
    floats = reference(ids).logits.float()
    loss = float((floats - expected).norm() / floats.norm())
    assert loss < 0.5
    for name in ("large", "random_models"):
        sys.modules.pop(name, None)
