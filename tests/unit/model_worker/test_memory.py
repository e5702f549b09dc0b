"""The ledger: never over its budget, whatever the order of claims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.memory import Claim, Ledger, Need, automatic_budget
from model_worker.memory_limit import Reading
from plait.errors import FailedPrecondition


@given(st.lists(st.tuples(st.sampled_from(["claim", "settle", "release"]), st.integers(0, 60)), max_size=40))
def test_the_budget_holds(steps: list[tuple[str, int]]) -> None:
    ledger, held = Ledger(lambda _: 100), list[Claim]()
    for step, size in steps:
        before = ledger.used_bytes("cpu")
        try:
            if step == "claim":
                held.append(ledger.claim(("a", str(size)), Need(device="cpu", size_bytes=size)))
            elif held and step == "settle":
                ledger.settle(held[-1], size)
            elif held:
                ledger.release(held.pop())
        except FailedPrecondition:
            assert ledger.used_bytes("cpu") == before
        assert 0 <= ledger.used_bytes("cpu") <= 100


def test_what_is_really_free_counts_too_and_devices_apart() -> None:
    ledger = Ledger(lambda device: 100 if device == "cpu" else None, lambda device: 30 if device == "cpu" else None)
    ledger.claim(("a", "1"), Need(device="cpu", size_bytes=20))
    assert ledger.shortfall_bytes(Need(device="cpu", size_bytes=15)) == 5
    ledger.claim(("b", "1"), Need(device="cuda:0", size_bytes=10**12))
    with pytest.raises(FailedPrecondition, match="a/1 20 B"):
        ledger.claim(("c", "1"), Need(device="cpu", size_bytes=15))


def test_the_automatic_budget() -> None:
    assert automatic_budget(Reading(limit_bytes=1000, free_bytes=0), 300, 0.8) == 500
    assert automatic_budget(None, 300, 0.8) is None
