"""main.py's command line: quantize, keep, find again, measure, log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from quamba.cli.published import command as main

Run = Callable[..., Result]
Refused = Callable[..., str]
CALIBRATION = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32)
QUANTIZE = ("--quantize", *CALIBRATION, "--device", "cpu")
PPL = ("--eval_ppl", "--ppl_dataset", "eval.txt")
NAME = "quamba2-tiny-w8a8"


def test_quantize_keep_and_find_again(run: Run, here: Path) -> None:
    first = run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p", *PPL, "--log_dir", "logs")
    assert first.exit_code == 0, first.output
    folder = here / "p" / "ut-enyac" / NAME
    assert f"Stored in 'p/ut-enyac/{NAME}'." in first.stdout
    assert "eval.txt: all" in first.stdout
    made = (folder / "model.safetensors").stat().st_mtime_ns
    again = run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p", *PPL, "--log_dir", "logs")
    by_name = run(main, f"ut-enyac/{NAME}", "--pretrained_dir", "p", *PPL, "--log_dir", "logs")
    assert (again.exit_code, by_name.exit_code) == (0, 0)
    assert "Using the stored model" in again.stderr
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    logs = [json.loads(path.read_text()) for path in (here / "logs").iterdir()]
    assert len(logs) == 3
    assert len({log["ppl"]["eval.txt"] for log in logs}) == 1
    names = sorted(path.name.rsplit("-", 3)[0] for path in (here / "logs").iterdir())
    assert names == ["mamba2-tiny_w8a8", "mamba2-tiny_w8a8", NAME]


def test_what_a_log_says(run: Run, here: Path) -> None:
    result = run(main, "mamba-tiny", *PPL, "--log_dir", "logs", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (path,) = (here / "logs").iterdir()
    assert path.name.startswith("mamba-tiny_fp16-")
    log = json.loads(path.read_text())
    assert log["args"]["model"] == "mamba-tiny"
    assert (log["args"]["w_bits"], log["args"]["ppl_dataset"]) == (8, ["eval.txt"])
    assert (log["lm_eval"], log["recipe"]) == ({}, None)
    assert set(log["versions"]) == {"quamba", "torch", "python", "platform"}
    assert set(log["timings"]) == {"load", "perplexity eval.txt"}
    scored = log["scored"]["eval.txt"]
    tokens = len((here / "eval.txt").read_text())  # the tiny tokenizer has one token a byte
    assert scored["windows"] == tokens // 1024
    assert scored["tokens_scored"] == scored["windows"] * 1023
    assert math.isclose(log["ppl"]["eval.txt"], math.exp(scored["nll_mean"]), rel_tol=1e-12)
    assert log["size_mib"] > 0


def test_a_quantized_model_is_never_logged_as_fp16(run: Run, here: Path) -> None:
    assert run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p").exit_code == 0
    (here / "p" / "ut-enyac" / NAME).rename(here / "mine")
    assert run(main, "mine", *PPL, "--log_dir", "logs").exit_code == 0
    (path,) = (here / "logs").iterdir()
    assert path.name.startswith("mine-")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (("--calib_data_num", 5), "calibration num 4 instead of 5"),
        (("--calib_seqlen", 33), "calibration seqlen 32 instead of 33"),
        (("--seed", 7), "calibration seed 1234 instead of 7"),
        (("--calib_data", "eval.txt"), "calibration text 'calib.txt' instead of 'eval.txt'"),
        (("--apply_gptq",), 'recipe.solver.kind "rtn" instead of "gptq"'),
        (("--quantize_embedding",), 'recipe.embedding "float" instead of "int8"'),
        (("--state_dtype", "fp32"), 'recipe.blocks.state "fp16" instead of "fp32"'),
        (("--state_dtype", "int8"), 'recipe.blocks.state "fp16" instead of "int8"'),
    ],
)
def test_a_stored_model_that_differs_is_refused(
    run: Run, refused: Refused, here: Path, changes: tuple[object, ...], difference: str
) -> None:
    assert run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p").exit_code == 0
    sentence = refused(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p", *changes)
    assert difference in sentence
    assert "--force quantizes again" in sentence
    forced = run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p", *changes, "--force")
    assert forced.exit_code == 0, forced.output
    assert "Using the stored" not in forced.stderr
    same = run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p", *changes)
    assert "Using the stored" in same.stderr


def test_the_same_name_from_another_model_is_refused(run: Run, refused: Refused, here: Path) -> None:
    (here / "other").mkdir()
    (here / "mamba2-tiny").rename(here / "other" / "mamba2-tiny")
    (here / "mamba2-tiny").symlink_to((here / "mamba-tiny").resolve())
    assert run(main, "other/mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p").exit_code == 0
    sentence = refused(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p")
    assert "source 'other/mamba2-tiny' instead of 'mamba2-tiny'" in sentence


@pytest.mark.parametrize(
    ("alpha", "folder"), [((), "default"), ((1.0,), "pa-1"), ((0.9995,), "pa-0.9995"), (("0.90",), "pa-0.9")]
)
def test_output_subdir(run: Run, here: Path, alpha: tuple[object, ...], folder: str) -> None:
    given = ("--percentile_alpha", *alpha) if alpha else ()
    result = run(main, "mamba-tiny", *QUANTIZE, "--pretrained_dir", "p", "--output_subdir", "S", *given)
    assert result.exit_code == 0, result.output
    assert [path.parent.relative_to(here).as_posix() for path in here.glob("p/**/config.json")] == [
        f"p/S/{folder}/quamba-tiny-w8a8"
    ]


def test_without_a_folder_nothing_is_stored(run: Run, here: Path) -> None:
    before = sorted(here.iterdir())
    result = run(main, "mamba2-tiny", *QUANTIZE, "--w_bits", 4, "--a_bits", 16)
    assert result.exit_code == 0, result.output
    assert "kept in memory only" in result.stderr
    assert "--calib_data is ignored" in result.stderr
    assert sorted(here.iterdir()) == before


def test_hybrid_blocks_are_stored_under_their_configuration(run: Run, here: Path) -> None:
    (here / "mix.json").write_text('["W4A8", "W4A16"]')
    hybrid = ("--hybrid_blocks", "--hybrid_blocks_config", "mix.json", "--group_heads")
    result = run(main, "mamba2-tiny", *QUANTIZE, *hybrid, "--pretrained_dir", "p", *PPL)
    assert result.exit_code == 0, result.output
    assert (here / "p" / "ut-enyac" / "quamba2-tiny-w4aX-mix" / "model.safetensors").is_file()


def test_quantize_is_ignored_for_a_quantized_model(run: Run, here: Path) -> None:
    assert run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p").exit_code == 0
    result = run(main, f"p/ut-enyac/{NAME}", "--quantize", "--w_bits", 4, *PPL)
    assert result.exit_code == 0, result.output
    assert "--quantize is ignored" in result.stderr


def test_calibrating_on_the_evaluation_text_is_refused(run: Run, refused: Refused, here: Path) -> None:
    (here / "copy.txt").write_text((here / "calib.txt").read_text())
    leaky = ("mamba2-tiny", *QUANTIZE, "--eval_ppl", "--ppl_dataset", "copy.txt", "--pretrained_dir", "p")
    assert "leaks into the evaluation text 'copy.txt'" in refused(main, *leaky)
    allowed = run(main, *leaky, "--allow_leak")
    assert allowed.exit_code == 0, allowed.output
    # The stored model remembers its calibration text.
    stored = ("--eval_ppl", "--ppl_dataset", "copy.txt", "--pretrained_dir", "p")
    assert "leaks into" in refused(main, NAME, *stored)
    assert run(main, NAME, *stored, "--allow_leak").exit_code == 0


def test_testing_scores_at_most_100_windows(run: Run, here: Path) -> None:
    (here / "long.txt").write_text("the sea and the ship " * 6000)
    result = run(
        main, "mamba2-tiny", "--eval_ppl", "--ppl_dataset", "long.txt", "--testing", "--batch_size", 50
    )
    assert result.exit_code == 0, result.output
    assert "long.txt: the first 100 windows of 1,024 tokens, 102,300 tokens scored" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mamba2-tiny",), "There is nothing to do"),
        (("mamba2-tny", *PPL), "Did you mean 'mamba2-tiny'?"),
        (("mamba2-tiny", *PPL, "--fewshot", 3), "--fewshot has no effect alone, expected --eval_zero_shot"),
        (("mamba2-tiny", *PPL, "--task_list", "lambada_local"), "--task_list has no effect alone"),
        (("mamba2-tiny", "--eval_zero_shot", "--fewshot", 3), "--fewshot has no effect on --eval_zero_shot"),
        (("mamba2-tiny", "--eval_few_shot", "--fewshot", -1), "-1 is not in the range x>=0"),
        (("mamba2-tiny", "--eval_zero_shot", "--task_list", "a,,b"), "--task_list is 'a,,b', expected names"),
        (("mamba2-tiny", "--quantize", "--w_bits", 8, "--a_bits", 16), "is no supported pair"),
        (("mamba2-tiny", "--quantize", "--w_bits", 6), "'6' is not one of '4', '8'."),
        (("mamba2-tiny", "--quantize", "--state_dtype", "fp23"), "Did you mean 'fp32'?"),
        (("mamba2-tiny", "--quantise"), "Did you mean one of: '--quantize'"),
        (("mamba2-tiny", *QUANTIZE, "--percentile_alpha", 1.5), "percentile_alpha is 1.5, expected"),
        (("mamba2-tiny", *QUANTIZE, "--calib_data", "calibb.txt"), "Did you mean 'calib.txt'?"),
        (("mamba2-tiny", *QUANTIZE, "--calib_data_num", 10**6), "but 1000000 calibration samples were asked"),
        (("mamba2-tiny", *QUANTIZE, "--calib_data_num", 0), "0 is not in the range x>=1"),
        (("mamba2-tiny", *QUANTIZE, "--device", "gpu"), "The device is 'gpu', expected"),
        (("mamba2-tiny", *QUANTIZE, "--output_subdir", "S"), "--output_subdir needs --pretrained_dir"),
        (("mamba2-tiny", *QUANTIZE, "--hybrid_blocks"), "needs --hybrid_blocks_config FILE"),
        (("mamba2-tiny", *PPL, "--ppl_dataset", "wikitext3"), "Did you mean 'wikitext2'?"),
        (("mamba2-tiny", *PPL, "--log_dir", "eval.txt"), "is a file, expected a folder"),
        (("mamba2-tiny", *PPL, "--ppl_dataset", "sub/eval.txt"), "have the same name"),
        (("quamba-x-w8a8", *PPL), "give --pretrained_dir DIR"),
        (("ut-enyac/quamba-x-w8a8", *PPL), "is not in the local cache while the hub cannot be reached"),
    ],
)
def test_bad_arguments(refused: Refused, here: Path, arguments: tuple[object, ...], sentence: str) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "eval.txt").write_text("another text of the same name")
    assert sentence in refused(main, *arguments)


def test_a_crash_while_saving_leaves_nothing(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quamba.checkpoints.quantized as quantized

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized, "write_tensors", interrupted)
    result = run(main, "mamba2-tiny", *QUANTIZE, "--pretrained_dir", "p")
    assert result.exit_code == 130
    assert [path for path in here.glob("p/**/*") if path.is_file()] == []
    assert list(here.glob("p/ut-enyac/*")) + list(here.glob("p/ut-enyac/.*")) == []


def test_the_command_is_a_click_command() -> None:
    assert isinstance(main, click.Command)
