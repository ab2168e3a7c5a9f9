from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.runtime.sampling import (
    Rules,
    SamplingParams,
    choose,
    draw,
    sample,
    truncated_probabilities,
)

# Probabilities that are exact in binary, in no order.
PROBABILITIES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625], dtype=torch.float64)
LOGITS = PROBABILITIES.log()[None]


def free(**changes: float) -> SamplingParams:
    """Everything off, but for changes."""
    return SamplingParams(**{"top_k": 0, **changes})


def probabilities(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> list[float]:
    return truncated_probabilities(logits, params, seen)[0].tolist()


def approx(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-14, abs=0)


def test_nothing_on_is_the_softmax() -> None:
    assert probabilities(LOGITS, free()) == approx(PROBABILITIES.tolist())


def test_temperature() -> None:
    squared = PROBABILITIES**2
    assert probabilities(LOGITS, free(temperature=0.5)) == approx((squared / squared.sum()).tolist())
    assert probabilities(100 * LOGITS.float(), free(temperature=1e-300)) == [0, 1, 0, 0, 0]


def test_top_k() -> None:
    assert probabilities(LOGITS, free(top_k=2)) == approx([0, 2 / 3, 0, 1 / 3, 0])
    assert probabilities(LOGITS, free(top_k=5)) == approx(PROBABILITIES.tolist())
    assert probabilities(LOGITS, free(top_k=500)) == approx(PROBABILITIES.tolist())


def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_ties() -> None:
    assert probabilities(LOGITS, free(top_k=4)) == approx([2 / 15, 8 / 15, 1 / 15, 4 / 15, 0])
    assert probabilities(torch.zeros(1, 4), free(top_k=3)) == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 0], rel=1e-6
    )


def test_top_p() -> None:
    assert probabilities(LOGITS, free(top_p=0.8)) == approx([1 / 7, 4 / 7, 0, 2 / 7, 0])
    assert probabilities(LOGITS, free(top_p=0.6)) == approx([0, 2 / 3, 0, 1 / 3, 0])
    assert probabilities(LOGITS, free(top_p=1e-9)) == [0, 1, 0, 0, 0], "one token always stays"
    tied = probabilities(LOGITS, free(top_p=0.9))
    assert tied == approx([2 / 15, 8 / 15, 1 / 15, 4 / 15, 0]), "among equals the lowest id"


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([[4.0, 2.0, 1.0, 1.0]], dtype=torch.float64))
    exact = logits.softmax(-1).tolist()[0]
    assert exact[0] == 0.5
    assert probabilities(logits, free(top_p=0.5)) == [1, 0, 0, 0]


def test_min_p_is_relative_to_the_largest() -> None:
    assert probabilities(LOGITS, free(min_p=0.3)) == approx([0, 2 / 3, 0, 1 / 3, 0])
    assert probabilities(LOGITS, free(min_p=0.2)) == approx([1 / 7, 4 / 7, 0, 2 / 7, 0])
    assert probabilities(LOGITS, free(min_p=1.0)) == [0, 1, 0, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, -4.0, 0.0, 1.0], dtype=torch.float64).softmax(0).tolist()
    mask = torch.tensor([[True, True, True, False]])
    assert probabilities(logits, free(repetition_penalty=2.0), mask) == approx(expected)
    ids = torch.tensor([[1, 0, 2, 1, 0, -1, -1]])
    assert probabilities(logits, free(repetition_penalty=2.0), ids) == approx(expected), "once however often"
    plain = logits.softmax(-1)[0].tolist()
    assert probabilities(logits, free(repetition_penalty=2.0)) == approx(plain)
    assert probabilities(logits, free(repetition_penalty=2.0), torch.full((1, 3), -1)) == approx(plain)
    assert logits.tolist() == [[2.0, -2.0, 0.0, 1.0]], "the argument is left alone"


def test_order_penalty_top_k_temperature_top_p_min_p() -> None:
    # Penalty before top-k: the penalised largest falls out.
    logits = torch.tensor([[4.0, 3.0, 2.5]], dtype=torch.float64)
    seen = torch.tensor([[0]])
    assert probabilities(logits, free(top_k=2, repetition_penalty=2.0), seen)[0] == 0
    # Temperature before top-p: at 0.5 the shares are 64 16 4 1 1 of 86, and 64 + 16 is more than 0.9 x 86.
    assert probabilities(LOGITS, free(temperature=0.5, top_p=0.9)) == approx([0, 0.8, 0, 0.2, 0])
    # Top-k before top-p: of 1/2 and 1/4 the first has 2/3, enough for 0.66.
    assert probabilities(LOGITS, free(top_k=2, top_p=0.66)) == [0, 1, 0, 0, 0]
    assert probabilities(LOGITS, free(top_p=0.66)) == approx([0, 2 / 3, 0, 1 / 3, 0])
    # Temperature before min-p: the second has a quarter of the first at 0.5, half of it at 1.
    assert probabilities(LOGITS, free(temperature=0.5, min_p=0.3)) == [0, 1, 0, 0, 0]


def test_rows_are_independent() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    seen = torch.rand(5, 40, generator=generator) < 0.3
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    together = truncated_probabilities(logits, params, seen)
    assert torch.allclose(together.sum(-1), torch.ones(5, dtype=torch.float64), rtol=1e-14)
    for row in range(5):
        alone = truncated_probabilities(logits[row : row + 1], params, seen[row : row + 1])
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("params", [SamplingParams(), free(temperature=0.0), SamplingParams(temperature=0.3)])
def test_greedy_takes_the_lowest_id_of_the_largest(params: SamplingParams) -> None:
    assert params.greedy
    logits = torch.zeros(2, 5000)
    logits[0, [700, 30, 4000]] = 3.0
    tokens = sample(logits, params)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [30, 0]
    assert truncated_probabilities(logits, params).nonzero().tolist() == [[0, 30], [1, 0]]


def test_greedy_penalises_too() -> None:
    logits = torch.tensor([[3.0, 2.0], [3.0, 2.0]])
    assert sample(logits, SamplingParams(repetition_penalty=2.0), torch.tensor([[0], [-1]])).tolist() == [
        1,
        0,
    ]


def test_the_defaults_but_top_k_are_not_greedy() -> None:
    assert not free().greedy and not SamplingParams(top_k=2).greedy


def test_the_generator_decides() -> None:
    logits = torch.zeros(4, 1000)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([sample(logits, free(), generator=generator) for _ in range(3)]).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequencies_follow_the_probabilities() -> None:
    count = 40_000
    params = free(top_p=0.8)
    tokens = sample(LOGITS.expand(count, -1), params, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(tokens, minlength=5) / count
    expected = torch.tensor([1 / 7, 4 / 7, 0, 2 / 7, 0])
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4 * deviation).all(), "and nothing outside the nucleus, ever"


def test_a_draw_is_the_inverse_of_the_running_sum() -> None:
    """Of 1/8 1/2 1/16 1/4 1/16: each token for the share of the numbers that is its probability."""
    uniforms = torch.arange(64, dtype=torch.float64) / 64
    tokens = draw(PROBABILITIES.expand(64, -1), uniforms)
    assert tokens.tolist() == [0] * 8 + [1] * 32 + [2] * 4 + [3] * 16 + [4] * 4
    assert draw(3 * PROBABILITIES.expand(64, -1), uniforms).tolist() == tokens.tolist(), "whatever the sum is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_never_gives_what_has_no_probability(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 50, generator=generator, dtype=dtype)
    probabilities *= torch.rand(200, 50, generator=generator) < 0.1
    probabilities[:, 25] = 1e-3
    for uniforms in (torch.zeros(200), torch.full((200,), 1 - 2.0**-53, dtype=torch.float64)):
        tokens = draw(probabilities, uniforms.double())
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()
        ends = torch.stack([row.nonzero()[0 if uniforms[0] == 0 else -1] for row in probabilities])
        assert torch.equal(tokens[:, None], ends), "the first and the last that have any"


def test_a_row_of_one_token_is_drawn_whatever_the_number() -> None:
    logits = torch.full((3, 7), -math.inf)
    logits[:, 4] = 0.0
    assert (
        draw(logits.softmax(-1), torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)).tolist()
        == [4] * 3
    )


def test_settings_in_memory_are_those_of_the_arguments() -> None:
    """What a graph computes: rules are fixed, numbers are read."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    seen = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) < 0.3
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    generator = torch.Generator().manual_seed(3)
    uniforms = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = sample(logits, params, seen, generator)
    assert torch.equal(choose(logits, params.rules, params.numbers("cpu"), seen, uniforms), expected)
    other = SamplingParams(temperature=9.0, top_k=20, top_p=0.99, min_p=0.01, repetition_penalty=5.0)
    assert other.rules == params.rules
    changed = choose(logits, params.rules, other.numbers("cpu"), seen, uniforms)
    assert torch.equal(changed, choose(logits, other.rules, other.numbers("cpu"), seen, uniforms))
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({}, Rules(False, False, 0, False, False)),
        ({"temperature": 0.0, "top_p": 0.5, "min_p": 0.1}, Rules(True, False, 0, False, False)),
        ({"top_k": 1, "repetition_penalty": 2.0}, Rules(True, True, 0, False, False)),
        ({"top_k": 7, "top_p": 0.5, "min_p": 0.1}, Rules(False, False, 7, True, True)),
    ],
)
def test_rules(change: dict[str, float], rules: Rules) -> None:
    assert free(**change).rules == rules


def test_half_precision_logits() -> None:
    result = truncated_probabilities(LOGITS.half(), free(top_k=2))
    assert result.dtype == torch.float32
    assert torch.equal(result, truncated_probabilities(LOGITS.half().float(), free(top_k=2)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, expected an integer"),
        ({"top_k": 1.5}, "top_k is 1.5, expected an integer"),
        ({"top_p": 0.0}, "top_p is 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1, expected 0 <= min_p <= 1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
    ],
)
def test_bad_settings(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(QuambaError, match=sentence):
        SamplingParams(**change)
