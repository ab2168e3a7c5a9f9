"""quamba generate: where prompts come from, what is printed, how it is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import quamba
import quamba.cli.memory as memory
import quamba.quantization.memory as system
from quamba.cli.generation import Rows, benchmark
from quamba.cli.main import main
from quamba.runtime.generate import Generation
from quamba.runtime.sampling import SamplingParams

Run = Callable[..., Result]
Refused = Callable[..., str]
LINES = ["the sea", "Über allen Gipfeln", "a ship"]


@pytest.fixture
def prompts(here: Path) -> Path:
    """The working folder with ``prompts.txt``: a byte order mark, blank lines, a line end of two bytes."""
    text = f"{LINES[0]}\n\n{LINES[1]}\r\n   \n{LINES[2]}\n"
    (here / "prompts.txt").write_bytes(text.encode("utf-8-sig"))
    return here


def generate(run: Run, *arguments: object) -> dict[str, Any]:
    """The JSON of one run of the tiny Mamba2."""
    result = run(main, "generate", "mamba2-tiny", "--genlen", 6, "--device", "cpu", *arguments, "--json")
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_a_line_a_prompt(run: Run, prompts: Path) -> None:
    found = generate(run, "--prompt_file", "prompts.txt", "--batch_size", 2)["generations"]
    assert [generation["prompt"] for generation in found] == LINES
    model = quamba.load("mamba2-tiny")
    for prompt, generation in zip(LINES, found, strict=True):
        alone = model.generate(prompt, max_new_tokens=6)[0]
        assert (generation["text"], generation["ids"]) == (alone.text, alone.ids)
        assert (generation["prompt_ids"], generation["finished"]) == (alone.prompt_ids, "length")


def test_printed_in_order(run: Run, prompts: Path) -> None:
    result = run(main, "generate", "mamba2-tiny", "--genlen", 3, "--prompt_file", "prompts.txt")
    model = quamba.load("mamba2-tiny")
    texts = [line + model.generate(line, max_new_tokens=3)[0].text for line in LINES]
    assert result.stdout == "\n\n".join(texts) + "\n"


def test_standard_input(prompts: Path) -> None:
    arguments = ["generate", "mamba2-tiny", "--genlen", "3", "--prompt_file", "-", "--json"]
    result = CliRunner().invoke(main, arguments, input=(prompts / "prompts.txt").read_bytes())
    assert result.exit_code == 0, result.output
    assert [generation["prompt"] for generation in json.loads(result.stdout)["generations"]] == LINES


def test_several_of_each_prompt(run: Run, prompts: Path) -> None:
    draws = ("--topk", 0, "--temperature", 30, "--num_return", 3)
    found = generate(run, "--prompt_file", "prompts.txt", *draws, "--batch_size", 4)["generations"]
    assert [generation["prompt"] for generation in found] == [line for line in LINES for _ in range(3)]
    assert len({tuple(generation["ids"]) for generation in found}) == 9
    again = generate(run, "--prompt_file", "prompts.txt", *draws, "--batch_size", 4)["generations"]
    assert again == found
    other = generate(run, "--prompt_file", "prompts.txt", *draws, "--batch_size", 4, "--seed", 3)
    assert other["generations"] != found


def test_batches_draw_differently(run: Run, here: Path) -> None:
    (here / "one.txt").write_text("the sea")
    draws = ("--topk", 0, "--temperature", 30, "--num_return", 6, "--batch_size", 2)
    found = generate(run, "--prompt_file", "one.txt", *draws)["generations"]
    assert len({tuple(generation["ids"]) for generation in found}) == 6


def test_several_greedy_ones_are_the_same(run: Run, here: Path) -> None:
    result = run(main, "generate", "mamba2-tiny", "--genlen", 3, "--num_return", 2)
    assert "The choice is greedy, so all continuations of a prompt are the same" in result.stderr
    first, second = result.stdout.rstrip("\n").split("\n\n")
    assert first == second


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["whole", "streaming"])
def test_stop_texts(run: Run, here: Path, streaming: tuple[str, ...]) -> None:
    text = quamba.load("mamba2-tiny").generate("the sea", max_new_tokens=12)[0].text
    stop = text[5:7]
    arguments = (
        "generate",
        "mamba2-tiny",
        "--prompt",
        "the sea",
        "--genlen",
        12,
        "--stop",
        "zzz",
        "--stop",
        stop,
    )
    result = run(main, *arguments, *streaming)
    assert result.stdout == f"the sea{text[: text.index(stop)]}\n"


def test_what_json_says(run: Run, here: Path) -> None:
    sampling = ("--topk", 5, "--topp", 0.9, "--minp", 0.1, "--temperature", 2, "--repetition_penalty", 1.1)
    record = generate(run, "--prompt", "the sea", *sampling, "--seed", 7)
    assert SamplingParams(**record["sampling"]) == SamplingParams(2.0, 5, 0.9, 0.1, 1.1)
    assert (record["seed"], record["device"], record["recipe"]) == (7, "cpu", None)
    timings = record["timings"]
    assert (timings["prompt_tokens"], timings["new_tokens"]) == (7, 6)
    assert timings["prefill_tokens_per_s"] == pytest.approx(7 / timings["prefill_seconds"])
    assert timings["decode_tokens_per_s"] == pytest.approx(5 / timings["decode_seconds"])
    assert record["benchmark"] is None


def test_random_prompts_as_json(run: Run, here: Path) -> None:
    found = generate(run, "--promptlen", 4, "--batch_size", 2)["generations"]
    assert [generation["prompt"] for generation in found] == [None, None]
    assert [len(generation["prompt_ids"]) for generation in found] == [4, 4]
    assert found[0]["prompt_ids"] != found[1]["prompt_ids"]


def test_the_benchmark(run: Run, here: Path) -> None:
    found = generate(run, "--prompt", "the sea", "--benchmark", "--repeats", 3)["benchmark"]
    assert (found["repeats"], found["warmups"], found["prompt_tokens"], found["new_tokens"]) == (3, 1, 7, 6)
    for name in ("total_ms", "prefill_ms", "decode_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert 0 < found[name]["p5"] <= found[name]["median"] <= found[name]["p95"]


def test_one_new_token_has_no_decoding(run: Run, here: Path) -> None:
    result = run(main, "generate", "mamba2-tiny", "--genlen", 1, "--benchmark", "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "prefill, tokens/s" in result.stdout
    assert "decode, tokens/s" not in result.stdout


def test_benchmark_by_hand() -> None:
    """Three rows in batches of two: 4 + 2 prompt tokens; seconds of the batches are added."""
    prefills = iter([9.0, 9.0, 1.0, 2.0, 2.0, 2.0])  # of the untimed run first

    def fake(prompts: list[list[int]], *, seed: int) -> list[Generation]:
        seconds = next(prefills)
        return [Generation(ids, [1, 2], "", "length", seconds, 0.5, 2 * len(prompts)) for ids in prompts]

    found = benchmark(Rows([[1, 2], [3, 4], [5, 6]], 2, 0, fake), repeats=2, warmups=1)
    assert (found["prompt_tokens"], found["new_tokens"], found["warmups"]) == (6, 6, 2)
    assert found["prefill_ms"]["median"] == 3500
    assert found["decode_ms"]["p95"] == 1000
    assert found["prefill_tokens_per_s"]["median"] == pytest.approx((6 / 3 + 6 / 4) / 2)
    assert found["decode_tokens_per_s"]["p5"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prompt", ""), "--prompt is empty, expected some text."),
        (("--stop", ""), "--stop is empty"),
        (
            ("--prompt_file", "nothing.txt"),
            "'nothing.txt' cannot be read (No such file or directory), expected",
        ),
        (("--prompt_file", "mamba2-tiny"), "'mamba2-tiny' cannot be read (Is a directory)"),
        (("--prompt_file", "mamba2-tiny/model.safetensors"), "is not UTF-8 text (byte "),
        (("--prompt_file", "blank.txt"), "'blank.txt' has no prompt in it, expected one a line."),
        (("--prompt", "a", "--prompt_file", "b"), "--prompt and --prompt_file exclude each other"),
        (("--promptlen", 2, "--prompt_file", "b"), "--prompt_file and --promptlen exclude each other"),
        (("--streaming", "--json"), "--streaming and --json exclude each other"),
        (("--streaming", "--num_return", 2), "--streaming prints one continuation, not 2"),
    ],
)
def test_bad_arguments(refused: Refused, here: Path, arguments: tuple[object, ...], sentence: str) -> None:
    (here / "blank.txt").write_text("\n  \n")
    assert sentence in refused(main, "generate", "mamba2-tiny", *arguments)


@pytest.mark.skipif(not system._MEMINFO.exists(), reason="reads how much memory is free from /proc/meminfo")
def test_prompts_that_no_memory_holds(refused: Refused, here: Path) -> None:
    sentence = refused(main, "generate", "mamba2-tiny", "--promptlen", 10**13)
    assert sentence.startswith("--promptlen 10000000000000 needs at least 447,034.8 GiB for 1 prompt, and ")
    profiled = refused(main, "profile", "mamba2-tiny", "--ttft", "--prompt_len", 10**12, "--batch_size", 10)
    assert profiled.startswith("--prompt_len 1000000000000 needs at least 447,034.8 GiB for 10 prompts, and ")


def test_no_prompt_on_standard_input(refused: Refused, here: Path) -> None:
    assert "Standard input has no prompt in it" in refused(
        main, "generate", "mamba2-tiny", "--prompt_file", "-"
    )


def test_memory_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "_MEMINFO", tmp_path / "meminfo")
    assert system.free_bytes() is None
    memory.check_prompt_memory(1, 10**15, "--promptlen")
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    480 kB\n")
    assert system.free_bytes() == 480 * 1024
    memory.check_prompt_memory(2, 5120, "--promptlen")
    with pytest.raises(quamba.QuambaError, match="expected at most 5,120 tokens"):
        memory.check_prompt_memory(2, 5121, "--promptlen")


def test_bytes_of_the_command_line_that_are_no_text(repo_root: Path, here: Path) -> None:
    script = os.fsencode(repo_root / "generate.py")
    command = [os.fsencode(sys.executable), script, b"mamba2-tiny", b"--prompt", b"a\xffb", b"--genlen", b"2"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a\ufffdb".encode())
