"""The fixtures that other tests lean on do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poison_empty")
def test_poison_fills_floats_with_nan(dtype: torch.dtype) -> None:
    template = torch.zeros(2, 3, dtype=dtype)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(template),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        template.new_empty(2, 3),
    ):
        assert tensor.shape == (2, 3) and tensor.isnan().all()


@pytest.mark.usefixtures("poison_empty")
def test_poison_fills_integers_with_one_byte() -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        assert set(torch.empty(5, dtype=dtype).view(torch.uint8).tolist()) == {0x5A}
    assert torch.empty(3, dtype=torch.bool).all()


@pytest.mark.usefixtures("poison_empty")
def test_poison_leaves_parameters_trainable() -> None:
    layer = torch.nn.Linear(4, 4)
    assert layer.weight.requires_grad and not layer.weight.isnan().any()


def test_poison_is_opt_in() -> None:
    assert torch.empty.__module__ != "conftest"


@pytest.mark.parametrize("_run", [1, 2])
def test_every_test_starts_from_the_same_seed(_run: int) -> None:
    assert torch.initial_seed() == 0
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.randn(3), expected)


def test_tiny_tokenizer_round_trips_any_text(tiny_tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.get_vocab_size() == 257
    text = "Élan vital,\n 42 % — naïve\t!"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == 0


def test_assets_are_the_files_whose_checksums_we_state(assets: Path) -> None:
    import hashlib

    stated = dict(
        reversed(line.split(maxsplit=1)) for line in (assets / "SHA256SUMS").read_text().splitlines()
    )
    found = {
        path.relative_to(assets).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("models", "data")
        for path in (assets / folder).rglob("*")
        if path.is_file()
    }
    assert found == stated


@pytest.mark.parametrize("name", ["mamba-demo", "mamba2-demo"])
def test_demo_checkpoints_hold_what_the_readme_says(assets: Path, name: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(assets / "models" / name / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["backbone.embedding.weight"].shape == (4096, 384)
    kept_wide = ("A_log", ".D", "dt_bias", "dt_proj.bias", "norm.weight", "norm_f.weight")
    for tensor_name, tensor in tensors.items():
        wide = tensor_name.endswith(kept_wide)
        assert tensor.dtype == (torch.float32 if wide else torch.float16), tensor_name


def test_heldout_text_is_96_windows_of_1024(assets: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / "models" / "mamba2-demo" / "tokenizer.json"))
    text = (assets / "data" / "heldout.txt").read_text(encoding="utf-8")
    assert len(tokenizer.encode(text).ids) == 96 * 1024
