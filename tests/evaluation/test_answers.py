"""Answers of finished tasks: kept, found for the same question only, removed when the run is over."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

import quamba.evaluation.lm_eval_model as lm_eval_model
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.evaluation.answers import AnswerStore, weights_digest
from quamba.evaluation.lm_eval_model import TaskModel

ARGS = [("the sea", " is"), ("the ship", " was")]
ANSWERS = [[-1.25, True], [float("-inf"), False]]
NEEDS_LM_EVAL = "needs the package lm-eval"


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    return AnswerStore(tmp_path / "logs" / "unfinished", {"weights": "w", "seed": 1})


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


def again(store: AnswerStore, **changes: Any) -> AnswerStore:
    """What the next run has."""
    return AnswerStore(store.folder, {**store.identity, **changes})


def test_kept_and_found(store: AnswerStore) -> None:
    assert store.find("mine", "generation", ARGS) is None
    store.keep("mine", "generation", ARGS, ANSWERS)
    later = again(store)
    assert later.find("mine", "generation", ARGS) == ANSWERS
    assert (later.taken_over, store.taken_over) == (["mine"], [])


@pytest.mark.parametrize(
    ("identity", "task", "kind", "args"),
    [
        ({"weights": "v"}, "mine", "generation", ARGS),
        ({}, "other", "generation", ARGS),
        ({}, "mine", "texts", ARGS),
        ({}, "mine", "generation", ARGS[:1]),
        ({}, "mine", "generation", [ARGS[0], ("the ship", " is")]),
    ],
    ids=["model", "task", "kind", "limit", "text"],
)
def test_another_question_has_no_answer(
    store: AnswerStore, identity: dict[str, str], task: str, kind: str, args: list[tuple[str, str]]
) -> None:
    store.keep("mine", "generation", ARGS, ANSWERS)
    assert again(store, **identity).find(task, kind, args) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answers": 3}', '{"answers": [1]}'])
def test_damaged_files_are_not_used(store: AnswerStore, text: str) -> None:
    store.keep("mine", "generation", ARGS, ANSWERS)
    (path,) = store.folder.iterdir()
    path.write_text(text)
    assert again(store).find("mine", "generation", ARGS) is None


def test_clear_removes_what_was_used_only(store: AnswerStore) -> None:
    other = again(store, seed=2)
    other.keep("mine", "generation", ARGS, ANSWERS)
    store.keep("a/b c", "generation", ARGS, ANSWERS)
    later = again(store)
    later.find("a/b c", "generation", ARGS)
    later.clear()
    assert [path.name.split("-")[0] for path in store.folder.iterdir()] == ["mine"]
    other.clear()
    assert not store.folder.exists()
    again(store).clear()  # nothing was ever stored


def test_the_digest_sees_every_element() -> None:
    network = tiny_model(tiny_config("mamba2", vocab_size=257))
    before = weights_digest(network)
    assert before == weights_digest(tiny_model(tiny_config("mamba2", vocab_size=257)))
    with torch.no_grad():
        network.backbone.embedding.weight[101, 3] += 1
    assert weights_digest(network) != before


def requests(*tasks: str) -> list[SimpleNamespace]:
    """Two a task, the tasks mixed."""
    return [
        SimpleNamespace(task_name=task, args=(f"{task} {i} is", " so")) for i in range(2) for task in tasks
    ]


def test_a_run_that_is_cut_off_goes_on_after_its_last_task(
    store: AnswerStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    names = ("one", "two", "three", "four", "five")
    model = TaskModel(tiny_model(tiny_config("mamba2", vocab_size=257)), tokenizer)
    whole = lm_eval_model.lm_eval_model(model).loglikelihood(requests(*names))
    scored, plain = [], TaskModel.log_likelihoods

    def killed(self: TaskModel, pairs: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return plain(self, pairs)

    monkeypatch.setattr(TaskModel, "log_likelihoods", killed)
    with pytest.raises(KeyboardInterrupt):
        lm_eval_model.lm_eval_model(model, store).loglikelihood(requests(*names))
    assert sorted(json.loads(path.read_text())["task"] for path in store.folder.iterdir()) == ["one", "two"]
    bar: list[Any] = []
    stage, step = (lambda name, total: bar.append((name, total))), (lambda count=1: bar.append(count))
    model.progress = SimpleNamespace(stage=stage, step=step)
    monkeypatch.setattr(TaskModel, "log_likelihoods", plain)
    later = again(store)
    found = lm_eval_model.lm_eval_model(model, later).loglikelihood(requests(*names))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in whole]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], rel=1e-5)
    assert later.taken_over == ["one", "two"]
    assert bar[0] == ("Log-likelihoods of 3 tasks", 6)
    assert sum(bar[1:]) == 6


@pytest.mark.parametrize("kind", ["log_likelihoods", "generate"])
@pytest.mark.parametrize(("given", "rows"), [(None, [4, 2, 1, 1, 2, 1, 1]), (4, [4])], ids=["auto", "given"])
def test_batches_shrink_where_memory_is_short(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str, given: int | None, rows: list[int]
) -> None:
    model = TaskModel(tiny_model(tiny_config("mamba2", vocab_size=257)), tokenizer, batch_size=given)
    tried: list[int] = []
    name = {"log_likelihoods": "_score", "generate": "generate"}[kind]
    plain = getattr(lm_eval_model, name)

    def short(*args: Any, **options: Any) -> Any:
        tried.append(len(args[1] if kind == "log_likelihoods" else args[2]))
        if tried[-1] > 1:
            raise torch.OutOfMemoryError
        return plain(*args, **options)

    if kind == "log_likelihoods":
        pairs = [([1, 2, i], [3, 4]) for i in range(4)]
        expected: Any = [pytest.approx(score, rel=1e-5) for score in model.log_likelihoods(pairs)]
        ask: Any = lambda: model.log_likelihoods(pairs)  # noqa: E731
    else:
        prompts = [(f"the sea {i}", {"max_gen_toks": 2}) for i in range(4)]
        expected = model.generate(prompts)
        ask = lambda: model.generate(prompts)  # noqa: E731
    monkeypatch.setattr(lm_eval_model, name, short)
    if given is None:
        assert ask() == expected
    else:
        with pytest.raises(torch.OutOfMemoryError):
            ask()
    assert tried == rows
