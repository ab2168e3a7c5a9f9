"""quamba profile on tiny models: what is printed, kept and refused. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import quamba
from quamba.cli.main import main
from quamba.profiling import machine, plot

Run = Callable[..., Result]
Refused = Callable[..., str]
SHORT = ("--prompt_len", 6, "--gen_len", 3, "--repeats", 2, "--device", "cpu")
QUANTIZE = ("--quantize", "--w_bits", 4, "--apply_gptq", "--quantize_embedding", "--quantize_lm_head")
CALIBRATION = ("--calib_data", "calib.txt", "--calib_data_num", 4, "--calib_seqlen", 32)


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "copy_bytes", lambda device: 1 << 16)


@pytest.fixture
def small(run: Run, here: Path) -> Path:
    """``small``, a W8A8 model made of ``mamba2-tiny``."""
    arguments = (
        "quantize",
        "mamba2-tiny",
        "--recipe",
        "w8a8",
        "-o",
        "small",
        *CALIBRATION,
        "--device",
        "cpu",
    )
    result = run(main, *arguments)
    assert result.exit_code == 0, result.output
    return here / "small"


def profiled(run: Run, *arguments: object) -> dict[str, Any]:
    result = run(main, "profile", *arguments, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_no_mode_means_all(run: Run, here: Path) -> None:
    result = run(main, "profile", "mamba2-tiny", *SHORT)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("mamba2-tiny: float32 on cpu (")
    assert [line.split()[0] for line in lines if line.startswith("tt") or line.startswith("tpot")] == [
        "ttft",
        "tpot",
        "ttlt",
    ]
    for opening in (
        "weights: total ",
        "Prefill: ",
        "Decode step: ",
        "Peak memory: ",
        "The head is the embed",
    ):
        assert sum(line.startswith(opening) for line in lines) == 1, opening
    assert "Batch 1, prompts of 6 random tokens, 3 new tokens in ttlt:" in lines
    assert "weights: head" not in result.stdout  # no line of zeros
    assert result.stderr == ""


def test_json_holds_the_same_for_machines(run: Run, here: Path) -> None:
    record = profiled(run, "mamba-tiny", "--batch_size", 2)
    assert (record["model"], record["precision"], record["compare"]) == ("mamba-tiny", "float32", None)
    assert record["size"]["weights_bytes"]["total"] == quamba.load("mamba-tiny").size_bytes
    assert record["size"]["cache_bytes"] == 2 * record["size"]["cache_bytes_per_sequence"]["total"]
    tokens = {mode: latency["tokens_per_run"] for mode, latency in record["latency"].items()}
    assert tokens == {"ttft": 12, "tpot": 2, "ttlt": 6}
    assert record["prefill_arithmetic"]["integer_share"] == 0
    assert record["spec"]["seed"] == 1234


def test_the_size_adds_up_to_the_file(run: Run, small: Path) -> None:
    path = small / "model.safetensors"
    file = profiled(run, "small", "--size")["file"]
    assert file["total_bytes"] == path.stat().st_size
    assert file["weights_bytes"]["total"] + file["header_bytes"] == file["total_bytes"]
    size, weights = path.stat().st_size, quamba.load("small").size_bytes
    printed = run(main, "profile", "small", "--size", "--device", "cpu").stdout
    line = f"The file: {size:,} bytes = {weights:,} of the weights above + {size - weights:,} of header."
    assert line in printed.splitlines()
    in_memory = profiled(run, "mamba2-tiny", "--size", "--quantize", *CALIBRATION)
    assert "file" not in in_memory


@pytest.mark.parametrize(
    ("flags", "modes", "keys"),
    [
        (("--size",), [], {"size"}),
        (("--ttft",), ["ttft"], {"prefill_arithmetic"}),
        (("--tpot", "--size"), ["tpot"], {"size", "decode_traffic"}),
        (("--ttlt", "--tpot"), ["tpot", "ttlt"], {"decode_traffic"}),
    ],
    ids=lambda value: "".join(value) if isinstance(value, tuple) else "",
)
def test_some_modes(run: Run, here: Path, flags: tuple[str, ...], modes: list[str], keys: set[str]) -> None:
    record = profiled(run, "mamba2-tiny", *flags)
    assert list(record["latency"]) == modes
    found = {key for key in ("size", "prefill_arithmetic", "decode_traffic") if record[key] is not None}
    assert found == keys


def test_a_time_limit_says_how_many_runs_were_done(run: Run, here: Path) -> None:
    result = run(main, "profile", "mamba2-tiny", "--tpot", *SHORT, "--max_seconds", 1e-9)
    assert result.exit_code == 0, result.output
    assert result.stderr == "tpot: 1 of 2 runs, ended by --max_seconds 1e-09.\n"


def test_the_graph_has_no_effect_here(run: Run, here: Path) -> None:
    result = run(main, "profile", "mamba2-tiny", "--tpot", *SHORT, "--cache_graph")
    assert result.exit_code == 0, result.output
    assert result.stderr == "--cache_graph has no effect on a CPU.\n"


def test_compare_measures_the_float_source(run: Run, small: Path) -> None:
    record = profiled(run, "small", "--compare", "fp16")
    compare = record["compare"]
    assert (record["precision"], compare["dtype"]) == ("w8a8", "float32")
    assert compare["size"]["weights_bytes"]["total"] == quamba.load("mamba2-tiny").size_bytes
    assert record["size"]["weights_bytes"]["total"] == quamba.load("small").size_bytes
    assert list(compare["speedup"]) == ["ttft", "tpot", "ttlt"]
    for mode, factor in compare["speedup"].items():
        medians = [found["latency"][mode]["median_ms"] for found in (compare, record)]
        assert factor == pytest.approx(medians[0] / medians[1])
    result = run(main, "profile", "small", "--compare", "fp16", *SHORT)
    assert result.stdout.startswith("mamba2-tiny: w8a8 on cpu (")
    header = next(line for line in result.stdout.splitlines() if line.startswith("mode "))
    assert header.endswith("float32 ms  speed-up")
    assert "w8a8 MiB  float32 MiB" in result.stdout


def test_quantize_first(run: Run, here: Path) -> None:
    flags = (*QUANTIZE, *CALIBRATION, "--pretrained_dir", "p")
    record = profiled(run, "mamba2-tiny", "--size", *flags, "--compare", "fp16")
    stored = quamba.load("p/ut-enyac/quamba2-tiny-w4a8")
    assert record["precision"] == "w4a8"
    assert record["size"]["weights_bytes"]["total"] == stored.size_bytes
    assert profiled(run, "quamba2-tiny-w4a8", "--size", "--pretrained_dir", "p")["size"] == record["size"]


def test_log(run: Run, small: Path, here: Path) -> None:
    result = run(main, "profile", "small", "--size", "--tpot", *SHORT, "--log_dir", "logs/new", "--json")
    assert result.exit_code == 0, result.output
    (log,) = (here / "logs" / "new").iterdir()
    assert log.name.startswith("mamba2-tiny_w8a8_profile-")
    assert str(log.relative_to(here)) in result.stderr
    stored = json.loads(log.read_text())
    assert stored["profile"] == json.loads(result.stdout)
    assert stored["args"]["repeats"] == 2
    assert stored["recipe"]["name"] == "w8a8"
    assert stored["versions"]["quamba"] == quamba.__version__


def test_torch_profile(run: Run, here: Path) -> None:
    result = run(main, "profile", "mamba-tiny", "--size", "--tpot", *SHORT, "--torch_profile", "traces")
    assert result.exit_code == 0, result.output
    assert "tpot, 5 runs under the profiler: 'traces/tpot.pt.trace.json', 'traces/tpot.csv'" in result.stdout
    assert sorted(path.name for path in (here / "traces").iterdir()) == ["tpot.csv", "tpot.pt.trace.json"]
    table = result.stdout.split("under the profiler")[1].splitlines()
    assert table[1].split() == ["operator", "calls", "own", "CPU", "ms", "CPU", "ms"]
    assert 4 <= len(table) <= 3 + 10


def test_plot(run: Run, small: Path, here: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'quamba[plot]'")
    result = run(main, "profile", "small", *SHORT, "--compare", "fp16", "--plot", "p.svg")
    assert result.exit_code == 0, result.output
    assert "Plot: 'p.svg'." in result.stderr
    text = (here / "p.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("w8a8", "float (float32)", "weights, MiB", "ttlt, ms"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("mamba2-tiny", "--prompt_len", 0), "0 is not in the range x>=1"),
        (("mamba2-tiny", "--gen_len", 0), "0 is not in the range x>=1"),
        (("mamba2-tiny", "--batch_size", 0), "0 is not in the range x>=1"),
        (("mamba2-tiny", "--repeats", 0), "0 is not in the range x>=1"),
        (("mamba2-tiny", "--max_seconds", 0), "0.0 is not in the range x>0"),
        (("mamba2-tiny", "--max_seconds", "nan"), "max_seconds is nan, expected a number above 0."),
        (("mamba2-tiny", "--device", "cpuu"), "The device is 'cpuu'"),
        (("mamba2-tiny", "--device", "cuda:99"), "The device is 'cuda:99'"),
        (("mamba2-tny",), "Did you mean 'mamba2-tiny'?"),
        (("mamba2-tiny", "--compare", "fp32"), "Did you mean 'fp16'?"),
        (("mamba2-tiny", "--compare", "fp16"), "'mamba2-tiny' is float; add --quantize"),
        (("mamba2-tiny", "--plot", "p.pmg"), "Did you mean '.png'?"),
        (("mamba2-tiny", "--log_dir", "eval.txt"), "--log_dir 'eval.txt' is a file, expected a folder."),
        (("mamba2-tiny", "--log_dir", "eval.txt/a/b"), "'eval.txt' is a file, expected a folder."),
        (("mamba2-tiny", "--torch_profile", "eval.txt"), "'eval.txt' is a file, expected a folder."),
    ],
    ids=lambda value: "-".join(map(str, value)).replace("/", "_") if isinstance(value, tuple) else "",
)
def test_bad_arguments(refused: Refused, arguments: tuple[object, ...], sentence: str) -> None:
    assert sentence in refused(main, "profile", *arguments)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("mamba2-tiny/x/p.png", "make 'mamba2-tiny/x' first"),
        ("folder.png", "--plot 'folder.png' is a folder"),
    ],
    ids=["no folder", "a folder"],
)
def test_plots_that_cannot_be_written(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch, file: str, sentence: str
) -> None:
    monkeypatch.setattr(plot, "require_plot", lambda path: None)
    (here / "folder.png").mkdir()
    assert sentence in refused(main, "profile", "mamba2-tiny", "--plot", file)


def test_a_plot_without_matplotlib(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert "pip install 'quamba[plot]'" in refused(main, "profile", "mamba2-tiny", "--plot", "p.png")


def test_an_output_folder_without_permission(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not hold for root, who runs many a container.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "does not let you" in refused(main, "profile", "mamba2-tiny", "--log_dir", "logs")


def test_compare_without_its_source(refused: Refused, small: Path, here: Path) -> None:
    (here / "mamba2-tiny").unlink()
    sentence = refused(main, "profile", "small", "--compare", "fp16")
    assert sentence.startswith(
        "--compare fp16 needs 'mamba2-tiny', the float model that this one was made from:"
    )
    (here / "mamba2-tiny").symlink_to(small)
    assert "is quantized now" in refused(main, "profile", "small", "--compare", "fp16")


def test_the_script_runs_without_an_installed_package(repo_root: Path, here: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(repo_root / "profile_mamba.py"), "mamba-tiny", "--size"],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "weights: total" in done.stdout
