"""What is expected is what was: lately, by this model, for so many rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import snapshot

from router.expectations import Expectations
from router.route_table import Arm, compile_table

ARM = compile_table(snapshot()).routes["home"].weighted[0]


def learn(known: Expectations, rows: int, took_s: float, arm: Arm = ARM) -> None:
    for _ in range(5):
        known.learn(arm, rows, took_s)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.floats(0, 10), min_size=5, max_size=255))
def test_nine_in_ten_took_no_longer(taken: list[float]) -> None:
    known = Expectations(Clock())
    for took_s in taken:
        known.learn(ARM, 100, took_s)
    expected = known.expected_s(ARM, 100)
    assert expected in taken
    assert sum(took_s <= expected for took_s in taken) >= 0.9 * (len(taken) - 1)


def test_sizes_are_known_apart_and_nothing_is_expected_of_the_unknown() -> None:
    known = Expectations()
    learn(known, 1000, 1.0)
    assert (known.expected_s(ARM, 600), known.expected_s(ARM, 10)) == (1.0, 0.0)


def test_what_was_long_ago_says_nothing_so_that_a_slow_model_is_asked_again() -> None:
    clock = Clock()
    known = Expectations(clock)
    learn(known, 1, 5.0)
    assert known.expected_s(ARM, 1) == 5.0
    clock.now_s = 10.5
    assert known.expected_s(ARM, 1) == 0.0


def test_what_is_remembered_is_bounded() -> None:
    known = Expectations()
    for n in range(1500):
        learn(known, 1, 1.0, replace(ARM, version=str(n)))
    assert repr(known) == "<Expectations known=1024>"
    assert known.expected_s(replace(ARM, version="1499"), 1) == pytest.approx(1.0)


def test_a_few_durations_say_nothing() -> None:
    known = Expectations()
    for _ in range(4):
        known.learn(ARM, 1, 5.0)
    assert known.expected_s(ARM, 1) == 0.0


def test_a_model_that_was_too_slow_is_probed_once_a_second_and_believed_once_it_answers() -> None:
    clock = Clock()
    known = Expectations(clock)
    assert not known.probe(ARM, 1)
    learn(known, 1, 5.0)
    assert [known.probe(ARM, 1) for _ in range(3)] == [True, False, False]
    known.learn(ARM, 1, 5.0, answered=False)
    assert known.expected_s(ARM, 1) == 5.0
    clock.now_s = 1.0
    assert known.probe(ARM, 1)
    known.learn(ARM, 1, 0.01)
    assert known.expected_s(ARM, 1) == 0.0
