"""``quamba convert-megatron`` and ``convert_mamba2_8b_to_hf.py``, and what is done with the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_fixtures import FILE, sentencepiece_model, write_checkpoint
from tiny_models import tiny_config, tiny_model

import quamba
from quamba.cli import generate, published
from quamba.cli.main import main

CONFIG = tiny_config(
    "mamba2", ngroups=2, headdim=4, tie_embeddings=False, chunk_size=128, pad_vocab_size_multiple=128
)


@pytest.fixture
def made(here: Path) -> Path:
    """``ckpt`` of two ranks and ``t.model`` in the working folder."""
    (here / "t.model").write_bytes(sentencepiece_model(61))
    tensors = {name: t.half() for name, t in tiny_model(CONFIG).named_tensors().items()}
    return write_checkpoint(here / "ckpt", CONFIG, tensors, 2)


def test_convert_quantize_generate(run: Callable, made: Path, here: Path) -> None:
    result = run(main, "convert-megatron", "ckpt", "t.model", "--out", "models/mamba2-8b-converted")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Mamba2 of 2 layers, width 32, vocabulary 61, from 2 ranks: 0.05 MB to write.\n"
    assert result.stdout.startswith("ckpt: 0.05 MB converted to 'models/mamba2-8b-converted' in ")
    flags = (
        "--quantize --group_heads --apply_gptq --quantize_embedding --quantize_lm_head --w_bits 4 --a_bits 8"
    )
    flags += " --calib_data calib.txt --calib_data_num 4 --calib_seqlen 32 --pretrained_dir p"
    result = run(published.command, "models/mamba2-8b-converted", *flags.split(), "--device", "cpu")
    assert result.exit_code == 0, result.output
    stored = here / "p" / "ut-enyac" / "quamba2-8b-converted-w4a8"
    assert (stored / "t.model").is_file()
    tokens = quamba.load(stored).require_tokenizer().encode("the ship")
    assert quamba.load("models/mamba2-8b-converted").require_tokenizer().encode("the ship") == tokens
    result = run(
        generate.command,
        "quamba2-8b-converted-w4a8",
        *("--pretrained_dir", "p", "--prompt", "the ship", "--genlen", 4, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the ship")


def test_json(run: Callable, made: Path, here: Path) -> None:
    result = run(main, "convert-megatron", "ckpt", "t.model", "--out", "out", "--json")
    told = json.loads(result.stdout)
    assert (told["folder"], told["ranks"], told["iteration"], told["config"]["d_model"]) == (
        "out",
        2,
        500,
        32,
    )
    assert (
        told["size_bytes"] == sum(t.nbytes for t in quamba.load("out").network.named_tensors().values()) // 2
    )


def test_force(run: Callable, refused: Callable[..., str], made: Path, here: Path) -> None:
    convert = ("convert-megatron", "ckpt", "t.model", "--out")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    assert "exists and is not empty" in refused(main, *convert, "full")
    assert "holds no model" in refused(main, *convert, "full", "--force")
    assert run(main, *convert, "out").exit_code == 0
    assert "--force replaces a model" in refused(main, *convert, "out")
    assert run(main, *convert, "out", "--force").exit_code == 0


def test_refusals(refused: Callable[..., str], made: Path, here: Path) -> None:
    (here / "large.model").write_bytes(sentencepiece_model(300))
    convert = ("convert-megatron", "ckpt")
    assert "has 300 ids" in refused(main, *convert, "large.model", "--out", "out")
    assert "is no SentencePiece model" in refused(main, *convert, "calib.txt", "--out", "out")
    assert "'absent' was not found" in refused(main, "convert-megatron", "absent", "t.model", "--out", "out")
    assert refused(main, *convert, "t.model") == "Missing option '--out'."
    (made / "iter_0000500" / "mp_rank_01" / FILE).unlink()
    assert "mp_rank_01/model_optim_rng.pt' is missing" in refused(main, *convert, "t.model", "--out", "out")


def script(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(repo_root / "convert_mamba2_8b_to_hf.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_published_script(repo_root: Path, made: Path, here: Path) -> None:
    """Its positional file, its default folder; a tokenizer under the published name is taken by that."""
    name = "mt_nlg_plus_multilingual_ja_zh_the_stack_frac_015_256k.model"
    shutil.move("t.model", name)
    done = script(repo_root, f"ckpt/iter_0000500/mp_rank_00/{FILE}", name)
    assert done.returncode == 0, done.stderr
    assert "converted to './mamba2-8b-3t-4k_converted' in " in done.stdout
    model = quamba.load(here / "mamba2-8b-3t-4k_converted")
    assert model.config == CONFIG
    assert [file.name for file in model.require_tokenizer().files] == [name]
    done = script(repo_root, "ckpt", name, "--model_save_path", "mamba2-8b-3t-4k_converted")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: 'mamba2-8b-3t-4k_converted' exists and is not empty")
