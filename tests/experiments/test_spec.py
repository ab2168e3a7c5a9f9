"""Sweep files: what they mean, and what is said of wrong ones."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from quamba.errors import QuambaError
from quamba.experiments.spec import read_sweep

BASE = (
    "--batch_size 16 --eval_zero_shot --task_list lambada_openai --pretrained_dir ./pretrained_models"
    " --log_dir logs --quantize"
)
SECOND = "--group_heads --apply_gptq --quantize_embedding --quantize_lm_head --output_subdir quamba2"
ALPHAS = (("default", ""), ("pa-1", " --percentile_alpha 1.0"))


def published_runs() -> list[tuple[str, str]]:
    """Names and command lines of the 20 published runs."""
    found = []
    for size in ("130m", "370m", "1.4b", "2.8b"):
        for folder, alpha in ALPHAS:
            flags = f"{BASE} --output_subdir quamba1 --w_bits 8 --a_bits 8{alpha}"
            found.append((f"quamba1/{folder}/quamba-{size}-w8a8", f"state-spaces/mamba-{size} {flags}"))
    models = {
        "2.7b": "state-spaces/mamba2-2.7b",
        "8b-converted": "./pretrained_models/mamba2-8b-converted",
    }
    for size, model in models.items():
        for w, a in ((4, 8), (4, 16), (8, 8)):
            for folder, alpha in ALPHAS:
                flags = f"{BASE} {SECOND} --w_bits {w} --a_bits {a}{alpha}"
                found.append((f"quamba2/{folder}/quamba2-{size}-w{w}a{a}", f"{model} {flags}"))
    return found


def test_the_published_runs(repo_root: Path) -> None:
    sweep = read_sweep(repo_root / "configs/experiments/reproduce.toml")
    assert [(run.name, shlex.join(run.arguments)) for run in sweep.runs] == published_runs()
    for run in sweep.runs:
        assert run.folder == Path("pretrained_models") / run.name


def test_expected_values_of_the_published_runs(repo_root: Path) -> None:
    sweep = read_sweep(repo_root / "configs/experiments/reproduce.toml")
    first = {run.name: run.expected[0].value for run in sweep.runs if run.expected}
    assert list(first.values()) == [40.61, 50.37, 60.43, 65.67, 65.80, 67.50, 68.20, 69.50, 71.20, 72.10]
    assert all("/default/" in name for name in first)
    assert {e.metric for run in sweep.runs for e in run.expected} == {"lambada_openai acc"}


def test_the_demo_matrix(repo_root: Path) -> None:
    sweep = read_sweep(repo_root / "configs/experiments/demo.toml")
    labels = [(run.model.split("/")[-1], run.flags.label, run.flags.percentile_alpha) for run in sweep.runs]
    assert len(labels) == 20
    assert labels.count(("mamba-demo", "w8a8", None)) == labels.count(("mamba-demo", "w8a8", 1.0)) == 4
    for label in ("w4a8", "w4a16", "w8a8"):
        for alpha in (None, 1.0):
            assert labels.count(("mamba2-demo", label, alpha)) == 2
    full = sweep.with_flags(limit=None, max_windows=None, testing=None)
    assert {(run.options["limit"], run.options["max_windows"]) for run in full.runs} == {(None, None)}
    assert [run.name for run in full.runs] == [run.name for run in sweep.runs]


def test_only(repo_root: Path) -> None:
    sweep = read_sweep(repo_root / "configs/experiments/reproduce.toml")
    assert len(sweep.only(["quamba1"]).runs) == 8
    assert [run.name for run in sweep.only(["quamba2/pa-1/quamba2-2.7b-w8a8"]).runs] == [
        "quamba2/pa-1/quamba2-2.7b-w8a8"
    ]
    with pytest.raises(QuambaError, match=r"has no run 'quamba3'\. Did you mean 'quamba[12]'\?"):
        sweep.only(["quamba3"])


def test_requests_leave_places_out(here: Path) -> None:
    line = 'model = "m", quantize = true, w_bits = 4'
    (here / "a.toml").write_text(f'[[run]]\nset = {{ {line}, pretrained_dir = "p", output_subdir = "s" }}')
    (here / "b.toml").write_text(f'[[run]]\nname = "x"\nset = {{ {line}, log_dir = "l" }}')
    (a,), (b,) = read_sweep("a.toml").runs, read_sweep("b.toml").runs
    assert a.request == b.request
    assert (a.name, b.name) == ("s/default/m-w4a8", "x")
    (other,) = read_sweep("a.toml").with_flags(seed=7).runs
    assert other.request != a.request


MODEL = 'set = { model = "m", quantize = true }'
ONE = f'[[run]]\nname = "one"\n{MODEL}\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = [", "The sweep file 's.toml' is not valid TOML: "),
        ("", "'s.toml' has no runs, expected [[grid]] or [[run]] tables."),
        ("version = 2", "'s.toml': 'version' is 2, expected 1; a newer file needs a newer quamba."),
        ("grids = 1", "'s.toml': a key of the file is 'grids', expected one of 'version'"),
        ('name = "a b"', "'s.toml': 'name' is 'a b', expected letters, digits"),
        ("run = 3", "'s.toml': 'run' is 3, expected tables, each under [[run]]."),
        ("[defaults]\nw_bit = 4", "'defaults.w_bit' is no flag of main.py. Did you mean 'w_bits'?"),
        ("[[grid]]\nvery = 1", "a key of [[grid[0]]] is 'very', expected one of 'set', 'vary'. Did you mean"),
        ('[[grid]]\nvary = { model = "m" }', "'grid[0].vary.model' is 'm', expected a list of values."),
        ("[[grid]]\nvary = { w_bits = [4] }", "'grid[0]: model' is None, expected a folder or a hub id."),
        (
            '[[grid]]\nvary = { model = ["m"], precision = ["w4"] }',
            "'grid[0].vary.precision' is 'w4', expected 'w8a8', 'w4a8' or 'w4a16'.",
        ),
        ('[[run]]\nset = { model = "m", w_bits = 5 }', "'s.toml', run[0]: Invalid value for '--w_bits': '5'"),
        ('[[run]]\nset = { model = "m", quantize = 2 }', "'s.toml', run[0]: "),
        ('[[run]]\nset = { model = "m" }', "'s.toml', run[0]: There is nothing to do, expected --quantize"),
        (f'[[run]]\nname = "../x"\n{MODEL}', "'run[0].name' is '../x', expected letters, digits"),
        (
            '[[run]]\nset = { model = "m", quantize = true, pretrained_dir = "p", output_subdir = "../x" }',
            "the run would be called '../x/default/m-w8a8', which is no name of files",
        ),
        (f"[[run]]\n{MODEL}\n[[run]]\n{MODEL}", "has two runs of the name 'ut-enyac/m-w8a8', expected all"),
        (
            f'{ONE}[[expected]]\nmetric = "m"\nsource = "s"\nvalues = {{ ons = 1 }}',
            "'expected[0].values' names no run: 'ons'. Did you mean 'one'?",
        ),
        (
            f'{ONE}[[expected]]\nmetric = "m"\nvalues = {{ one = 1 }}',
            "'expected[0].source' is None, expected a text.",
        ),
        (
            f'{ONE}[[expected]]\nmetric = "m"\nsource = "s"\nvalues = {{ one = "x" }}',
            "'expected[0].values.one' is 'x', expected a number.",
        ),
    ],
)
def test_wrong_files_are_one_sentence(here: Path, text: str, sentence: str) -> None:
    (here / "s.toml").write_text(text)
    with pytest.raises(QuambaError) as caught:
        read_sweep("s.toml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).rstrip()


def test_a_missing_file_names_its_neighbour(here: Path) -> None:
    (here / "demo.toml").touch()
    with pytest.raises(QuambaError, match=r"no sweep file 'dem\.toml'\. Did you mean 'demo\.toml'\?"):
        read_sweep("dem.toml")


def test_the_example_of_the_documents(repo_root: Path, here: Path) -> None:
    text = (repo_root / "docs/experiments.md").read_text(encoding="utf-8")
    (here / "mine.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    sweep = read_sweep("mine.toml")
    assert [run.name for run in sweep.runs][-2:] == ["mine/pa-1/quamba2-370m-w8a8", "float/130m"]
    assert len(sweep.runs) == 9
    assert sum(len(run.expected) for run in sweep.runs) == 1
