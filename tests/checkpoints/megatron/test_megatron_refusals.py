"""What is refused, each with one sentence, before anything is written; and that no pickle runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_fixtures import FILE, WORDS, edit, training_classes, write_checkpoint
from tiny_models import tiny_config, tiny_model

from quamba.checkpoints.megatron.convert import open_megatron
from quamba.errors import QuambaError

CONFIG = tiny_config("mamba2", ngroups=8, headdim=4, tie_embeddings=False, chunk_size=128)
RANK = "iter_0000500/mp_rank_{:02d}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = tiny_model(CONFIG).named_tensors()
    return write_checkpoint(tmp_path_factory.mktemp("made"), CONFIG, tensors, 2)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A checkpoint of two ranks that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "ckpt"))


def refusal(checkpoint: Path, vocabulary: Path) -> str:
    with pytest.raises(QuambaError) as told:
        open_megatron(checkpoint, vocabulary)
    sentence = str(told.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 500
    return sentence


class Bomb:
    """Unpickled the ordinary way, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("where", ["model", "args", "optimizer", "rng_state"])
def test_code_in_a_pickle_is_named_and_not_run(
    tmp_path: Path, root: Path, vocabulary: Path, where: str
) -> None:
    file = root / RANK.format(0) / FILE

    def plant(content: dict) -> None:
        content[where] = (
            {**content["model"], "bomb": Bomb(tmp_path / "ran")}
            if where == "model"
            else Bomb(tmp_path / "ran")
        )

    edit(file, plant)
    sentence = refusal(root, vocabulary)
    assert f"'{file}' is refused: its pickle names 'posix.mkdir'" in sentence
    assert "nothing of it was run" in sentence
    assert not (tmp_path / "ran").exists()
    with training_classes():
        torch.load(file, weights_only=False)  # the bomb is live
    assert (tmp_path / "ran").is_dir()


class Call:
    """Unpickled the ordinary way, it calls what it was made with."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made_with = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made_with


def test_a_function_of_an_allowed_package_is_not_run_either(
    tmp_path: Path, root: Path, vocabulary: Path
) -> None:
    """numpy's names are taken, but stand for nothing: this one would write a file."""
    import numpy as np

    target = str(tmp_path / "ran.npy")
    call = Call(np.save, target, np.zeros(3))
    edit(root / RANK.format(0) / FILE, lambda content: content.update(rng_state=call))
    assert len(open_megatron(root, vocabulary).ranks) == 2
    assert not Path(target).exists()
    with training_classes():
        torch.load(root / RANK.format(0) / FILE, weights_only=False)
    assert Path(target).exists()


@pytest.mark.parametrize("name", ["eval", "exec", "setattr", "__import__"])
def test_builtins_are_refused(root: Path, vocabulary: Path, name: str) -> None:
    import builtins

    call = Call(getattr(builtins, name), "1")
    edit(root / RANK.format(1) / FILE, lambda content: content.update(extra=call))
    assert f"its pickle names 'builtins.{name}'" in refusal(root, vocabulary)


def test_getattr_looks_nothing_up(root: Path, vocabulary: Path) -> None:
    """Python 3.11.0 to 3.11.3 write an enum as getattr(its class, its name)."""
    call = Call(getattr, Path, "no such attribute")
    edit(root / RANK.format(0) / FILE, lambda content: content.update(extra=call))
    assert len(open_megatron(root, vocabulary).ranks) == 2
    with training_classes(), pytest.raises(AttributeError):
        torch.load(root / RANK.format(0) / FILE, weights_only=False)


def test_a_class_in_the_place_of_a_tensor(root: Path, vocabulary: Path) -> None:
    name = "decoder.layers.0.mixer.D"
    edit(
        root / RANK.format(0) / FILE,
        lambda content: content["model"].update({name: content["args"].model_type}),
    )
    assert refusal(root, vocabulary).endswith(f"{FILE}' is an object, expected a tensor of floats.")
    edit(root / RANK.format(0) / FILE, lambda content: content["model"].update({name: torch.zeros(2).int()}))
    assert "is torch.int32, expected a tensor of floats." in refusal(root, vocabulary)


LAYER = "decoder.layers.1."
CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "attention": (
        lambda c: c["model"].update({f"{LAYER}self_attention.linear_qkv.weight": torch.zeros(2, 2)}),
        "has 'self_attention.linear_qkv.weight', expected Mamba2 layers only: hybrid models such as "
        "mamba2-hybrid-8b, with attention or MLP layers, are not supported.",
    ),
    "mlp": (
        lambda c: c["model"].update({f"{LAYER}mlp.linear_fc1.weight": torch.zeros(2, 2)}),
        "Layer 1 of",
    ),
    "mamba1": (
        lambda c: c["model"].update({f"{LAYER}mixer.x_proj.weight": torch.zeros(2, 2)}),
        "is a Mamba1 layer, expected Mamba2 layers only.",
    ),
    "unknown": (
        lambda c: c["model"].update({"embedding.position_embeddings.weight": torch.zeros(2, 2)}),
        "have also embedding.position_embeddings.weight, expected those of 2 layers.",
    ),
    "missing": (
        lambda c: c["model"].pop(f"{LAYER}mixer.D"),
        "lack backbone.layers.1.mixer.D, expected those of 2 layers.",
    ),
    "both names": (
        lambda c: c["model"].update({f"{LAYER}mixer.conv1d_bias": torch.zeros(2)}),
        f"holds '{LAYER}mixer.conv1d.bias' and '{LAYER}mixer.conv1d_bias', which are the same tensor.",
    ),
    "no embedding": (
        lambda c: c["model"].pop("embedding.word_embeddings.weight"),
        "has no embedding.word_embeddings.weight, expected that of a whole model.",
    ),
    "layers": (lambda c: setattr(c["args"], "num_layers", 3), "expected those of 3 layers."),
    "width": (
        lambda c: setattr(c["args"], "hidden_size", 64),
        "'embedding.word_embeddings.weight' in '{}' is [32, 32], expected [32, 64] by its arguments: "
        "width 64, 32 heads of 4, 8 groups of 16 states, ranks 2.",
    ),
    "states": (lambda c: setattr(c["args"], "mamba_state_dim", 32), "8 groups of 32 states, ranks 2."),
    "heads": (lambda c: setattr(c["args"], "mamba_num_heads", 7), "has 7 heads of 4 channels, 28 in all"),
    "rows": (lambda c: setattr(c["args"], "padded_vocab_size", 128), "is [32, 32], expected [64, 32]"),
    "no number": (
        lambda c: setattr(c["args"], "mamba_head_dim", "64"),
        "The argument mamba_head_dim of '{}' is '64', expected a positive integer.",
    ),
    "untied": (
        lambda c: setattr(c["args"], "untie_embeddings_and_output_weights", False),
        "have also output_layer.weight",
    ),
    "norm": (
        lambda c: setattr(c["args"], "normalization", "LayerNorm"),
        "'{}' was trained with normalization 'LayerNorm', expected 'RMSNorm'.",
    ),
    "norm of 1 + weight": (
        lambda c: setattr(c["args"], "apply_layernorm_1p", True),
        "was trained with apply_layernorm_1p, expected plain weights of the norms.",
    ),
    "epsilon": (lambda c: setattr(c["args"], "norm_epsilon", 1e-6), "norm_epsilon 1e-06, expected 1e-05."),
    "stages": (
        lambda c: (
            setattr(c["args"], "pipeline_model_parallel_size", 4),
            c["model"].pop("decoder.final_norm.weight"),
        ),
        "'{}' is one of 4 pipeline stages, expected a checkpoint saved with pipeline size 1.",
    ),
    "no model": (lambda c: c.pop("model"), "expected the 'model' of a Megatron checkpoint."),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_file_says(root: Path, vocabulary: Path, name: str) -> None:
    change, sentence = CHANGES[name]
    for rank in range(2):
        edit(root / RANK.format(rank) / FILE, change)
    told = refusal(root, vocabulary)
    assert sentence.format(root / RANK.format(0) / FILE) in told


def test_a_missing_rank(root: Path, vocabulary: Path) -> None:
    last = root / RANK.format(1) / FILE
    last.unlink()
    assert refusal(root, vocabulary) == f"'{last}' is missing, expected the files of all 2 ranks."
    last.parent.rmdir()
    assert refusal(root, vocabulary) == f"'{last}' is missing, expected the files of all 2 ranks."
    shutil.rmtree(root / RANK.format(0))
    (root / RANK.format(1)).mkdir()
    first = root / RANK.format(0) / FILE
    assert refusal(root, vocabulary) == f"'{first}' is missing, expected the files of all 2 ranks."


def test_ranks_of_different_runs(root: Path, vocabulary: Path) -> None:
    file = root / RANK.format(1) / FILE
    edit(file, lambda content: content.update(iteration=400))
    assert "is of iteration 400, but" in refusal(root, vocabulary)
    edit(file, lambda content: content.update(iteration=500))
    edit(file, lambda content: content["model"].pop(f"{LAYER}mixer.D"))
    assert "'backbone.layers.1.mixer.D' is in some ranks of" in refusal(root, vocabulary)
    edit(file, lambda content: content["model"].update({f"{LAYER}mixer.D": torch.zeros(3)}))
    assert "is [3] torch.float32 in" in refusal(root, vocabulary)


def test_more_files_than_ranks(root: Path, vocabulary: Path) -> None:
    for rank in range(2):
        edit(root / RANK.format(rank) / FILE, lambda c: setattr(c["args"], "tensor_model_parallel_size", 1))
        edit(root / RANK.format(rank) / FILE, lambda c: setattr(c["args"], "padded_vocab_size", 32))
    assert "was saved by 1 tensor-parallel ranks, expected 2" in refusal(root, vocabulary)


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_a_truncated_file(root: Path, vocabulary: Path, kept: int) -> None:
    file = root / RANK.format(1) / FILE
    file.write_bytes(file.read_bytes()[:kept])
    assert f"'{file}' is truncated or no PyTorch checkpoint" in refusal(root, vocabulary)


def test_a_git_lfs_pointer(root: Path, vocabulary: Path) -> None:
    file = root / RANK.format(0) / FILE
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n")
    assert "is a Git LFS pointer" in refusal(root, vocabulary)


def test_a_file_that_cannot_be_mapped(root: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise RuntimeError("unable to mmap 17 bytes from file <f>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", no_memory)
    assert "'sysctl vm.overcommit_memory=1' lifts that." in refusal(root, vocabulary)


def test_folders(tmp_path: Path, root: Path, vocabulary: Path) -> None:
    absent = tmp_path / "absent"
    assert refusal(absent, vocabulary).startswith(f"'{absent}' was not found, expected a Megatron checkpoint")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no folder mp_rank_00" in refusal(empty, vocabulary)
    shutil.copytree(root / "iter_0000500", root / "iter_0000400")
    assert len(open_megatron(root, vocabulary).ranks) == 2  # the tracker says which
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("600")
    assert refusal(root, vocabulary).endswith(f"there is no folder '{root / 'iter_0000600'}'.")
    tracker.write_text("../..")
    assert refusal(root, vocabulary).endswith("says '../..', expected a number or 'release'.")
    tracker.unlink()
    assert "has 2 iterations (iter_0000400, iter_0000500)" in refusal(root, vocabulary)
    (root / "iter_0000400" / "mp_rank_00").rename(root / "iter_0000400" / "mp_rank_00_003")
    assert "is split into pipeline stages ('mp_rank_00_003')" in refusal(root / "iter_0000400", vocabulary)
    (empty / "__0_0.distcp").touch()
    assert "distributed format" in refusal(empty, vocabulary)


def test_vocabularies(tmp_path: Path, root: Path, vocabulary: Path) -> None:
    assert "The vocabulary" in refusal(root, tmp_path / "absent.model")
    (tmp_path / "text.model").write_text(" ".join(WORDS))
    assert "is no SentencePiece model" in refusal(root, tmp_path / "text.model")


@pytest.mark.parametrize("rows", [64, 72, 80, 60, 61, 92, 96])
def test_the_tokenizer_must_fill_the_embedding(tmp_path: Path, vocabulary: Path, rows: int) -> None:
    """61 ids, padded to a multiple of 4 times the number of ranks, of which there were 1 to 8."""
    config = tiny_config(
        "mamba2", ngroups=8, headdim=4, tie_embeddings=False, vocab_size=rows, pad_vocab_size_multiple=1
    )
    changes = {"make_vocab_size_divisible_by": 4}
    tensors = tiny_model(config).named_tensors()
    checkpoint = write_checkpoint(tmp_path / "ckpt", config, tensors, 1, changes=changes)
    if rows in (64, 72, 80):
        found = open_megatron(checkpoint, vocabulary).config
        assert (found.vocab_size, found.padded_vocab_size) == (61, rows)
    else:
        assert refusal(checkpoint, vocabulary) == (
            f"The tokenizer has 61 ids, which no padding by 4 to 32 makes the {rows} rows of the "
            "checkpoint's embedding, expected the tokenizer of this model."
        )
