"""benchmarks/llama_cpp.py: the sizes of its files, what becomes of results; its programs are stand-ins."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = """#!{python}
import json, os, sys
from pathlib import Path
argument = dict(zip(sys.argv[1::2], sys.argv[2::2]))
repeats, threads = int(argument["-r"]), int(argument["-t"])
calls = Path(__file__).parent / "calls"
waits = [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]
calls.open("a").write(json.dumps([Path(argument["-m"]).name, threads, waits]) + "\\n")
first = 10.0 * len(calls.read_text().splitlines())
print(json.dumps([
    dict(build_commit="abc", n_prompt=512, n_gen=0, samples_ts=[4 * first + i for i in range(repeats)]),
    dict(build_commit="abc", n_prompt=0, n_gen=128, samples_ts=[first + i for i in range(repeats)]),
]))
"""
QUANTIZE = """#!{python}
import pathlib, sys
source, target, kind = sys.argv[1:]
pathlib.Path(target).write_text(pathlib.Path(source).read_text() + " as " + kind)
"""
FAILING = """#!{python}
import pathlib, sys
if sys.argv[0].endswith("quantize"):
    pathlib.Path(sys.argv[2]).write_text("half a file")
print("loading")
sys.exit("no memory left")
"""


@pytest.fixture
def script(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = repo_root / "benchmarks"
    if not folder.is_dir():
        pytest.skip("benchmarks/ is missing: it comes with the repository, not with the installed package")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("llama_cpp")
    del sys.modules["llama_cpp"]


def install(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text.replace("{python}", sys.executable))
    path.chmod(0o755)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Stand-ins for the programs, one F16 file that is there already, and a file of results."""
    for name, text in (("llama-bench", BENCH), ("llama-quantize", QUANTIZE)):
        install(tmp_path / "bin", name, text)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "mamba-130m-F16.gguf").write_text("weights")
    words = ["--bin", tmp_path / "bin", "--folder", tmp_path / "gguf", "--models", "mamba-130m"]
    return [*map(str, words), "--types", "Q8_0", "--repeats", "2", "--out", str(tmp_path / "out" / "r.json")]


def test_sizes_are_those_of_our_benchmarks(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("random_models")
    for name, config in script.MODELS.items():
        assert models.MODELS[name] == config
        network = models.empty_network(config, "fp16", "fp16", torch.float16)
        expected = sum(tensor.numel() for tensor in network.named_tensors().values())
        assert sum(map(math.prod, script.tensor_shapes(config).values())) == expected, name
    del sys.modules["random_models"]


@pytest.mark.parametrize("model", ["mamba-130m", "mamba2-130m"])
def test_a_file_says_what_it_holds(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    gguf = pytest.importorskip("gguf")
    config = type(script.MODELS[model])(d_model=64, n_layer=2, vocab_size=100)
    monkeypatch.setitem(script.MODELS, model, config)
    script.write_random(model, tmp_path / "file.gguf")
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    assert shapes == script.tensor_shapes(config)
    types = {tensor.name.split(".", 2)[-1]: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["ssm_in.weight"] == types["ssm_out.weight"] == "F16"
    assert {types[name] for name in ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_dt.bias")} == {"F32"}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == config.family
    assert fields[f"{config.family}.ssm.inner_size"] == 128


def test_repeats_of_several_calls_end_in_one_mean(
    script: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--threads", "2"]) == 0
    calls = [json.loads(line) for line in (tmp_path / "bin" / "calls").read_text().splitlines()]
    assert calls == [["mamba-130m-Q8_0.gguf", threads, []] for threads in (1, 2, 2)]
    text = (tmp_path / "out" / "r.json").read_text()
    content = json.loads(text)
    assert content["program"] == "llama.cpp abc; llama-bench -p 512 -n 128 -r 2"
    assert content["tokens_per_s"] == {"mamba-130m": {"Q8_0": {"1": [10.5, 40.5], "2": [25.5, 100.5]}}}
    decode, prompt = content["repeats"]["mamba-130m"]["Q8_0"]["2"]
    assert (decode, prompt) == ([20, 21, 30, 31], [80, 81, 120, 121])
    assert '"2": [25.5, 100.5]' in text, "a row a line"


def test_results_have_the_layout_of_the_published_ones(
    script: ModuleType, arguments: list[str], tmp_path: Path, repo_root: Path
) -> None:
    script.main(arguments)
    published = json.loads((repo_root / "benchmarks" / "llama_cpp.json").read_text(encoding="utf-8"))
    content = json.loads((tmp_path / "out" / "r.json").read_text(encoding="utf-8"))
    assert published.keys() - {"threads"} == content.keys() - {"repeats"}
    assert published["columns"] == content["columns"]


def test_files_are_made_once(script: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    assert script.main([*arguments, "--types", "Q8_0", "Q4_0", "--repeats", "0"]) == 0
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts == {
        "mamba-130m-F16.gguf": "weights",
        "mamba-130m-Q8_0.gguf": "weights as Q8_0",
        "mamba-130m-Q4_0.gguf": "weights as Q4_0",
    }
    (folder / "mamba-130m-F16.gguf").unlink()
    assert script.main(arguments) == 0, "no other file needs it"
    assert not (folder / "mamba-130m-F16.gguf").exists()


def test_the_f16_file_goes_when_it_was_not_asked_for(
    script: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "write_random", lambda model, path: path.write_text(f"new {model}"))
    folder = tmp_path / "gguf"
    (folder / "mamba-130m-F16.gguf").unlink()
    assert script.main([*arguments, "--repeats", "0"]) == 0
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "mamba-130m-Q8_0.gguf": "new mamba-130m as Q8_0"
    }
    assert script.main([*arguments, "--repeats", "0", "--types", "F16"]) == 0
    assert (folder / "mamba-130m-F16.gguf").read_text() == "new mamba-130m"


def test_without_a_build_it_says_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--models", "mamba-13m"], "Did you mean 'mamba-130m'?"),
        (["--types", "Q8"], "Did you mean 'Q8_0'?"),
        (["--threads", "0"], "--threads takes numbers from 1"),
        (["--bin", "nowhere"], "'nowhere' has no program llama-bench"),
        (["--out", "."], "'.' is a folder"),
    ],
    ids=["model", "type", "threads", "programs", "out"],
)
def test_bad_input_is_one_sentence(
    script: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    sentence: str,
) -> None:
    assert script.main([*arguments, *wrong]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "bin" / "calls").exists()


def test_a_missing_gguf_package_is_one_sentence(
    script: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "gguf" / "mamba-130m-F16.gguf").unlink()
    assert script.main(arguments) == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert not list((tmp_path / "gguf").iterdir())


@pytest.mark.parametrize("program", ["llama-bench", "llama-quantize"])
def test_a_failing_program_is_one_sentence(
    script: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: str,
) -> None:
    install(tmp_path / "bin", program, FAILING)
    assert script.main(arguments) == 2
    assert capsys.readouterr().err == f"{program} failed with status 1: no memory left\n"
    assert not (tmp_path / "out").exists() and not list((tmp_path / "gguf").glob("*.partial"))


@pytest.mark.parametrize(
    "text",
    ["no JSON", "[]", '{"program": "another", "hardware": "", "tokens_per_s": {}, "repeats": {}}'],
    ids=["no-json", "list", "other-program"],
)
def test_a_file_of_something_else_is_left_alone(
    script: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = tmp_path / "r.json"
    out.write_text(text)
    assert script.main([*arguments, "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert out.read_text() == text
    assert (tmp_path / "bin" / "calls").exists() == ("another" in text), "no minutes for a file that is none"
