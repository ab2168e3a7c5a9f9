"""main.py and generate.py as the user runs them, with the package not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUANTIZE = ("--quantize", "--calib_data", "calib.txt", "--calib_data_num", "4", "--calib_seqlen", "32")


def _start(repo_root: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, str(repo_root / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def _run(repo_root: Path, script: str, *arguments: str) -> tuple[int, str, str]:
    process = _start(repo_root, script, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def test_quantize_then_generate(repo_root: Path, here: Path) -> None:
    flags = (*QUANTIZE, "--w_bits", "4", "--pretrained_dir", "p")
    status, stdout, stderr = _run(repo_root, "main.py", "mamba2-tiny", *flags)
    assert status == 0, stderr
    assert "Stored in 'p/ut-enyac/quamba2-tiny-w4a8'." in stdout
    status, stdout, stderr = _run(
        repo_root,
        "generate.py",
        "mamba2-tiny",
        *flags,
        "--prompt",
        "the sea",
        "--genlen",
        "4",
        "--cache_graph",
    )
    assert status == 0, stderr
    assert "Using the stored model" in stderr
    assert stdout.startswith("the sea")


@pytest.mark.parametrize("script", ["main.py", "generate.py"])
def test_bad_input_has_no_traceback(repo_root: Path, here: Path, script: str) -> None:
    status, stdout, stderr = _run(repo_root, script, "mamba2-tny", "--quantize")
    assert (status, stdout) == (2, "")
    assert stderr.splitlines() == [
        "Error: Folder 'mamba2-tny' was not found, expected a folder or a hub id 'owner/name'."
        " Did you mean 'mamba2-tiny'?"
    ]


def test_control_c_leaves_nothing(repo_root: Path, here: Path) -> None:
    # Enough calibration that the interrupt comes while it runs.
    many = ("--calib_data_num", "100", "--w_bits", "4", "--apply_gptq")
    process = _start(repo_root, "main.py", "mamba-tiny", *QUANTIZE, *many, "--pretrained_dir", "p")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Calibrating on 100 samples")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not list(here.glob("p/**/*"))


EVAL = (
    "--batch_size 16 --eval_zero_shot --task_list lambada_openai --pretrained_dir ./pretrained_models"
    " --log_dir logs"
)
QUANTIZED = "--quantize --quantize_embedding --quantize_lm_head"


def _eval(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``eval.sh`` with a Python that only tells how it was called."""
    return subprocess.run(
        ["bash", str(repo_root / "eval.sh"), *arguments],
        env={**os.environ, "PYTHON": "echo"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (("mamba-130m",), EVAL),
        (("mamba2-2.7b", "fp16"), EVAL),
        (("mamba-130m", "w8a8"), f"{EVAL} {QUANTIZED} --w_bits 8 --a_bits 8"),
        (("mamba2-2.7b", "w8a8"), f"{EVAL} {QUANTIZED} --w_bits 8 --a_bits 8 --group_heads"),
        (("mamba2-2.7b", "w4a8"), f"{EVAL} {QUANTIZED} --w_bits 4 --a_bits 8 --apply_gptq --group_heads"),
        (("mamba-2.8b", "w4a16"), f"{EVAL} {QUANTIZED} --w_bits 4 --a_bits 16 --apply_gptq"),
        (("mamba-130m", "fp16", "--testing"), f"{EVAL} --testing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_eval_script(repo_root: Path, arguments: tuple[str, ...], flags: str) -> None:
    done = _eval(repo_root, *arguments)
    script, *words = done.stdout.split()
    assert script == str(repo_root / "main.py") and words == [arguments[0], *flags.split()], done.stderr
    for word in words:
        assert not word.startswith("--") or word in _main_flags(), word


def _main_flags() -> set[str]:
    from quamba.cli.published import command

    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((), "There is no MODEL, expected: "), (("m", "w3a3"), "The precision is 'w3a3', expected: ")],
    ids=["nothing", "precision"],
)
def test_eval_script_is_told_too_little(repo_root: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = _eval(repo_root, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(sentence) and len(done.stderr.splitlines()) == 1
