"""lm-eval's tasks from our folder, from one's own, and by name; what is read from the results."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

import quamba.evaluation.tasks as tasks
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError
from quamba.evaluation.lm_eval_model import TaskModel
from quamba.evaluation.tasks import TaskMetric, load_tasks, run_tasks

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: TEST_FILE}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
GENERATE = """
task: echo
dataset_path: json
dataset_kwargs:
  data_files: {test: TEST_FILE}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture
def model(tokenizer: Tokenizer) -> TaskModel:
    return TaskModel(tiny_model(tiny_config("mamba2", vocab_size=257)), tokenizer)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the tasks ``colours`` (choices) and ``echo`` (generation)."""
    rows = [
        {"question": f"The {thing} is", "choices": ["blue", "green", "red"], "answer": i % 3}
        for i, thing in enumerate(["sea", "grass", "rose", "sky", "leaf"])
    ]
    folder = tmp_path / "mine"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("colours", CHOICE), ("echo", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.replace("TEST_FILE", str(data)))
    return folder


def values(results: tasks.TaskResults) -> dict[tuple[str, str], float]:
    return {(metric.task, metric.metric): metric.value for metric in results.metrics}


def test_lambada_local_is_scored_as_by_hand(model: TaskModel, assets: Path) -> None:
    results = run_tasks(model, load_tasks(["lambada_local"]), limit=6)
    right, sums = 0, []
    for line in tasks.lambada_file().read_text(encoding="utf-8").splitlines()[:6]:
        head, _, last = json.loads(line)["text"].rpartition(" ")
        context, word = model.tokenizer.encode(head), model.tokenizer.encode(f" {last}")
        logits = model.network(torch.tensor([[*context, *word]]))[0, len(context) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(word)[:, None]).sum().item())
        right += logits.argmax(-1).tolist() == word
    found = values(results)
    assert found["lambada_local", "acc"] == right / 6
    assert found["lambada_local", "perplexity"] == pytest.approx(math.exp(-sum(sums) / 6), rel=1e-4)
    assert (results.shots, results.samples, results.limit) == ({"lambada_local": 0}, {"lambada_local": 6}, 6)
    acc = next(metric for metric in results.metrics if metric.metric == "acc")
    assert acc == TaskMetric("lambada_local", 0, 6, "acc", right / 6, acc.stderr)
    assert results.raw["lambada_local"]["acc,none"] == acc.value
    json.dumps(results.raw)


def test_lambada_local_is_lm_evals_task() -> None:
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    theirs = Path(lm_eval.__file__).parent / "tasks" / "lambada" / "lambada_openai.yaml"
    ours = Path(tasks.__file__).parent / "task_files" / "lambada_local.yaml"
    loaded = [yaml.load(path.read_text(), Loader) for path in (theirs, ours)]
    for fields in loaded:
        for source in ("task", "tag", "dataset_path", "dataset_name", "custom_dataset"):
            fields.pop(source, None)
    loaded[0] = {key: value for key, value in loaded[0].items() if "decontaminat" not in key}
    assert loaded[0] == loaded[1]


def test_tasks_of_ones_own(model: TaskModel, own: Path) -> None:
    results = run_tasks(model, load_tasks(["colours", "echo"], own))
    best = []
    for line in (own / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = model.log_likelihoods(
            model.encode_pairs([(row["question"], f" {choice}") for choice in row["choices"]])
        )
        best.append(max(range(3), key=lambda i: scores[i][0]) == row["answer"])
    assert values(results)["colours", "acc"] == sum(best) / 5
    assert values(results)["echo", "exact_match"] == 0.0
    assert results.samples == {"colours": 5, "echo": 5}


def test_examples_are_put_before(model: TaskModel, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = model.encode_pairs
    monkeypatch.setattr(
        model, "encode_pairs", lambda pairs: asked.extend(p[0] for p in pairs) or encode(pairs)
    )
    loaded = load_tasks(["colours"], own)
    few = run_tasks(model, loaded, fewshot=2, limit=1)
    none = run_tasks(model, loaded, limit=1)
    assert [few.shots, none.shots] == [{"colours": 2}, {"colours": 0}]
    assert {text.count(" is") for text in asked[:3]} == {3}
    assert set(asked[3:]) == {"The sea is"}
    first = list(asked[:3])
    asked.clear()
    run_tasks(model, loaded, fewshot=2, limit=1)
    assert asked == first


def test_a_task_without_examples_stays_so(model: TaskModel, own: Path) -> None:
    results = run_tasks(model, load_tasks(["echo"], own), fewshot=2, limit=1)
    assert results.shots == {"echo": 0}
    assert results.notes == ["The task 'echo' is defined without examples: --fewshot is left out there."]


def test_what_is_global_is_put_back(model: TaskModel, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(99)
    state, drawn = random.getstate(), torch.random.get_rng_state()
    run_tasks(model, load_tasks(["colours", "lambada_local"], own), limit=4)  # lambada's errors are drawn
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert "DISABLE_MULTIPROC" not in os.environ
    assert capsys.readouterr().out == ""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"names": []}, "The list of tasks is empty"),
    ({"names": ["colours"], "task_dir": "none"}, "The task folder 'none' does not exist, expected a folder"),
    ({"names": ["colours"], "task_dir": "mine/rows.jsonl"}, "is a file, expected a folder"),
    ({"names": ["colours"], "task_dir": "empty"}, "'empty' has no task file, expected at least one .yaml"),
    ({"names": ["broken"], "task_dir": "mine"}, "The task 'broken' cannot be loaded"),
    ({"names": ["unsafe"], "task_dir": "mine"}, "The task 'unsafe' runs code that the model wrote"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[s for _, s in REFUSED])
def test_bad_input(
    own: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(own.parent)
    Path("empty").mkdir()
    text = (own / "colours.yaml").read_text()
    (own / "broken.yaml").write_text(text.replace("task: colours", "task: broken").replace("rows", "no-rows"))
    (own / "unsafe.yaml").write_text(text.replace("task: colours", "task: unsafe\nunsafe_code: true"))
    with pytest.raises(QuambaError) as error:
        load_tasks(**arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("fewshot", -1), ("limit", 0)])
def test_bad_numbers(model: TaskModel, own: Path, name: str, value: int) -> None:
    with pytest.raises(QuambaError, match=f"The tasks' {name} is {value}, expected an integer of at least"):
        run_tasks(model, load_tasks(["colours"], own), **{name: value})


def test_lambada_local_outside_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    with pytest.raises(QuambaError, match="run this from the repository"):
        load_tasks(["lambada_local"])


@pytest.mark.slow
def test_names_of_lm_eval(own: Path) -> None:
    with pytest.raises(QuambaError, match=r"no task 'colourz' in lm-eval or .*Did you mean 'colours'\?"):
        load_tasks(["lambada_local", "colourz"], own)
    names, _ = tasks._find(["lambada_openai", "colou?s", "ech*", "echo"], own)
    assert {"lambada_openai", "colours", "echo"} <= set(names)
    assert len(names) == len(set(names))
