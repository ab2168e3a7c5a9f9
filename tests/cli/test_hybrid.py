"""Hybrid blocks from the published command line to models that run, for both families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import quamba
from quamba.cli.main import main as quamba_main
from quamba.cli.published import command as main

Run = Callable[..., Result]
Refused = Callable[..., str]
CALIBRATION = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32, "--device", "cpu")
MIXES = [("W8A8", "W4A16"), ("W4A8", "FP16"), ("FP16", "W8A8"), ("W4A16", "W4A8")]


def stored(run: Run, here: Path, family: str, labels: tuple[str, ...], *more: object) -> Path:
    (here / "mix.json").write_text(json.dumps(labels))
    asked = ("--hybrid_blocks", "--hybrid_blocks_config", "mix.json", "--pretrained_dir", "p", *more)
    result = run(main, f"{family}-tiny", "--quantize", *asked, *CALIBRATION)
    assert result.exit_code == 0, result.output
    folder = here / "p" / "ut-enyac" / f"{family.replace('mamba', 'quamba')}-tiny-w4aX-mix"
    assert folder.is_dir()
    return folder


@pytest.mark.parametrize("labels", MIXES, ids="-".join)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_quantized_reloaded_run_profiled_inspected(
    run: Run, here: Path, family: str, labels: tuple[str, ...]
) -> None:
    folder = stored(run, here, family, labels)
    model = quamba.load(folder)
    assert [block.label for block in model.plan.blocks] == list(labels)
    assert (model.recipe.embedding, model.recipe.head.label) == ("int4", "W4A8")
    logits = model(torch.arange(1, 30)[None]).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(quamba.load(folder)(torch.arange(1, 30)[None]).logits, logits)
    name = folder.name
    generated = run(quamba_main, "generate", name, "--pretrained_dir", "p", "--genlen", 5, "--device", "cpu")
    assert generated.exit_code == 0, generated.output
    inspected = run(quamba_main, "inspect", name, "--pretrained_dir", "p")
    assert inspected.exit_code == 0, inspected.output
    assert all(label in inspected.stdout for label in labels)
    profiled = run(
        quamba_main, "profile", name, "--pretrained_dir", "p", "--tpot", "--ttft", "--size",
        "--prompt_len", 8, "--repeats", 2, "--device", "cpu",
    )  # fmt: skip
    assert profiled.exit_code == 0, profiled.output


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_ends_have_precisions_of_their_own(run: Run, here: Path, family: str) -> None:
    more = ("--embedding_precision", "float", "--head_precision", "W8A8")
    model = quamba.load(stored(run, here, family, MIXES[3], *more))
    assert model.plan.embedding is None
    assert model.recipe.head.label == "W8A8"
    assert [block.label for block in model.plan.blocks] == list(MIXES[3])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["W4A8"] * 3, "The hybrid configuration 'mix.json' has 3 entries, expected 2: one for every block."),
        (["W4A8", "w4a9"], "Entry 1 of the hybrid configuration 'mix.json' is 'w4a9', expected one of "),
        (["W4A8", ["W4A8"]], "Entry 1 of the hybrid configuration 'mix.json' is ['W4A8'], expected one of "),
        ("W4A8", "The hybrid configuration 'mix.json' holds a JSON str, expected a list."),
    ],
    ids=["length", "label", "no text", "no list"],
)
def test_a_wrong_configuration_is_one_sentence(
    refused: Refused, here: Path, labels: object, sentence: str
) -> None:
    (here / "mix.json").write_text(json.dumps(labels))
    asked = ("--hybrid_blocks", "--hybrid_blocks_config", "mix.json", "--pretrained_dir", "p")
    assert refused(main, "mamba2-tiny", "--quantize", *asked, *CALIBRATION).startswith(sentence)


def test_a_wrong_precision_of_the_ends(refused: Refused) -> None:
    said = refused(main, "mamba2-tiny", "--quantize", "--head_precision", "W4A6", *CALIBRATION)
    assert "'W4A6' is not one of" in said and "Did you mean 'W4A" in said
