"""Budgets as they are typed."""

from __future__ import annotations

import pytest

from quamba.errors import QuambaError
from quamba.search.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("texts", "budget"),
    [
        (["14xW4A16"], Budget({"W4A16": 14})),
        (["2xw8a8,1xFP16"], Budget({"W8A8": 2, "FP16": 1})),
        (["weights=1.4GB"], Budget({}, {"weights": 1.4e9})),
        (["weights=3MiB", "tpot=900us"], Budget({}, {"weights": 3 * 2**20, "tpot": 0.9})),
        (["2xW4A16, ttft=0.08s"], Budget({"W4A16": 2}, {"ttft": 80.0})),
    ],
    ids=["count", "counts", "weights", "two", "both"],
)
def test_read(texts: list[str], budget: Budget) -> None:
    found = parse_budget(texts, "W4A8")
    assert found.counts == budget.counts
    assert found.most == pytest.approx(dict(budget.most))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3xW4A6", "The precision is 'W4A6', expected one of .* Did you mean 'W4A"),
        ("3xW4A8", "counts the blocks of W4A8, which are those that are left over"),
        ("wieghts=3GB", "limit in 'wieghts=3GB' is 'wieghts', expected one of .* Did you mean 'weights'"),
        ("weights=3", "unit in 'weights=3' is '', expected one of 'B'"),
        ("tpot=1.2GB", "unit in 'tpot=1.2GB' is 'GB', expected one of 'us', 'ms', 's'"),
        ("tpot=0ms", "expected a number above 0"),
        ("tpot=1.2.3ms", "expected a number above 0"),
        ("lots", "The budget is 'lots', expected a count such as 14xW4A16"),
        ("1xW8A8,2xW8A8", "names W8A8 twice"),
        ("tpot=1ms,tpot=2ms", "names tpot twice"),
    ],
)
def test_refused(text: str, sentence: str) -> None:
    with pytest.raises(QuambaError, match=sentence):
        parse_budget([text], "W4A8")
