"""The published command lines: every flag of the four scripts with its published default, and whole lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from zoo_fixtures import BUNDLED, zoo_path

from quamba.cli.chat import command as chat
from quamba.cli.generate import command as generate
from quamba.cli.profile import command as profile
from quamba.cli.published import command as main
from quamba.profiling import machine

Run = Callable[..., Result]

SHARED: dict[str, Any] = {
    "quantize": False,
    "calib_data_num": 512,
    "calib_seqlen": 512,
    "pretrained_dir": None,
    "group_heads": False,
    "quantize_embedding": False,
    "quantize_lm_head": False,
    "apply_gptq": False,
    "w_bits": 8,
    "a_bits": 8,
    "hybrid_blocks": False,
    "hybrid_blocks_config": None,
}
SAMPLING: dict[str, Any] = {"temperature": 1.0, "topk": 1, "topp": 1.0, "minp": 0.0}
# Where the default here is another one, this one stands: a batch size by memory, several texts, a choice of
# the graph by device, and a length of random prompts that is only one if it is given.
FLAGS: dict[str, tuple[click.Command, dict[str, Any]]] = {
    "main.py": (
        main,
        {
            "verbose": False,
            "batch_size": None,
            "task_list": "lambada_openai",
            "eval_zero_shot": False,
            "eval_few_shot": False,
            "eval_generation": False,
            "fewshot": 0,
            "testing": False,
            "eval_ppl": False,
            "ppl_dataset": ("wikitext2",),
            "log_dir": None,
        },
    ),
    "generate.py": (
        generate,
        {
            "prompt": None,
            "promptlen": None,
            "genlen": 100,
            **SAMPLING,
            "repetition_penalty": 1.0,
            "batch_size": None,
            "cache_graph": None,
            "streaming": False,
            "benchmark": False,
        },
    ),
    "chat.py": (
        chat,
        {**SAMPLING, "repetition_penalty": 1.2, "cache_graph": None, "use_testing_prompts": False},
    ),
    "profile_mamba.py": (
        profile,
        {
            "repeats": 100,
            "batch_size": 1,
            "prompt_len": 1024,
            "gen_len": 128,
            "size": False,
            "ttft": False,
            "tpot": False,
            "ttlt": False,
            "cache_graph": None,
            "torch_profile": None,
        },
    ),
}
VALUES = {
    "calib_data_num": 16,
    "calib_seqlen": 64,
    "pretrained_dir": "p",
    "w_bits": 4,
    "a_bits": 16,
    "hybrid_blocks_config": "mix.json",
    "batch_size": 16,
    "task_list": "lambada_openai,hellaswag,piqa",
    "fewshot": 5,
    "ppl_dataset": "pile",
    "log_dir": "logs",
    "prompt": "My cat",
    "promptlen": 7,
    "genlen": 9,
    "temperature": 0.7,
    "topk": 10,
    "topp": 0.9,
    "minp": 0.1,
    "repetition_penalty": 1.1,
    "repeats": 5,
    "prompt_len": 32,
    "gen_len": 8,
}
CASES = [pytest.param(command, {**SHARED, **flags}, id=script) for script, (command, flags) in FLAGS.items()]
LINES = {
    "zoo-w8a8": "--quantize --quantize_embedding --quantize_lm_head --group_heads --pretrained_dir p",
    "zoo-w4a8": "--quantize --w_bits 4 --a_bits 8 --apply_gptq --quantize_embedding --quantize_lm_head"
    " --group_heads --pretrained_dir p --batch_size 16 --eval_zero_shot --task_list lambada_openai",
    "zoo-w4a16": "--quantize --w_bits 4 --a_bits 16 --apply_gptq --quantize_embedding --quantize_lm_head"
    " --pretrained_dir p --batch_size 16 --eval_zero_shot --task_list lambada_openai --log_dir ./logs",
    "fp16": "--batch_size 16 --eval_zero_shot --task_list lambada_openai --pretrained_dir p --log_dir ./logs",
    "generation": "--eval_generation --fewshot 5 --task_list nq_open,squadv2 --batch_size 1 --verbose",
    "few-shot": "--eval_few_shot --fewshot 5 --task_list mmlu --testing",
    "hybrid": "--quantize --hybrid_blocks --hybrid_blocks_config configs/mix.json --apply_gptq --group_heads",
}


def parsed(command: click.Command, *arguments: str) -> dict[str, Any]:
    return command.make_context("script", [*arguments]).params


@pytest.mark.parametrize(("command", "flags"), CASES)
def test_defaults(command: click.Command, flags: dict[str, Any]) -> None:
    found = parsed(command, "state-spaces/mamba-130m")
    assert found["model"] == "state-spaces/mamba-130m"
    assert {name: found[name] for name in flags} == flags


@pytest.mark.parametrize(("command", "flags"), CASES)
def test_every_flag_arrives(command: click.Command, flags: dict[str, Any]) -> None:
    """Alone, after the model and before it."""
    for name in flags:
        value = VALUES.get(name)
        given = (f"--{name}",) if value is None else (f"--{name}", str(value))
        expected: Any = (value,) if name == "ppl_dataset" else value
        if name == "torch_profile":
            expected = "torch_profile"
        found = parsed(command, "m", *given)
        assert found[name] == (True if expected is None else expected), name
        if value is not None:
            assert parsed(command, *given, "m")[name] == found[name]


def test_the_model_of_chat() -> None:
    assert parsed(chat)["model"] == "havenhq/mamba-chat"


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_lines_of_main(line: str) -> None:
    found = parsed(main, "state-spaces/mamba2-130m", *line.split())
    given = {word[2:] for word in line.split() if word.startswith("--")}
    assert all(found[name] not in (None, False) for name in given)


def test_traces_without_a_folder() -> None:
    assert parsed(profile, "m", "--torch_profile", "--ttft")["torch_profile"] == "torch_profile"
    assert parsed(profile, "m", "--torch_profile", "there", "--ttft")["torch_profile"] == "there"


@pytest.fixture
def zoo(here: Path, repo_root: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder with a published file and its tokenizer as ``p/ut-enyac/NAME``."""
    name = BUNDLED[0]
    folder = here / "p" / "ut-enyac" / name
    (here / "eval.txt").write_text("The sea was calm and the captain slept. " * 200)
    shutil.copytree(zoo_path(repo_root, name), folder)
    shutil.copy(assets / "models" / "mamba2-demo" / "tokenizer.json", folder)
    monkeypatch.setattr(machine, "copy_bytes", lambda device: 1 << 16)
    return here


@pytest.mark.parametrize(
    ("command", "line", "shown"),
    [
        (
            main,
            "--quantize --eval_ppl --ppl_dataset eval.txt --testing --batch_size 4 --log_dir logs",
            "perplexity",
        ),
        (
            generate,
            "--prompt sea --topk 10 --topp 0.9 --temperature 0.7 --genlen 3 --streaming",
            "sea",
        ),
        (
            generate,
            "--promptlen 4 --batch_size 2 --genlen 2 --benchmark --repeats 1 --cache_graph",
            "decode, tok",
        ),
        (
            chat,
            "--use_testing_prompts --cache_graph --topk 3 --template zephyr --genlen 2",
            "> Explain in two",
        ),
        (
            profile,
            "--size --ttft --tpot --ttlt --prompt_len 4 --gen_len 2 --repeats 1 --torch_profile",
            "weights: total",
        ),
    ],
    ids=["main.py", "generate.py", "generate.py-benchmark", "chat.py", "profile_mamba.py"],
)
def test_whole_lines_on_a_published_file(
    run: Run, zoo: Path, command: click.Command, line: str, shown: str
) -> None:
    result = run(command, f"ut-enyac/{BUNDLED[0]}", "--pretrained_dir", "p", "--device", "cpu", *line.split())
    assert result.exit_code == 0, result.output
    assert shown in result.stdout
    if command is main:
        (log,) = (zoo / "logs").iterdir()
        assert log.name.startswith(BUNDLED[0]) and json.loads(log.read_text())["ppl"]["eval.txt"] > 1
    if command is profile:
        assert list((zoo / "torch_profile").iterdir())
