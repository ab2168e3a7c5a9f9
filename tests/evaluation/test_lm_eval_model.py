"""What tasks ask of a model: log-likelihoods against one plain run a text, windows, generation."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config, tiny_model

import quamba.evaluation.lm_eval_model as lm_eval_model
from quamba.api import Model, quantize
from quamba.calibration.data import CalibrationSpec
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError
from quamba.evaluation.lm_eval_model import Pair, TaskModel

LENGTHS = [(1, 1), (1, 9), (40, 1), (40, 3), (7, 2), (23, 8), (17, 17), (64, 1), (3, 30)]
NEEDS_LM_EVAL = "needs the package lm-eval"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="module", params=["mamba", "mamba2", "mamba2 w8a8"])
def model(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    family, _, recipe = request.param.partition(" ")
    network = tiny_model(tiny_config(family, vocab_size=257))
    model = Model(network, tokenizer, "tiny")
    if recipe:
        text = tmp_path_factory.mktemp("text") / "calib.txt"
        text.write_text("the sea and the ship and the storm " * 20)
        model, _ = quantize(model, recipe, CalibrationSpec(text, num=4, seqlen=32))
    # In float64 the batch's shape moves no int8 code.
    model.network.set_compute_dtype(torch.float64)
    return model


def pairs() -> list[Pair]:
    """Of many lengths; three share their beginning and one is there twice."""
    draw = random.Random(0)
    made = [
        ([draw.randrange(257) for _ in range(c)], [draw.randrange(257) for _ in range(n)]) for c, n in LENGTHS
    ]
    shared = made[3]
    return [*made, (shared[0], [*shared[1][:-1], 5]), shared, ([*shared[0], *shared[1][:-1]], [9])]


def plain(model: Model, pair: Pair) -> tuple[float, bool]:
    """All logits of one text, one token after the other."""
    context, continuation = pair
    logits = model(torch.tensor([[*context, *continuation]])).logits[0].double()
    value, greedy = 0.0, True
    for position, token in enumerate(continuation, start=len(context) - 1):
        value += logits[position].log_softmax(-1)[token].item()
        greedy &= int(logits[position].argmax()) == token
    return value, greedy


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> bool:
    values = [value for value, _ in expected]
    assert [value for value, _ in found] == pytest.approx(values, abs=1e-5)
    return [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
def test_log_likelihoods_are_those_of_each_text_alone(model: Model, batch_size: int | None) -> None:
    asked = TaskModel(model.network, model.require_tokenizer(), batch_size=batch_size)
    assert close(asked.log_likelihoods(pairs()), [plain(model, pair) for pair in pairs()])


def test_a_greedy_continuation_is_known(model: Model) -> None:
    context = [10, 20, 30]
    answer = model.generate([context], max_new_tokens=6)[0].ids
    worse = [*answer[:-1], (answer[-1] + 1) % 257]
    asked = TaskModel(model.network, model.require_tokenizer())
    found = asked.log_likelihoods([(context, answer), (context, worse), (context, answer[:2])])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_slabs_of_positions_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TaskModel(model.network, model.require_tokenizer())
    whole = asked.log_likelihoods(pairs())
    monkeypatch.setattr(lm_eval_model, "_CPU_SLAB_BYTES", 5 * 4 * model.config.padded_vocab_size)
    assert close(asked.log_likelihoods(pairs()), whole)


def test_logits_are_of_the_continuations_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TaskModel(model.network, model.require_tokenizer())
    positions = []
    score = lm_eval_model.F.cross_entropy

    def spy(logits: torch.Tensor, targets: torch.Tensor, **options: str) -> torch.Tensor:
        positions.append(len(logits))
        return score(logits, targets, **options)

    monkeypatch.setattr(lm_eval_model, "F", SimpleNamespace(cross_entropy=spy))
    monkeypatch.setattr(lm_eval_model, "_CPU_SLAB_BYTES", 5 * 4 * model.config.padded_vocab_size)
    asked.log_likelihoods(pairs())
    assert sum(positions) == sum(len(continuation) for _, continuation in pairs())
    assert max(positions) == 5


def test_a_long_context_loses_its_beginning(model: Model) -> None:
    asked = TaskModel(model.network, model.require_tokenizer(), max_length=12)
    given = [pair for pair in pairs() if len(pair[1]) <= 12]
    cut = [(context[-(13 - len(rest)) :], rest) for context, rest in given]
    assert cut != given
    assert close(asked.log_likelihoods(given), [plain(model, pair) for pair in cut])


def test_a_continuation_that_is_too_long_is_refused(model: Model) -> None:
    asked = TaskModel(model.network, model.require_tokenizer(), max_length=12)
    with pytest.raises(QuambaError, match="a continuation of 13 tokens, expected at most the 12"):
        asked.log_likelihoods([([1], [2] * 13)])


def test_nothing_to_predict_costs_nothing(model: Model) -> None:
    asked = TaskModel(model.network, model.require_tokenizer())
    assert asked.log_likelihoods([([1], []), ([1, 2], [])]) == [(0.0, True)] * 2
    assert asked.log_likelihoods([]) == []


@pytest.fixture
def small(tokenizer: Tokenizer) -> TaskModel:
    return TaskModel(tiny_model(tiny_config("mamba2", vocab_size=257)), tokenizer, max_length=16)


TEXT_PAIRS = [("the sea", " is"), ("the sea ", "is"), ("a  ", " b"), ("a\n", "b"), ("x", ""), (" ", "b")]


def test_spaces_move_to_the_continuation(small: TaskModel, tokenizer: Tokenizer) -> None:
    texts = [
        (tokenizer.decode(a, skip_special_tokens=False), tokenizer.decode(b))
        for a, b in small.encode_pairs(TEXT_PAIRS)
    ]
    end = "<|endoftext|>"
    assert texts == [
        ("the sea", " is"),
        ("the sea", " is"),
        ("a", "   b"),
        ("a", "\nb"),
        ("x", ""),
        (end, " b"),
    ]


def test_an_empty_context_is_end_of_text(small: TaskModel) -> None:
    (first, second) = small.encode_pairs([("", "ab"), ("", "<|endoftext|>ab")])
    assert first == second
    assert first[0] == [0]
    assert len(first[1]) == 2


def test_without_special_tokens_an_empty_context_is_refused(
    small: TaskModel, tiny_tokenizer_folder: Path
) -> None:
    small.tokenizer = Tokenizer(load_tokenizer(tiny_tokenizer_folder).backend, [])
    with pytest.raises(QuambaError, match="neither a begin-of-text nor an end-of-text token"):
        small.encode_pairs([("", "ab")])


def test_pairs_are_split_as_by_lm_eval(small: TaskModel, tokenizer: Tokenizer) -> None:
    api = pytest.importorskip("lm_eval.api.model", reason=NEEDS_LM_EVAL)
    other = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    for pair in TEXT_PAIRS[:-1]:
        assert small.encode_pairs([pair]) == [api.TemplateLM._encode_pair(other, *pair)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 50])
def test_windows_of_a_long_text_are_those_of_lm_eval(
    small: TaskModel, tokenizer: Tokenizer, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason=NEEDS_LM_EVAL)
    text = "".join(random.Random(length).choices("abcdefgh", k=length))
    found: list[Pair] = []

    def listen(pairs: list[Pair]) -> list[tuple[float, bool]]:
        found.extend(pairs)
        return [(0.0, True)] * len(pairs)

    monkeypatch.setattr(small, "log_likelihoods", listen)
    small.rolling_log_likelihoods([text])
    windows = utils.get_rolling_token_windows(tokenizer.encode(text), 0, small.max_length, 1)
    assert found == [utils.make_disjoint_window(window) for window in windows]


def test_a_rolling_log_likelihood_is_the_sum_over_the_text(small: TaskModel, tokenizer: Tokenizer) -> None:
    texts = ["the sea", "", "a storm came up from the west, and"]
    small.max_length = 2048
    model = Model(small.network, tokenizer, "tiny")
    expected = [plain(model, ([0], tokenizer.encode(text)))[0] for text in texts]
    assert small.rolling_log_likelihoods(texts) == pytest.approx(expected, abs=1e-4)
    small.max_length = 8
    assert small.rolling_log_likelihoods(texts)[:2] == pytest.approx(expected[:2], abs=1e-4)
    assert small.rolling_log_likelihoods(texts)[2] != pytest.approx(expected[2], abs=1e-4)


PROMPTS = ["the sea", "a storm came", "x", "", "the captain of"]


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_generation_is_that_of_each_prompt_alone(small: TaskModel, batch_size: int | None) -> None:
    small.max_length, small.batch_size = 100, batch_size
    lengths = [3, 8, 8, 8, 3]
    requests = [(text, {"until": [], "max_gen_toks": n}) for text, n in zip(PROMPTS, lengths, strict=True)]
    model = Model(small.network, small.tokenizer, "tiny")
    expected = [
        model.generate(text, max_new_tokens=n)[0].text for text, n in zip(PROMPTS, lengths, strict=True)
    ]
    assert small.generate(requests) == expected


def test_a_stop_text_ends_the_generation(small: TaskModel) -> None:
    small.max_length = 200
    options = {"max_gen_toks": 60, "repetition_penalty": 20.0}  # or it would say one letter only
    (whole,) = small.generate([("the sea", options)])
    stop = whole[20:22]
    assert 0 < whole.index(stop) <= 20
    passes = []
    counting = small.network.register_forward_hook(lambda *_: passes.append(0))
    (cut,) = small.generate([("the sea", {**options, "until": stop})])
    counting.remove()
    assert cut == whole[: whole.index(stop)]
    assert 1 < len(passes) <= 46  # of 60: some letters are several bytes


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_length(small: TaskModel, name: str) -> None:
    (text,) = small.generate([("the sea", {name: 4, "until": None})])
    model = Model(small.network, small.tokenizer, "tiny")
    assert text == model.generate("the sea", max_new_tokens=4)[0].text


def test_a_long_prompt_keeps_room_for_the_answer(small: TaskModel) -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz"
    model = Model(small.network, small.tokenizer, "tiny")
    expected = model.generate(prompt[-12:], max_new_tokens=4)[0].text
    assert small.generate([(prompt, {"max_gen_toks": 4})]) == [expected]
    with pytest.raises(QuambaError, match="asks for 16 new tokens, expected fewer than the 16"):
        small.generate([(prompt, {"max_gen_toks": 16})])


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"do_sample": False, "temperature": 3.0, "top_p": 0.9}, True),
        ({"do_sample": True}, False),
        ({"temperature": 3.0}, False),
        ({"do_sample": True, "temperature": 3.0, "top_k": 0}, False),
    ],
)
def test_sampling_as_the_task_says(small: TaskModel, options: dict[str, float], greedy: bool) -> None:
    small.max_length = 100
    assert small._read_options(options)[2].greedy is greedy
    hot = {"temperature": 30.0} if "do_sample" in options and not greedy else {}  # tiny models are very sure
    request = ("the sea", {"max_gen_toks": 20, **options, **hot})
    (text,) = small.generate([("the sea", {"max_gen_toks": 20})])
    assert (small.generate([request]) == [text]) is greedy
    assert small.generate([request]) == small.generate([request])
    assert small.notes == []


def test_options_without_a_meaning_are_told_once(small: TaskModel) -> None:
    small.generate([(text, {"max_gen_toks": 2, "num_beams": 4}) for text in PROMPTS[:3]])
    small.generate([("x", {"max_gen_toks": 3, "num_beams": 4})])
    assert small.notes == ["A task's generation option 'num_beams' has no meaning here and is left out."]


def test_progress_counts_every_text(small: TaskModel) -> None:
    seen: list[tuple[str, int] | int] = []
    stage, step = (lambda name, total: seen.append((name, total))), (lambda count=1: seen.append(count))
    small.progress = SimpleNamespace(stage=stage, step=step)
    small.max_length = 2048
    small.log_likelihoods(pairs())
    assert seen[0] == ("Log-likelihoods", len(pairs()))
    assert sum(count for count in seen[1:] if isinstance(count, int)) == len(pairs())


def test_without_lm_eval_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QuambaError, match=r"needs the package 'lm-eval'.*pip install 'quamba\[eval\]'"):
        lm_eval_model.import_lm_eval()


def test_lm_eval_gets_answers_in_its_order(small: TaskModel) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS_LM_EVAL)
    asked = lm_eval_model.lm_eval_model(small)
    requests = [SimpleNamespace(args=pair) for pair in TEXT_PAIRS]
    assert asked.loglikelihood(requests) == small.log_likelihoods(small.encode_pairs(TEXT_PAIRS))
    texts = [SimpleNamespace(args=(text,)) for text, _ in TEXT_PAIRS]
    assert asked.loglikelihood_rolling(texts) == small.rolling_log_likelihoods([t for t, _ in TEXT_PAIRS])
    prompts = [(text, {"max_gen_toks": 3}) for text in PROMPTS]
    assert asked.generate_until([SimpleNamespace(args=args) for args in prompts]) == small.generate(prompts)
