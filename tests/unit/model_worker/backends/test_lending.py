"""Things lent to one user each, and shared only once there are no more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.backends.lending import Lender, Loan


def lender(most: int) -> Lender[int]:
    return Lender(lambda existing: len(existing) if len(existing) < most else None)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4))
def test_what_is_taken_had_the_fewest_users(steps: list[bool], most: int) -> None:
    lends, held = lender(most), list[Loan[int]]()
    for takes in steps:
        users = [sum(loan.thing == thing for loan in held) for thing in range(most)]
        if takes:
            held.append(lends.take())
            assert users[held[-1].thing] == min(users)
        elif held:
            lends.give_back(held.pop(0))


def test_what_is_given_back_is_lent_again_before_anything_new_is_made() -> None:
    lends = lender(3)
    first, second = lends.take(), lends.take()
    assert first.thing != second.thing
    lends.give_back(first)
    assert lends.take() is first
    assert repr(lends) == "<Lender users=[1, 1]>"


def test_those_who_share_have_one_lock() -> None:
    lends = lender(1)
    first = lends.take()
    assert not first.shared
    assert lends.take() is first
    assert first.shared


def test_a_lender_of_nothing_says_so() -> None:
    with pytest.raises(RuntimeError, match="nothing to lend"):
        lender(0).take()
