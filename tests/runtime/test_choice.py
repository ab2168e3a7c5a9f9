"""What a chooser remembers, and what its draws depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quamba.runtime import choice as module
from quamba.runtime.choice import Choice, Chooser, row_generator
from quamba.runtime.sampling import SamplingParams, sample

CPU = torch.device("cpu")
VOCAB = 30
FREE = SamplingParams(top_k=0)
PENALISED = SamplingParams(top_k=12, temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.4)
PROMPTS = [[3, 29, 31], [], [7, 7]]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 4)


def logits(step: int, batch: int = 3) -> Tensor:
    """Some, with columns beyond the vocabulary that are larger than all others."""
    found = torch.randn(batch, VOCAB + 3, generator=torch.Generator().manual_seed(step))
    found[:, VOCAB:] = 100.0
    return found


def begun(params: SamplingParams, seed: int = 0, prompts: list[list[int]] = PROMPTS) -> Chooser:
    made = Chooser(len(prompts), VOCAB, params.rules, CPU)
    return made.begin(Choice.seeded(VOCAB, params, prompts, seed))


def chosen(chooser: Chooser, steps: range = range(11), batch: int = 3) -> list[list[int]]:
    """The ids of each step."""
    found = []
    for step in steps:
        chooser.prepare()
        found.append(chooser.choose(logits(step, batch)).tolist())
    return found


@pytest.mark.parametrize("params", [SamplingParams(), FREE, PENALISED], ids=["greedy", "free", "penalised"])
def test_choices_are_those_of_sample(params: SamplingParams) -> None:
    """One uniform number of a row's own generator a step; the ids of prompt and answer count as seen."""
    found = chosen(begun(params, seed=5))
    for row, prompt in enumerate(PROMPTS):
        generator = row_generator(5, row)
        seen = [i for i in prompt if i < VOCAB] or [-1]
        for step in range(11):
            expected = sample(
                logits(step)[row : row + 1, :VOCAB], params, torch.tensor([seen]), generator=generator
            )
            assert found[step][row] == int(expected)
            seen.append(int(expected))
    assert max(map(max, found)) < VOCAB


def test_seeds_and_rows_have_numbers_of_their_own() -> None:
    assert chosen(begun(FREE, 1)) == chosen(begun(FREE, 1)) != chosen(begun(FREE, 2))
    flat = torch.zeros(2, VOCAB)
    chooser = begun(FREE, 1, [[], []])
    draws = []
    for _ in range(20):
        chooser.prepare()
        draws.append(chooser.choose(flat).tolist())
    first, second = zip(*draws, strict=True)
    assert first != second
    assert len(set(first)) > 10, "and all of a block are used"
    late = Choice.seeded(VOCAB, FREE, [[]], 1, first=1)
    chooser = Chooser(1, VOCAB, FREE.rules, CPU).begin(late)
    assert [chosen_from(chooser, flat[:1]) for _ in range(20)] == list(second)


def chosen_from(chooser: Chooser, values: Tensor) -> int:
    chooser.prepare()
    return int(chooser.choose(values))


@pytest.mark.parametrize("after", [1, 4, 6])
def test_taking_over_from_another(after: int) -> None:
    expected = chosen(begun(PENALISED, 3))
    first, second = begun(PENALISED, 3), begun(PENALISED, 4, [[1], [2], [4]])
    chosen(second, range(20, 23))
    early = chosen(first, range(after))
    second.take(first)
    assert early + chosen(second, range(after, 11)) == expected


def test_beginning_anew_with_other_settings() -> None:
    chooser = begun(PENALISED, 3)
    first = chosen(chooser)
    assert chosen(chooser) != first
    assert chosen(chooser.begin(Choice.seeded(VOCAB, PENALISED, PROMPTS, 3))) == first
    hot = SamplingParams(top_k=12, temperature=50.0, top_p=0.9, min_p=0.01, repetition_penalty=1.4)
    assert hot.rules == PENALISED.rules
    assert chosen(chooser.begin(Choice.seeded(VOCAB, hot, PROMPTS, 3))) == chosen(begun(hot, 3)) != first
    with pytest.raises(AssertionError):
        chooser.begin(Choice.seeded(VOCAB, FREE, PROMPTS, 3))


@pytest.mark.parametrize("params", [SamplingParams(), PENALISED], ids=["greedy", "penalised"])
def test_dropped_rows_change_nothing(params: SamplingParams) -> None:
    expected = chosen(begun(params, 3))
    chooser = begun(params, 3)
    found = chosen(chooser, range(3))
    chooser.keep([0, 2])
    for step in range(3, 11):
        chooser.prepare()
        found.append(chooser.choose(logits(step)[[0, 2]]).tolist())
    assert found == expected[:3] + [[row[0], row[2]] for row in expected[3:]]


def test_what_a_graph_holds_stays_where_it_is() -> None:
    chooser = begun(PENALISED, 3)

    def addresses() -> list[int]:
        return [value.data_ptr() for value in vars(chooser).values() if isinstance(value, Tensor)]

    before = addresses()
    chosen(chooser)
    chooser.begin(Choice.seeded(VOCAB, PENALISED, PROMPTS, 4))
    chooser.take(begun(PENALISED, 5))
    assert addresses() == before and len(before) == 4
