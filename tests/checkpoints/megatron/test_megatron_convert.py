"""Megatron checkpoints come back as the tensors that they were made of, whatever the number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_fixtures import FILE, edit, write_checkpoint
from tiny_models import tiny_config, tiny_model

import quamba
from quamba.checkpoints.float import read_float
from quamba.checkpoints.megatron import ranks as ranks_module
from quamba.checkpoints.megatron.convert import open_megatron, write_megatron
from quamba.checkpoints.upstream import write_state_spaces
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config

# Every part of in_proj has a size of its own: z and x 64 (d_inner), B and C 128, dt 16.
SIZES = {"ngroups": 8, "headdim": 4, "tie_embeddings": False, "chunk_size": 128}
CONFIG = tiny_config("mamba2", **SIZES)


def tensors_of(config: Mamba2Config, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """As training keeps them: A_log and D in float32, the rest in ``dtype``."""
    named = tiny_model(config).named_tensors()
    return {name: t if name.endswith((".A_log", ".D")) else t.to(dtype) for name, t in named.items()}


def convert(checkpoint: Path, vocabulary: Path, folder: Path, **options: object) -> None:
    write_megatron(open_megatron(checkpoint, vocabulary), folder, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    return write_checkpoint(tmp_path / "ckpt", CONFIG, tensors_of(CONFIG), 2)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ranks_are_merged_exactly(tmp_path: Path, vocabulary: Path, count: int, fused: bool) -> None:
    tensors = tensors_of(CONFIG)
    checkpoint = write_checkpoint(tmp_path / "ckpt", CONFIG, tensors, count, fused=fused)
    convert(checkpoint, vocabulary, tmp_path / "out")
    read = read_float(tmp_path / "out")
    assert read.config == CONFIG
    assert list(read.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(read.tensors[name], tensor), name


def test_logits_and_tokenizer(tmp_path: Path, vocabulary: Path, root: Path) -> None:
    tensors = tensors_of(CONFIG)
    write_state_spaces(tmp_path / "plain", CONFIG, tensors, tokenizer_files=[vocabulary])
    convert(root, vocabulary, tmp_path / "out")
    plain, model = quamba.load(tmp_path / "plain"), quamba.load(tmp_path / "out")
    ids = torch.tensor([model.require_tokenizer().encode("the captain and the storm")])
    assert ids.shape[1] > 5
    assert torch.equal(model(ids).logits, plain(ids).logits)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("limit", [500, 4096, 10**9])
def test_streamed_in_pieces_and_shards(
    tmp_path: Path, vocabulary: Path, root: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    convert(root, vocabulary, tmp_path / "whole")
    monkeypatch.setattr(ranks_module, "MAPPED_BYTES", limit)
    monkeypatch.setattr(ranks_module, "BLOCK_BYTES", limit)
    pieces: list[int] = []
    checkpoint = open_megatron(root, vocabulary)
    write_megatron(checkpoint, tmp_path / "pieces", max_shard_bytes=20_000, written=pieces.append)
    assert sum(pieces) == checkpoint.size_bytes == sum(t.nbytes for t in tensors_of(CONFIG).values())
    assert max(pieces) <= limit
    assert (tmp_path / "pieces" / "model.safetensors.index.json").is_file()
    whole, read = read_float(tmp_path / "whole").tensors, read_float(tmp_path / "pieces").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())


def test_without_arguments_the_sizes_are_those_of_the_8b(tmp_path: Path, vocabulary: Path) -> None:
    """Width, layers and vocabulary come from the tensors."""
    config = tiny_config(
        "mamba2",
        d_model=256,
        d_state=128,
        headdim=64,
        ngroups=8,
        tie_embeddings=False,
        chunk_size=128,
        pad_vocab_size_multiple=128,
    )
    checkpoint = write_checkpoint(tmp_path / "ckpt", config, tensors_of(config), 4, with_arguments=False)
    convert(checkpoint, vocabulary, tmp_path / "out")
    assert read_float(tmp_path / "out").config == config
    shutil.rmtree(checkpoint / "iter_0000500" / "mp_rank_03")
    shutil.rmtree(checkpoint / "iter_0000500" / "mp_rank_02")
    with pytest.raises(QuambaError, match=r"groups of 128 states, ranks 2\.$"):
        open_megatron(checkpoint, vocabulary)


def test_a_tied_head(tmp_path: Path, vocabulary: Path) -> None:
    config = tiny_config("mamba2", **{**SIZES, "tie_embeddings": True})
    checkpoint = write_checkpoint(tmp_path / "ckpt", config, tensors_of(config), 2)
    convert(checkpoint, vocabulary, tmp_path / "out")
    assert read_float(tmp_path / "out").config.tie_embeddings


def test_a_merged_checkpoint_may_still_say_how_it_was_trained(tmp_path: Path, vocabulary: Path) -> None:
    changes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}
    checkpoint = write_checkpoint(tmp_path / "ckpt", CONFIG, tensors_of(CONFIG), 1, changes=changes)
    assert open_megatron(checkpoint, vocabulary).config == CONFIG


@pytest.mark.parametrize(
    "place",
    [
        "",
        "iter_0000500",
        "iter_0000500/mp_rank_00",
        "iter_0000500/mp_rank_01",
        f"iter_0000500/mp_rank_00/{FILE}",
    ],
)
def test_any_folder_of_it_will_do(root: Path, vocabulary: Path, place: str) -> None:
    found = open_megatron(root / place, vocabulary)
    assert len(found.ranks) == 2
    assert found.ranks.iteration == 500


def test_one_iteration_needs_no_tracker_and_release_is_one(root: Path, vocabulary: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert len(open_megatron(root, vocabulary).ranks) == 2
    (root / "iter_0000500").rename(root / "release")
    assert len(open_megatron(root, vocabulary).ranks) == 2
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert len(open_megatron(root, vocabulary).ranks) == 2


def test_a_single_file_and_links(tmp_path: Path, vocabulary: Path) -> None:
    """The hub's cache: links whose targets lie elsewhere under other names."""
    checkpoint = write_checkpoint(tmp_path / "ckpt", CONFIG, tensors_of(CONFIG), 2)
    for rank in range(2):
        file = checkpoint / "iter_0000500" / f"mp_rank_{rank:02d}" / FILE
        file.rename(tmp_path / f"blob{rank}")
        file.symlink_to(tmp_path / f"blob{rank}")
    assert len(open_megatron(file, vocabulary).ranks) == 2
    single = write_checkpoint(tmp_path / "one", CONFIG, tensors_of(CONFIG), 1)
    (single / "iter_0000500" / "mp_rank_00" / FILE).rename(tmp_path / "8b.pt")
    assert open_megatron(tmp_path / "8b.pt", vocabulary).config == CONFIG


def test_an_existing_folder_is_kept(tmp_path: Path, vocabulary: Path, root: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(QuambaError, match="exists and is not empty"):
        convert(root, vocabulary, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    convert(root, vocabulary, tmp_path / "out", overwrite=True)
    assert read_float(tmp_path / "out").config == CONFIG


def test_a_small_disk_is_told_at_once(
    tmp_path: Path, vocabulary: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 10**7})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QuambaError) as told:
        convert(root, vocabulary, tmp_path / "a" / "b")
    assert str(told.value).endswith(f"needs 0.1 GB with some to spare, but '{tmp_path}' has 0.0 GB.")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, vocabulary: Path, root: Path) -> None:
    """The system refuses to let files grow, as it does on a full disk."""
    out = tmp_path / "out"
    script = (
        "import resource, sys\n"
        "from quamba.cli.convert_megatron import command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))\n"
        "command()"
    )
    config = tiny_config("mamba2", **{**SIZES, "n_layer": 12})
    checkpoint = write_checkpoint(tmp_path / "large", config, tensors_of(config), 2)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", script, checkpoint, vocabulary, "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"Error: '{out}' could not be written (File too large), and nothing of it is left."
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_the_tokenizer_that_the_loader_knows(tmp_path: Path, vocabulary: Path, root: Path) -> None:
    shutil.copyfile(vocabulary, tmp_path / "blob")
    convert(root, tmp_path / "blob", tmp_path / "out")
    assert quamba.load(tmp_path / "out").require_tokenizer().vocab_size == 61


def test_ranks_of_two_checkpoints(tmp_path: Path, vocabulary: Path, root: Path) -> None:
    """Seen only when weights are read: nothing is left then."""

    def other_norm(content: dict) -> None:
        content["model"]["decoder.layers.1.norm.weight"] += 1

    edit(root / "iter_0000500" / "mp_rank_01" / FILE, other_norm)
    with pytest.raises(QuambaError, match=r"'decoder\.layers\.1\.norm\.weight' differs between"):
        convert(root, vocabulary, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
