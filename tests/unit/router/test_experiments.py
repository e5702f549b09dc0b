"""Assignment: sticky for ever, in proportion, and still when weights move."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.experiments import assign


@dataclass(frozen=True)
class Arm:
    name: str
    weight: float = 1.0


WEIGHTS = st.floats(0.01, 100)
SUBJECTS = st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1)
ARMS = st.lists(st.builds(Arm, st.text("abcdef-", min_size=1, max_size=8), WEIGHTS), min_size=1, max_size=6, unique_by=lambda arm: arm.name)


@given(subject=SUBJECTS, arms=ARMS, data=st.data())
def test_the_same_subject_gets_the_same_variant_in_whatever_order_they_are_listed(
    subject: str | int, arms: list[Arm], data: st.DataObject
) -> None:
    chosen = assign("home", subject, arms)
    assert chosen in arms
    assert assign("home", subject, data.draw(st.permutations(arms))) == chosen


@given(subject=SUBJECTS, arms=ARMS, factor=st.floats(1.0, 50), data=st.data())
def test_a_growing_weight_never_takes_a_subject_away_from_its_variant(
    subject: str | int, arms: list[Arm], factor: float, data: st.DataObject
) -> None:
    grown = data.draw(st.sampled_from(arms))
    after = [replace(arm, weight=arm.weight * factor) if arm is grown else arm for arm in arms]
    was, now = assign("home", subject, arms).name, assign("home", subject, after).name
    assert now in (was, grown.name)
    if was == grown.name:
        assert now == was


@given(subject=SUBJECTS, arms=ARMS, data=st.data())
def test_a_variant_that_goes_or_comes_moves_its_own_subjects_only(subject: str | int, arms: list[Arm], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(arms))
    rest = [arm for arm in arms if arm is not gone]
    was = assign("home", subject, arms)
    if rest and was is not gone:
        assert assign("home", subject, rest) is was


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (5.0, 3.0, 2.0), (99.0, 1.0), (1.0,)])
def test_shares_converge_to_the_weights(weights: tuple[float, ...]) -> None:
    arms = [Arm(f"v{n}", weight) for n, weight in enumerate(weights)]
    subjects = 20_000
    seen = Counter(assign("home", f"user-{n}", arms).name for n in range(subjects))
    for arm in arms:
        share = arm.weight / sum(weights)
        five_sigma = 5 * math.sqrt(share * (1 - share) / subjects)
        assert seen[arm.name] / subjects == pytest.approx(share, abs=five_sigma + 1e-12)


def test_routes_split_independently_of_each_other() -> None:
    arms = [Arm("a"), Arm("b")]
    same = sum(assign("home", n, arms) is assign("search", n, arms) for n in range(10_000))
    assert same == pytest.approx(5_000, abs=250)


def test_the_string_1_and_the_number_1_are_different_subjects() -> None:
    arms = [Arm("a"), Arm("b")]
    assert any(assign("home", str(n), arms) is not assign("home", n, arms) for n in range(64))


def test_a_release_moves_nobody() -> None:
    """Written down once: whoever changes these moves every subject of every running experiment."""
    arms = [Arm("a"), Arm("b"), Arm("c", 2.0)]
    assert "".join(assign("home", f"user-{n}", arms).name for n in range(32)) == "aaccaccccaccbcbcabaaccaccbbaaaca"
    assert "".join(assign("home", n, arms).name for n in range(32)) == "ccaaccabbbbbaccbbacbbccccccbccca"


def test_composite_subjects_stick_and_are_like_no_other() -> None:
    arms = [Arm(f"v{n}") for n in range(10_000)]
    subjects: list[Any] = [("a|b", "c"), ("a", "b|c"), ("a", "1"), ("a", 1), ("a",), "a", ("1",), (1,), 1, "1", ("", "a"), ("a", "")]
    chosen = [assign("r", subject, arms).name for subject in subjects]
    assert len(set(chosen)) == len(subjects)
    assert chosen == [assign("r", subject, arms[::-1]).name for subject in subjects]
