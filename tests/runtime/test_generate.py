from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor

from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError
from quamba.kernels.registry import REFERENCE
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.recipe import Precision, Recipe
from quamba.runtime.generate import Generation, Run, generate, prefill
from quamba.runtime.sampling import SamplingParams, sample
from quamba.runtime.stream_text import stream_text

FREE = SamplingParams(top_k=0, temperature=2.0)
PROMPTS = [[5, 9, 2], [17], [40, 3, 3, 60, 21, 8, 11, 30, 1], [7, 7, 12, 50]]


@pytest.fixture
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    """``<|endoftext|>`` = 0, then one id a byte."""
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class Texts:
    """Random calibration ids: what ``quantize_model`` asks of a calibration set."""

    def batches(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        yield torch.randint(61, (4, 32), generator=generator), None

    def to_dict(self) -> dict[str, Any]:
        return {"source": "random"}


def float_model(family: str, dtype: torch.dtype = torch.float32) -> MambaLM:
    # A head of its own: with a tied one a random model mostly repeats its last token.
    return tiny_model(tiny_config(family, tie_embeddings=False), dtype=dtype)


def quantized(family: str, state: str = "int8") -> MambaLM:
    precision = Precision(weights="int8", activations="int8", state=state)
    recipe = Recipe(name="tiny", blocks=precision, embedding="int8", head=precision)
    return quantize_model(float_model(family), recipe, Texts())[0]


def ids_of(run: Run) -> list[list[int]]:
    return [generation.ids for generation in run.collect()]


@dataclass
class ScriptCache:
    rows: Tensor
    step: int = 0

    def select(self, lines: Tensor) -> ScriptCache:
        return ScriptCache(self.rows[lines], self.step)


class Script:
    """A network that says the given ids of each row, then id 1, whatever it reads."""

    def __init__(self, *rows: list[int]) -> None:
        self.config = SimpleNamespace(vocab_size=257)
        self.device = torch.device("cpu")
        self.kernels = REFERENCE
        self.rows = rows
        self.batch_sizes: list[int] = []

    def new_cache(self, batch: int) -> ScriptCache:
        return ScriptCache(torch.arange(batch))

    def __call__(self, ids: Tensor, cache: ScriptCache, mask: Any = None, *, last_only: bool) -> Tensor:
        assert last_only and len(ids) == len(cache.rows)
        self.batch_sizes.append(len(ids))
        logits = torch.zeros(len(ids), 1, 264)
        for line, row in enumerate(cache.rows.tolist()):
            said = self.rows[row]
            logits[line, 0, said[cache.step] if cache.step < len(said) else 1] = 1.0
        cache.step += 1
        return logits


def say(tokenizer: Tokenizer, *texts: str | list[int]) -> Script:
    return Script(*(tokenizer.encode(text) if isinstance(text, str) else text for text in texts))


# Prefill and decode


def test_greedy_is_the_argmax_of_repeated_full_passes(family: str) -> None:
    network = float_model(family, dtype=torch.float64)
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(network(torch.tensor([ids]))[0, -1, :61].argmax()))
        assert ids_of(generate(network, None, [prompt], max_new_tokens=12)) == [ids[len(prompt) :]]


def test_a_batch_of_several_lengths_is_each_prompt_alone(family: str) -> None:
    network = float_model(family, dtype=torch.float64)
    together = ids_of(generate(network, None, PROMPTS, max_new_tokens=12))
    alone = [ids_of(generate(network, None, [prompt], max_new_tokens=12))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS), "else this shows nothing"


def test_int8_states_generate_what_single_steps_give(family: str) -> None:
    network = quantized(family)
    assert network.new_cache(1).layers[0].ssm_state.dtype == torch.int8
    cache = network.new_cache(1)
    logits = network(torch.tensor([PROMPTS[2]]), cache)[0, -1]
    ids = []
    for _ in range(10):
        ids.append(int(logits[:61].argmax()))
        logits = network(torch.tensor([ids[-1:]]), cache)[0, -1]
    run = generate(network, None, [PROMPTS[2]], max_new_tokens=10)
    assert ids_of(run) == [ids] == ids_of(run)
    sampled = generate(network, None, PROMPTS, max_new_tokens=10, sampling=FREE, seed=3)
    assert ids_of(sampled) == ids_of(sampled)


# Which ids are chosen


def with_loud_padding(family: str, loud: list[int]) -> MambaLM:
    """The rows of the head at ``loud`` beat every other: +v and -v, so one of them is large."""
    network = float_model(family)
    for k, row in enumerate(loud):
        network.lm_head.weight[row] = 50.0 * (-1) ** k
    return network


@pytest.mark.parametrize("params", [SamplingParams(), FREE])
def test_padding_rows_are_never_chosen(family: str, params: SamplingParams) -> None:
    network = with_loud_padding(family, [61, 62])
    assert (prefill(network, torch.tensor([[3]]))[0].argmax(-1) >= 61).all()
    ids = ids_of(generate(network, None, PROMPTS, max_new_tokens=20, sampling=params, seed=0))
    assert all(0 <= i < 61 for row in ids for i in row)


def test_rows_without_a_token_are_never_chosen(family: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    words = Tokenizer(Backend(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")), [])
    network = with_loud_padding(family, [50, 60])
    assert ids_of(generate(network, None, [[3]], max_new_tokens=1))[0][0] in (50, 60)
    ids = ids_of(generate(network, words, [[3], [55]], max_new_tokens=20, sampling=FREE, seed=0))
    assert all(i < 50 for row in ids for i in row)


def test_the_repetition_penalty_sees_prompt_and_answer(family: str) -> None:
    network = float_model(family, dtype=torch.float64)
    params = SamplingParams(repetition_penalty=8.0)
    runs = generate(network, None, PROMPTS, max_new_tokens=12, sampling=params)
    for prompt, found in zip(PROMPTS, ids_of(runs), strict=True):
        ids = list(prompt)
        for _ in range(12):
            logits = network(torch.tensor([ids]))[:, -1, :61]
            ids.append(int(sample(logits, params, torch.tensor([ids]))))
        assert found == ids[len(prompt) :]
    plain = ids_of(generate(network, None, PROMPTS, max_new_tokens=12))
    assert plain != ids_of(runs)


def test_the_seed_decides(family: str) -> None:
    network = float_model(family)

    def draw(seed: int | None) -> list[list[int]]:
        return ids_of(generate(network, None, PROMPTS, max_new_tokens=10, sampling=FREE, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    torch.manual_seed(5)
    first = draw(None)
    torch.manual_seed(5)
    assert draw(None) == first, "without a seed torch's own decides"
    twins = ids_of(generate(network, None, [[3], [3]], max_new_tokens=10, sampling=FREE, seed=1))
    assert twins[0] != twins[1]
    shifted = ids_of(generate(network, None, [[3]], max_new_tokens=10, sampling=FREE, seed=2))
    assert shifted[0] != twins[1], "row 1 of seed 1 is not row 0 of seed 2"


def test_draws_do_not_depend_on_the_other_rows(family: str) -> None:
    network = float_model(family, dtype=torch.float64)

    def draw(*prompts: list[int]) -> list[list[int]]:
        return ids_of(generate(network, None, list(prompts), max_new_tokens=10, sampling=FREE, seed=1))

    a, b, c, d = PROMPTS
    assert draw(a, b, d)[::2] == draw(a, c, d)[::2]
    assert draw(a)[0] == draw(a, b)[0]


# Where a sequence ends


def test_an_end_of_text_token_ends_a_row_and_is_not_given(tokenizer: Tokenizer) -> None:
    script = say(tokenizer, [*tokenizer.encode("ab"), 0, 5, 5], "abcd", [0])
    found = generate(script, tokenizer, ["x", "y", "z"], max_new_tokens=4).collect()
    assert [g.text for g in found] == ["ab", "abcd", ""]
    assert [g.finished for g in found] == ["eos", "length", "eos"]
    assert [len(g.ids) for g in found] == [2, 4, 0]
    assert {g.tokens for g in found} == {3 + 4 + 1}
    assert [tokenizer.decode(g.prompt_ids) for g in found] == ["x", "y", "z"]


def test_every_end_of_text_id_counts(tokenizer: Tokenizer) -> None:
    several = Tokenizer(tokenizer.backend, [], [0, 9])
    assert generate(Script([4, 9, 4]), several, [[3]]).collect()[0].ids == [4]
    assert generate(Script([4, 9, 4]), None, [[3]], max_new_tokens=3).collect()[0].ids == [4, 9, 4]


def test_stop_texts_end_a_row(tokenizer: Tokenizer) -> None:
    script = say(tokenizer, "one\nUser: two", "one\nUse of it", "x User:", "é")

    def run(*stop: str, max_new_tokens: int = 11) -> list[Generation]:
        return generate(script, tokenizer, ["a"] * 4, max_new_tokens=max_new_tokens, stop=stop).collect()

    found = run("\nUser:", "x")
    assert [g.text for g in found[:3]] == ["one", "one\nUse of ", ""]
    assert [g.finished for g in found] == ["stop", "length", "stop", "length"]
    assert tokenizer.decode(found[0].ids) == "one\nUser:", "the ids up to the end of the stop text"
    assert run("é")[3].finished == "stop" and len(run("é")[3].ids) == 2
    assert run("User:", max_new_tokens=9)[0].finished == "stop", "with the last id"
    assert generate(script, tokenizer, ["a"] * 4, stop="ne").collect()[0].text == "o", "one text, not letters"
    assert (
        generate(say(tokenizer, "cd"), tokenizer, "ab", stop="bc", max_new_tokens=2).collect()[0].text == "cd"
    )


def test_rows_that_have_ended_are_dropped_and_change_nothing(tokenizer: Tokenizer, family: str) -> None:
    script = Script([4, 0], [4] * 8, [0], [4, 4, 4, 4, 0])
    found = generate(script, tokenizer, ["a"] * 4, max_new_tokens=8).collect()
    assert [len(g.ids) for g in found] == [1, 8, 0, 4]
    assert script.batch_sizes == [4, 4, 2, 2, 2, 1, 1, 1]

    network = float_model(family, dtype=torch.float64)
    params = replace(FREE, repetition_penalty=1.5)
    free = ids_of(generate(network, None, PROMPTS, max_new_tokens=20, sampling=params, seed=0))
    eos = [free[0][2], free[2][6], free[1][9]]
    ending = Tokenizer(tokenizer.backend, [], eos)
    found = generate(network, ending, PROMPTS, max_new_tokens=20, sampling=params, seed=0).collect()
    for whole, row in zip(free, found, strict=True):
        end = next((i for i, token in enumerate(whole) if token in eos), 20)
        assert row.ids == whole[:end]
        assert row.finished == ("eos" if end < 20 else "length")
    assert len({len(row.ids) for row in found}) >= 3


def test_max_new_tokens_does_not_count_the_prompt(family: str) -> None:
    network = float_model(family)
    for count in (1, 2):
        (found,) = generate(network, None, [PROMPTS[2]], max_new_tokens=count).collect()
        assert (len(found.ids), found.finished, found.tokens) == (count, "length", count)
        assert found.text == ""
        assert found.prefill_seconds > 0
        assert (found.decode_seconds > 0) == (count > 1)


# Streaming


def test_streamed_ids_are_the_collected_ones(tokenizer: Tokenizer) -> None:
    script = say(tokenizer, [4, 0], "abc", [0], "abcd\nef")
    run = generate(script, tokenizer, ["a"] * 4, max_new_tokens=6, stop=["\n"])
    steps = list(run.stream())
    assert all(s.shape == (4,) and s.dtype == torch.int64 for s in steps)
    rows = torch.stack(steps, dim=1).tolist()
    for row, generation in zip(rows, run.collect(), strict=True):
        assert row == generation.ids + [-1] * (len(steps) - len(generation.ids))
    assert len(steps) == 6
    for row, generation in enumerate(run.collect()):
        assert "".join(stream_text(run.stream(), tokenizer, run.stop, row=row)) == generation.text


def test_no_step_is_streamed_in_which_every_row_ends(tokenizer: Tokenizer) -> None:
    assert list(generate(Script([0], [0]), tokenizer, ["a", "b"]).stream()) == []
    steps = list(generate(Script([4, 0], [5, 0]), tokenizer, ["a", "b"]).stream())
    assert [s.tolist() for s in steps] == [[4, 5]]


@pytest.mark.parametrize("make", [float_model, quantized])
def test_a_stream_is_the_run_and_comes_step_by_step(family: str, make: Callable[[str], MambaLM]) -> None:
    network = make(family)
    run = generate(network, None, PROMPTS, max_new_tokens=8, sampling=FREE)
    assert torch.stack(list(run.stream()), dim=1).tolist() == ids_of(run), "one seed a run, given or not"
    passes: list[int] = []
    network.lm_head.register_forward_hook(lambda *_: passes.append(1))
    stream = run.stream()
    assert passes == []
    next(stream)
    assert len(passes) == 1


def test_time_between_steps_is_the_callers(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from quamba.runtime import generate as module

    now = 0.0

    class Clocked(Script):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal now
            now += 1.0
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    run = generate(Clocked([4] * 5), tokenizer, "a", max_new_tokens=5)
    timing = module._Timing()
    for _ in module._steps(run, module._new_rows(run), timing):
        now += 100.0
    assert timing.step_seconds == [1.0] * 5
    (found,) = run.collect()
    assert (found.prefill_seconds, found.decode_seconds) == (1.0, 4.0)


# Prompts


def test_prompts_of_every_kind(tokenizer: Tokenizer) -> None:
    def read(prompts: Any) -> list[list[int]]:
        return generate(Script([4], [4]), tokenizer, prompts).prompts

    ids = tokenizer.encode("ab")
    assert read("ab") == read(["ab"]) == read(torch.tensor(ids)) == read([ids]) == read([tuple(ids)]) == [ids]
    assert read(["ab", "b"]) == [ids, ids[1:]]
    assert read(torch.tensor([ids, ids], dtype=torch.int32)) == [ids, ids]


def test_an_empty_prompt_is_the_end_of_text_token(tokenizer: Tokenizer) -> None:
    for empty in ("", [""], [[]], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        assert generate(Script([4]), tokenizer, empty).prompts == [[0]]
    with pytest.raises(QuambaError, match=r"Prompt 2 is empty, and there is no end-of-text token"):
        generate(Script([4]), None, [[1], []])


@pytest.mark.parametrize(
    ("prompts", "changes", "sentence"),
    [
        ([], {}, "There is no prompt"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, "There is no prompt"),
        ([[3], [4, 257]], {}, r"Prompt 2 has the id 257, expected ids of the model's vocabulary, 0 to 256"),
        ([[-1]], {}, "Prompt 1 has the id -1"),
        (torch.tensor([[263]]), {}, "Prompt 1 has the id 263"),
        (torch.tensor([1.0]), {}, r"The prompt ids are torch.float32 of shape \[1\]"),
        (torch.tensor(1), {}, r"of shape \[\], expected int64 of shape"),
        ([[1.5]], {}, "The prompts are of an unknown kind"),
        (["a", [1]], {}, "The prompts are of an unknown kind"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer of at least 1"),
        ("a", {"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ("a", {"max_new_tokens": True}, "max_new_tokens is True"),
        ("a", {"seed": -1}, "The seed is -1, expected an integer of at least 0"),
        ("a", {"seed": 1.0}, "The seed is 1.0"),
        ("a", {"stop": [""]}, r"The stop texts are \[''\], expected non-empty strings"),
        ("a", {"stop": ""}, "expected non-empty strings"),
        ("a", {"stop": [3]}, "expected non-empty strings"),
    ],
)
def test_bad_requests(tokenizer: Tokenizer, prompts: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QuambaError, match=sentence):
        generate(Script([4]), tokenizer, prompts, **changes)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(QuambaError, match="no tokenizer, expected token ids"):
        generate(Script([4]), None, "a")
    with pytest.raises(QuambaError, match="Stop texts need a tokenizer"):
        generate(Script([4]), None, [[1]], stop=["a"])
