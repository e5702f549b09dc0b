from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plait.telemetry.pseudonyms import Pseudonyms

KEY = b"k" * 32
PARTS = st.tuples(st.text(max_size=5), st.text(max_size=5), st.binary(max_size=12))


def test_a_pseudonym_is_the_same_everywhere_under_one_key() -> None:
    assert Pseudonyms(KEY).of("shop", "user", b"s\0\x03ann") == Pseudonyms(KEY).of("shop", "user", b"s\0\x03ann")
    assert len(Pseudonyms(KEY).of("shop", "user", b"x")) == 12


def test_without_the_key_it_says_nothing() -> None:
    assert Pseudonyms(KEY).of("shop", "user", b"x") != Pseudonyms(b"l" * 32).of("shop", "user", b"x")
    assert Pseudonyms().of("shop", "user", b"x") != Pseudonyms().of("shop", "user", b"x")


def test_a_key_may_be_of_any_length_and_all_of_it_counts() -> None:
    assert Pseudonyms(b"k" * 200).of("a", "b", b"c") != Pseudonyms(b"k" * 201).of("a", "b", b"c")


def test_the_key_is_not_in_its_repr() -> None:
    assert repr(Pseudonyms(KEY)) == "<Pseudonyms>"


@given(PARTS, PARTS)
def test_no_parts_run_together(one: tuple[str, str, bytes], other: tuple[str, str, bytes]) -> None:
    assert (Pseudonyms(KEY).of(*one) == Pseudonyms(KEY).of(*other)) == (one == other)


def test_neighbours_that_spell_the_same_differ() -> None:
    assert Pseudonyms(KEY).of("ab", "c", b"") != Pseudonyms(KEY).of("a", "bc", b"")
