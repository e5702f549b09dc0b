"""However calls end, retries stay a share of what succeeds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.retry_budget import RetryBudget


@given(st.lists(st.booleans(), max_size=2000))
def test_calls_tried_again_are_at_most_ten_and_a_tenth_of_all(outcomes: list[bool]) -> None:
    budget, retries = RetryBudget(), 0
    for well in outcomes:
        if well:
            budget.succeeded()
            continue
        budget.failed()
        if budget.allows:
            retries += 1
            budget.failed()  # it fails as well
    assert retries <= 10 + len(outcomes) / 10


def test_it_gives_in_under_failures_and_recovers() -> None:
    budget = RetryBudget()
    for _ in range(4):
        budget.failed()
    assert budget.allows
    budget.failed()
    assert not budget.allows
    for _ in range(100):
        budget.failed()
    for _ in range(60):
        budget.succeeded()
    assert budget.allows
    assert repr(budget) == "<RetryBudget 6.0/10>"
