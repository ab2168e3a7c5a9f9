"""The GPU benchmarks, tried on a CPU with tiny models: what they write, what becomes of failures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quamba.kernels.registry import REFERENCE, choose_kernels

SCRIPTS = ("end_to_end", "kernels")
HELPERS = ("common", "op_calls", "random_models")


@pytest.fixture
def scripts(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    folder = repo_root / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ is missing: it comes with the repository, not with the installed package")
    monkeypatch.syspath_prepend(str(folder))
    yield {name: importlib.import_module(name) for name in (*SCRIPTS, *HELPERS)}
    for name in (*SCRIPTS, *HELPERS):
        del sys.modules[name]


@pytest.fixture
def copies(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """No second goes into measuring this machine's memory."""
    monkeypatch.setattr(scripts["common"], "copy_bandwidth_gb_per_s", lambda device: 10.0)


END_TO_END = ["--device", "cpu", "--models", "tiny", "--repeats", "2", "--batches", "1", "3"]
END_TO_END += ["--prompts", "2x16"]
KERNELS = ["--device", "cpu", "--models", "tiny-mamba", "--repeats", "2", "--recipes", "w4a8"]
KERNELS += ["--rows", "1", "3", "--tokens", "16"]


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_models_have_the_published_sizes(scripts: dict[str, ModuleType]) -> None:
    models = scripts["random_models"]
    millions = {}
    for name in models.PUBLISHED:
        network = models.empty_network(models.MODELS[name], "fp16", "fp16", torch.float16)
        millions[name] = round(sum(t.numel() for t in network.named_tensors().values()) / 1e6)
    assert millions == {
        "mamba2-130m": 129,
        "mamba2-2.7b": 2703,
        "mamba-130m": 129,
        "mamba-2.8b": 2768,
        "mamba2-8b": 8237,
    }


def test_random_activations_do_not_vanish_or_saturate(scripts: dict[str, ModuleType]) -> None:
    models, calls = scripts["random_models"], scripts["op_calls"]
    for name in ("tiny", "tiny-mamba"):
        for precision in ("w8a8", "w4a8", "zoo-w4a8"):
            empty = models.empty_network(models.MODELS[name], precision, "int8", torch.float32)
            network = models.fill(empty, torch.device("cpu"))
            for call in calls.recorded_calls(network, 2, 16):
                for result in call.results:
                    if result.dtype == torch.int8:
                        edge = float((result.abs() >= 127).float().mean())
                        assert edge < 0.1, (name, precision, call.leaf, edge)
                        assert float(result.float().std()) > 2, (name, precision, call.leaf)


@pytest.mark.usefixtures("copies")
def test_end_to_end_writes_every_row(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    out = tmp_path / "results" / "rows.json"
    arguments = [*END_TO_END, "--recipes", "w4a8", "fp16", "--state_dtype", "int8", "--out", str(out)]
    assert scripts["end_to_end"].main(arguments) == 0
    content = written(out)
    (stamp,) = content["runs"].values()
    assert (
        content["hardware"]
        and stamp["kernels"] == choose_kernels(torch.device("cpu")).name
        and stamp["copy_gb_per_s"] == 10.0
    )
    rows = {(r["precision"], r["state"], r["what"], r["batch"], r["length"]): r for r in content["rows"]}
    cells = [("size", 1, 0), ("tpot", 1, 0), ("tpot", 3, 0), ("ttft", 2, 16)]
    assert list(rows) == [(*p, *c) for p in (("fp16", "fp16"), ("w4a8", "int8")) for c in cells]
    one, three = rows["w4a8", "int8", "tpot", 1, 0], rows["w4a8", "int8", "tpot", 3, 0]
    in_float = rows["fp16", "fp16", "tpot", 3, 0]
    state = rows["w4a8", "int8", "size", 1, 0]["cache_bytes_per_sequence"]
    assert three["step_bytes"] - one["step_bytes"] == pytest.approx(2 * (2 * state + 33), abs=8)
    assert rows["fp16", "fp16", "size", 1, 0]["weight_bytes"] < 0.6 * in_float["step_bytes"], "float32 here"
    assert three["p5_ms"] <= three["median_ms"] <= three["p95_ms"] and three["runs"] == 2
    rate = three["step_bytes"] / three["median_ms"] / 1e6
    assert three["gb_per_s"] == pytest.approx(rate, rel=1e-4)
    assert three["share_of_copy"] == pytest.approx(rate / 10, rel=1e-4)
    assert three["speedup_over_fp16"] == pytest.approx(in_float["median_ms"] / three["median_ms"], rel=1e-4)
    again = ["--recipes", "fp16", "--only", "tpot", "--out", str(out)]
    scripts["end_to_end"].main([*END_TO_END, *again])
    assert sum("speedup_over_fp16" in row for row in written(out)["rows"]) == 3, "none over itself"


@pytest.mark.usefixtures("copies")
def test_a_second_run_keeps_the_rows_of_the_first(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    arguments = [*END_TO_END, "--recipes", "w8a8", "--out", str(out)]
    scripts["end_to_end"].main([*arguments, "--only", "size"])
    (first,) = written(out)["runs"]
    scripts["end_to_end"].main([*arguments, "--only", "ttft", "--resume", "2001-01-01T00:00:00+00:00"])
    assert len(written(out)["rows"]) == 1, "a run of 2001 is out of time"
    scripts["end_to_end"].main([*arguments, "--max_seconds", "1e12", "--resume", "2001-01-01T00:00:00+00:00"])
    content = written(out)
    assert set(content["runs"]) == {"2001-01-01T00:00:00+00:00"} != {first}
    assert len(content["rows"]) == 4

    def unwanted(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(scripts["end_to_end"], "measure", unwanted)
    scripts["end_to_end"].main([*arguments, "--max_seconds", "1e12", "--resume", "2001-01-01T00:00:00+00:00"])
    assert written(out) == content


@pytest.mark.usefixtures("copies")
def test_a_failing_row_is_recorded_and_the_rest_goes_on(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = scripts["end_to_end"].decode_step

    def failing(network: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        if len(ids) == 1:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 1 GiB")
        return step(network, ids, cache)

    monkeypatch.setattr(scripts["end_to_end"], "decode_step", failing)
    out = tmp_path / "rows.json"
    assert scripts["end_to_end"].main([*END_TO_END, "--recipes", "w8a8", "--out", str(out)]) == 0
    rows = written(out)["rows"]
    assert [row.get("error") for row in rows] == [None, "RuntimeError: CUDA out of memory.", None, None]
    assert "RuntimeError: CUDA out of memory." in capsys.readouterr().out


@pytest.mark.usefixtures("copies")
def test_a_network_that_cannot_be_made_fails_in_all_its_rows(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = scripts["end_to_end"].fill

    def failing(network: Any, device: torch.device) -> Any:
        if not network.tied:  # the quantized one
            raise RuntimeError("CUDA out of memory.")
        return fill(network, device)

    monkeypatch.setattr(scripts["end_to_end"], "fill", failing)
    out = tmp_path / "rows.json"
    scripts["end_to_end"].main([*END_TO_END, "--recipes", "fp16", "w8a8", "--out", str(out)])
    failed = [(row["precision"], row["what"]) for row in written(out)["rows"] if "error" in row]
    assert failed == [("w8a8", "tpot"), ("w8a8", "tpot"), ("w8a8", "ttft")]


@pytest.mark.usefixtures("copies")
def test_kernels_writes_what_each_op_moves(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert scripts["kernels"].main([*KERNELS, "--out", str(out)]) == 0
    rows = {(r["leaf"], r["op"], r["rows"], r["tokens"]): r for r in written(out)["rows"]}
    assert not any("error" in row or "wrong" in row for row in rows.values())
    assert ("lm_head", "linear", 1, 16) not in rows, "the same call as for one row"
    out_proj = rows["out_proj", "linear", 3, 1]
    # 128 int8 inputs a row and their scale, 64 x 128 int4 with a float16 scale a row, float32 results.
    assert out_proj["bytes"] == 3 * 128 + 4 + 64 * 64 + 64 * 2 + 3 * 64 * 4
    assert out_proj["operations"] == 2 * 3 * 128 * 64
    assert out_proj["gb_per_s"] == pytest.approx(out_proj["bytes"] / out_proj["us"] / 1e3, rel=1e-4)
    assert out_proj["torch_us"] > 0
    # int8 input, output and taps with their scales, a float32 bias, three tokens of state read and written.
    conv = 2 * (3 * 128 + 128 * 4) + 128 * (4 + 4) + 128 * 4 + 2 * 3 * 3 * 128
    assert rows["conv1d", "causal_conv1d", 3, 1]["bytes"] == conv
    step = rows["ssm", "selective_scan_step", 3, 1]
    assert step["bytes"] > 2 * 3 * 128 * 16 * 2 and step["operations"] == 7 * 3 * 128 * 16
    embedding = rows["embedding", "embedding", 1, 16]
    assert embedding["bytes"] == 16 * (8 + 32 + 2 + 64 * 4)
    assert rows["ssm", "selective_scan", 1, 16]["us"] > 0 and "torch_us" not in step


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    ("op", "what"), [("linear", "result"), ("causal_conv1d", "state")], ids=["wrong-result", "wrong-state"]
)
def test_a_wrong_kernel_gets_no_speed(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    op: str,
    what: str,
) -> None:
    def off(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = getattr(REFERENCE, op)(*args, **kwargs)
        wrong = y if what == "result" else kwargs["state"]
        wrong[..., 0] += 2
        return y

    broken = dataclasses.replace(REFERENCE, **{op: off})
    monkeypatch.setattr(scripts["kernels"], "choose_kernels", lambda device: broken)
    out = tmp_path / "rows.json"
    arguments = [*KERNELS, "--ops", op, "hadamard_quantize", "--out", str(out)]
    assert scripts["kernels"].main(arguments) == 0
    rows = written(out)["rows"]
    assert {row["op"] for row in rows} == {op, "hadamard_quantize"}
    assert all(("wrong" in row) == (row["op"] == op) == ("us" not in row) for row in rows)
    assert "wrong: " in capsys.readouterr().out


@pytest.mark.usefixtures("copies")
def test_a_kernel_that_fails_is_recorded(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    broken = dataclasses.replace(REFERENCE, linear=failing)
    monkeypatch.setattr(scripts["kernels"], "choose_kernels", lambda device: broken)
    out = tmp_path / "rows.json"
    assert scripts["kernels"].main([*KERNELS, "--ops", "linear", "embedding", "--out", str(out)]) == 0
    assert all(("error" in row) == (row["op"] == "linear") for row in written(out)["rows"])


def test_difference_lets_only_rounding_pass(scripts: dict[str, ModuleType]) -> None:
    difference = scripts["op_calls"].difference
    x = torch.randn(64, 256)
    assert difference(x.half().float(), x) is None
    assert difference(x.bfloat16().float(), x) is not None
    one_element, nothing = x.clone(), torch.full_like(x, float("nan"))
    one_element[3, 5] += 0.2
    assert difference(one_element, x) is not None and difference(nothing, x) is not None
    codes = torch.randint(-100, 100, (64, 256)).to(torch.int8)
    moved = codes.clone()
    moved[0, :100] += 1
    assert difference(moved, codes) is None
    moved[1] += 1
    assert difference(moved, codes) is not None
    far = codes.clone()
    far[0, 0] += 2
    assert difference(far, codes) is not None
    assert difference(x.half(), x) is not None and difference(x[:1], x) is not None


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "mamba2-2.7"], "Did you mean 'mamba2-2.7b'?"),
        (["--recipes", "w4a9"], "Did you mean"),
    ],
    ids=["model", "recipe"],
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_choice_is_one_sentence(
    scripts: dict[str, ModuleType],
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    sentence: str,
) -> None:
    assert scripts[name].main(["--device", "cpu", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    "text", ["no JSON", '{"hardware": "another machine"}'], ids=["no-json", "other-machine"]
)
def test_a_file_of_something_else_is_left_alone(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = tmp_path / "rows.json"
    out.write_text(text)
    assert scripts["kernels"].main([*KERNELS, "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert out.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_a_script_says_so(
    scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert scripts[name].main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_one(repo_root: Path, tmp_path: Path, name: str) -> None:
    """With real clocks and the machine's own name; no row is left time for."""
    arguments = ["--device", "cpu", "--models", "tiny", "--max_seconds", "-1", "--out", str(tmp_path / "out")]
    done = _run(repo_root / "benchmarks" / f"{name}.py", *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.endswith("nothing was measured\n")


@pytest.mark.slow
def test_every_other_file_does_nothing_when_run(repo_root: Path) -> None:
    """As `make bench` runs them all."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1])\n"
    code += "for name in sys.argv[2:]: runpy.run_path(f'{sys.argv[1]}/{name}.py', run_name='__main__')"
    done = _run("-c", code, str(repo_root / "benchmarks"), *HELPERS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).resolve().parent.parent / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
