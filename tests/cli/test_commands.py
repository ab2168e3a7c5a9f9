"""quamba quantize, evaluate, generate, inspect, recipes."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import quamba
from quamba.cli.main import main
from quamba.kernels.cpu import library
from quamba.kernels.registry import REFERENCE, Kernels
from quamba.recipes.recipe import shipped_names

Run = Callable[..., Result]
Refused = Callable[..., str]
QUANTIZE = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32, "--device", "cpu")

W8A8 = ("quantize", "mamba2-tiny", "--recipe", "w8a8")
EVALUATE = ("evaluate", "mamba2-tiny", "--ppl_dataset", "eval.txt")


@pytest.fixture
def small(run: Run, here: Path) -> Path:
    result = run(main, "quantize", "mamba2-tiny", "--recipe", "w4a8", "-o", "small", *QUANTIZE)
    assert result.exit_code == 0, result.output
    assert "loss, GPTQ" in result.stdout
    assert "layers.1.mixer.out_proj" in result.stdout
    assert "Saved to 'small'." in result.stdout
    return here / "small"


def test_quantize_saves_what_the_library_would(small: Path) -> None:
    model = quamba.load(small)
    assert model.recipe == quamba.load_recipe("w4a8")
    assert model.report is not None
    assert (model.report.calibration["source"], model.report.calibration["num"]) == ("calib.txt", 4)


def test_quantize_says_what_a_gpu_needed(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("quantize", "mamba2-tiny", "--recipe", "w8a8", "-o", "out", *QUANTIZE, "--force")
    assert "GPU" not in run(main, *arguments).stdout
    monkeypatch.setattr("quamba.quantization.pipeline.peak_memory_bytes", lambda device: 3 << 29)
    assert "GiB, 1.5 GiB on the GPU." in run(main, *arguments).stdout
    assert json.loads(run(main, *arguments, "--json").stdout)["peak_gpu_bytes"] == 3 << 29


@pytest.mark.parametrize("recipe", shipped_names())
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_every_shipped_recipe(run: Run, here: Path, recipe: str, family: str) -> None:
    arguments = (f"{family}-tiny", "--recipe", recipe, "-o", "out", *QUANTIZE)
    result = run(main, "quantize", *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["folder"] == "out"
    assert report["recipe"]["name"] == recipe
    assert report["size_mib"] < report["size_before_mib"]
    assert quamba.load(here / "out").recipe == quamba.load_recipe(recipe)


def test_options_change_the_recipe(run: Run, here: Path) -> None:
    (here / "mine.toml").write_text('name = "mine"\nblocks = "W4A8"\nsolver = { kind = "gptq" }\n')
    changes = ("--solver", "rtn", "--state_dtype", "fp32", "--percentile_alpha", 0.99)
    result = run(main, "quantize", "mamba2-tiny", "--recipe", "mine.toml", "-o", "out", *QUANTIZE, *changes)
    assert result.exit_code == 0, result.output
    recipe = quamba.load(here / "out").recipe
    assert recipe is not None
    assert (recipe.solver.kind, recipe.blocks.state, recipe.percentile_alpha) == ("rtn", "fp32", 0.99)
    assert "loss" not in result.stdout


def test_force_replaces_a_model(run: Run, refused: Refused, small: Path) -> None:
    again = ("quantize", "mamba2-tiny", "--recipe", "w8a8", "-o", "small", *QUANTIZE)
    assert "--force replaces a model" in refused(main, *again)
    assert run(main, *again, "--force").exit_code == 0
    assert quamba.load(small).recipe == quamba.load_recipe("w8a8")


def test_evaluate_says_what_it_scored(run: Run, small: Path) -> None:
    arguments = ("evaluate", "small", "--ppl_dataset", "eval.txt", "--seqlen", 100, "--max_windows", 3)
    result = run(main, *arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "eval.txt: the first 3 windows of 100 tokens, 297 tokens scored (mean over" in result.stdout
    as_json = json.loads(run(main, *arguments, "--json", "--log_dir", "logs").stdout)
    assert as_json["scored"]["eval.txt"]["tokens_scored"] == 297
    (log,) = (small.parent / "logs").iterdir()
    assert log.name.startswith("small-")
    assert json.loads(log.read_text())["ppl"] == as_json["ppl"]


def test_the_batch_size_does_not_change_the_perplexity(run: Run, here: Path) -> None:
    arguments = ("evaluate", "mamba-tiny", "--ppl_dataset", "eval.txt", "--seqlen", 64, "--json")
    values = [
        json.loads(run(main, *arguments, "--batch_size", size).stdout)["ppl"]["eval.txt"] for size in (1, 7)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_several_texts(run: Run, here: Path) -> None:
    texts = ("--ppl_dataset", "eval.txt", "--ppl_dataset", "calib.txt")
    result = run(main, "evaluate", "mamba2-tiny", *texts, "--json")
    assert list(json.loads(result.stdout)["ppl"]) == ["eval.txt", "calib.txt"]


def test_evaluating_on_the_calibration_text_is_refused(refused: Refused, small: Path) -> None:
    assert "--allow_leak" in refused(main, "evaluate", "small", "--ppl_dataset", "calib.txt")


def test_generate_prints_prompt_and_continuation(run: Run, here: Path) -> None:
    result = run(main, "generate", "mamba2-tiny", "--prompt", "the sea", "--genlen", 12)
    assert result.exit_code == 0, result.output
    expected = quamba.load("mamba2-tiny").generate("the sea", max_new_tokens=12)[0]
    assert result.stdout == f"the sea{expected.text}\n"
    assert "7 prompt tokens, 12 new tokens" in result.stderr


def test_streaming_prints_the_same(run: Run, small: Path) -> None:
    sampling = ("--topk", 20, "--topp", 0.9, "--temperature", 9, "--repetition_penalty", 1.2, "--seed", 3)
    arguments = ("generate", "small", "--prompt", "the sea", "--genlen", 20, *sampling)
    plain, streamed = run(main, *arguments), run(main, *arguments, "--streaming")
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == streamed.stdout
    assert plain.stdout == run(main, *arguments).stdout
    assert plain.stdout != run(main, *arguments[:-1], 4).stdout


def test_generate_quantizes_first(run: Run, here: Path) -> None:
    flags = ("--quantize", "--w_bits", 4, "--pretrained_dir", "p", *QUANTIZE)
    first = run(main, "generate", "mamba2-tiny", "--genlen", 5, *flags)
    assert first.exit_code == 0, first.output
    second = run(main, "generate", "mamba2-tiny", "--genlen", 5, *flags)
    assert "Using the stored model" in second.stderr
    by_name = run(main, "generate", "quamba2-tiny-w4a8", "--genlen", 5, "--pretrained_dir", "p")
    assert first.stdout == second.stdout == by_name.stdout


def test_random_prompts_benchmark_and_graph_note(run: Run, here: Path) -> None:
    arguments = ("--promptlen", 5, "--batch_size", 2, "--genlen", 3, "--benchmark", "--repeats", 2)
    result = run(main, "generate", "mamba-tiny", *arguments, "--cache_graph", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "10 prompt tokens, 6 new tokens" in result.stderr
    assert "\n2 runs after 1 untimed on cpu, each of 10 prompt tokens and 6 new ones:\n" in result.stdout
    assert "--cache_graph has no effect on a CPU." in result.stderr.splitlines()


def test_inspect_needs_no_weights(run: Run, small: Path) -> None:
    size = (small / "model.safetensors").stat().st_size
    (small / "model.safetensors").unlink()
    result = run(main, "inspect", "small", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["recipe"], shown["source"]) == ("w4a8", "mamba2-tiny")
    assert [row["part"] for row in shown["plan"]] == ["embedding", "blocks 0-1", "head"]
    assert (
        shown["plan"][1]["weights"]
        == "in_proj, out_proj: int4 group 128, whole multiples; conv1d: int8 channel"
    )
    # The file holds the same tensors and a header.
    assert 0 < size - sum(row["bytes"] for row in shown["plan"]) < 16384
    assert "4 x 4 groups" in run(main, "inspect", "small").stdout


def test_inspect_a_float_model(run: Run, here: Path) -> None:
    plain = json.loads(run(main, "inspect", "mamba-tiny", "--json").stdout)
    assert {row["precision"] for row in plain["plan"]} == {"", "FP16"}
    recipe = json.loads(run(main, "inspect", "mamba-tiny", "--recipe", "w4a16", "--json").stdout)
    assert recipe["plan"][1]["weights"] == (
        "in_proj, x_proj, out_proj: int4 group 128; dt_proj: int8 channel; conv1d: float"
    )
    assert recipe["size_mib"] < plain["size_mib"]


OPS = [field.name for field in dataclasses.fields(Kernels) if field.name != "name"]


@pytest.mark.skipif(not library.available(), reason="the CPU kernels are not built")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_inspect_says_what_every_op_runs_on(run: Run, here: Path, device: str) -> None:
    shown = json.loads(run(main, "inspect", "mamba-tiny", "--device", device, "--json").stdout)
    assert (shown["kernels"], shown["reason"]) == ("cpu", None)
    assert shown["ops"] == dict.fromkeys(OPS, "cpu")
    text = run(main, "inspect", "mamba-tiny", "--device", device).stdout
    assert f"Kernels on {device}: cpu.\nA step of decoding: one call of " in text
    assert [line.split() for line in text.splitlines()[-len(OPS) :]] == [[op, "cpu"] for op in OPS]


def test_inspect_says_why_the_kernels_are_slow(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "they are not here")
    shown = json.loads(run(main, "inspect", "mamba-tiny", "--device", "cpu", "--json").stdout)
    assert (shown["kernels"], shown["ops"]) == ("reference", dict.fromkeys(OPS, "reference"))
    assert shown["reason"] == "The compiled CPU kernels do not run on 'cpu': they are not here."
    text = run(main, "inspect", "mamba-tiny", "--device", "cpu").stdout
    assert f"Kernels on cpu: reference. {shown['reason']}\nA step of decoding: op by op." in text
    if torch.cuda.is_available():
        return
    absent = json.loads(run(main, "inspect", "mamba-tiny", "--device", "cuda", "--json").stdout)
    assert absent["reason"].endswith("and torch sees none here.")


def test_inspect_tells_backends_apart(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By where each function is from."""
    fast = types.FunctionType(REFERENCE.linear.__code__, {"__name__": "quamba.kernels.triton.linear"})
    mixed = dataclasses.replace(REFERENCE, name="triton", linear=fast)
    monkeypatch.setattr("quamba.kernels.registry.why_not_fast", lambda device: None)
    monkeypatch.setattr("quamba.kernels.registry.choose_kernels", lambda device, backend="auto": mixed)
    shown = json.loads(run(main, "inspect", "mamba-tiny", "--device", "cpu", "--json").stdout)
    assert (shown["kernels"], shown["reason"]) == ("triton", None)
    assert shown["ops"] == {op: "triton" if op == "linear" else "reference" for op in shown["ops"]}
    text = run(main, "inspect", "mamba-tiny", "--device", "cpu").stdout
    assert (
        "Kernels on cpu: triton.\nA step of decoding: fused, 6 launches a block, for up to 4 sequences.\n"
        in text
    )


def test_inspect_without_a_device_speaks_of_no_kernels(run: Run, here: Path) -> None:
    assert json.loads(run(main, "inspect", "mamba-tiny", "--json").stdout)["kernels"] is None
    assert "Kernels" not in run(main, "inspect", "mamba-tiny").stdout


def test_inspect_a_recipe(run: Run, here: Path) -> None:
    assert json.loads(run(main, "inspect", "--recipe", "w4a8", "--json").stdout)["name"] == "w4a8"


def test_recipes_lists_what_ships(run: Run) -> None:
    lines = json.loads(run(main, "recipes", "--json").stdout)
    assert list(lines) == shipped_names()
    assert all(lines.values())
    assert all(name in run(main, "recipes").stdout for name in shipped_names())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("quantise",), "Did you mean 'quantize'?"),
        (("quantize", "mamba2-tiny"), "Missing option '--recipe'."),
        (("quantize", "mamba2-tiny", "--recipe", "w4a9", "-o", "x"), "Did you mean 'w4a8'?"),
        (("quantize", "mamba2-tiny", "--recipe", "no.toml", "-o", "x"), "'no.toml' does not exist"),
        ((*W8A8, "-o", "eval.txt"), "is a file, expected a folder"),
        (("quantize", "mamba2", "--recipe", "w8a8", "-o", "x"), "Did you mean 'mamba2-tiny'?"),
        ((*W8A8, "-o", "x", "--solver", "gptk"), "Did you mean 'gptq'?"),
        ((*EVALUATE, "--seqlen", 1), "1 is not in the range"),
        (
            (*EVALUATE, "--seqlen", 10**6),
            "fewer than one window",
        ),
        (("evaluate", "mamba2-tiny", "--ppl_dataset", "evil.txt"), "Did you mean 'eval.txt'?"),
        (("generate", "mamba2-tiny", "--topp", 0), "top_p is 0.0, expected"),
        (("generate", "mamba2-tiny", "--genlen", 0), "0 is not in the range x>=1"),
        (("generate", "mamba2-tiny", "--prompt", "a", "--promptlen", 3), "exclude each other"),
        (("generate", "mamba2-tiny", "--streaming", "--batch_size", 2), "prints one continuation, not 2"),
        (("inspect",), "There is nothing to inspect"),
        (("inspect", "mamba2-tiny", "--device", "gpu"), "The device is 'gpu', expected 'auto', 'cpu'"),
        (("inspect", "mamba2-tiny", "--recipe", "w4a9"), "Did you mean 'w4a8'?"),
        (("demo", "--assets", "mamba2-tiny"), "expected the assets folder"),
    ],
)
def test_bad_arguments(refused: Refused, arguments: tuple[object, ...], sentence: str) -> None:
    assert sentence in refused(main, *arguments)


def test_a_model_without_a_tokenizer(refused: Refused, run: Run, here: Path) -> None:
    bare = here / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to((here / "mamba2-tiny" / name).resolve())
    assert "no tokenizer" in refused(main, "generate", "bare")
    assert "needs a tokenizer" in refused(main, "evaluate", "bare", "--ppl_dataset", "eval.txt")
    quantize = ("quantize", "bare", "--recipe", "w8a8", "-o", "x", *QUANTIZE)
    assert "Calibration needs a tokenizer" in refused(main, *quantize)
    random_ids = run(main, "generate", "bare", "--promptlen", 3, "--genlen", 4)
    assert random_ids.exit_code == 0, random_ids.output
    assert len(random_ids.stdout.split()) == 7
