"""What was told is found, however it was told; what is no longer known counts as told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.invalidation import Invalidations, Named, Space

SHOP: Space = ("shop", "entity", "item")
SPACES: list[Space] = [SHOP, ("other", "entity", "item"), ("shop", "entity", "user"), ("shop", "route", "")]


def test_only_what_was_begun_before_is_touched() -> None:
    log = Invalidations()
    before = log.position
    log.tell([(SHOP, ["a"])])
    assert log.touched(before, [(SHOP, ["x", "a"])])
    assert not log.touched(log.position, [(SHOP, ["a"])])
    assert not log.touched(before, [(SHOP, ["x"])])


def test_ids_of_another_kind_tenant_or_type_are_others() -> None:
    log = Invalidations()
    log.tell([(SHOP, ["1"])])
    assert not log.touched(0, [(SHOP, [1, ("1",)])])
    assert not any(log.touched(0, [(space, ["1"])]) for space in SPACES[1:])


def test_what_all_were_told_has_the_same_number_everywhere() -> None:
    """One router was also told things on its own; an answer made by the other before number 8 is touched by it."""
    one, other = Invalidations(), Invalidations()
    for log in (one, other):
        log.tell([(SHOP, ["x"])], heard=7)
    one.tell([(SHOP, ["y"])])
    made_at = other.heard
    assert one.heard == other.heard == 7
    one.tell([(SHOP, ["a"])], heard=8)
    assert one.touched(Invalidations.since(made_at), [(SHOP, ["a"])])
    assert not one.touched(Invalidations.since(8), [(SHOP, ["a"])])


def test_forgetting_all() -> None:
    log = Invalidations()
    log.forget_all(heard=3)
    assert log.touched(Invalidations.since(3) - 1, [])
    assert not log.touched(log.position, [(SHOP, ["a"])])


tellings = st.lists(
    st.one_of(st.tuples(st.sampled_from(SPACES), st.lists(st.sampled_from("abcdef"), max_size=3)), st.just("forget")), max_size=30
)


@given(tellings, st.integers(1, 6), st.booleans())
def test_nothing_told_is_ever_missed(told: list[tuple[Space, list[str]] | str], most: int, numbered: bool) -> None:
    """Against a model that remembers everything: bounded memory may only forget too much, and what is remembered is exact."""
    log = Invalidations(most)
    history: list[tuple[int, Space, str]] = []
    positions = [log.position]
    forgotten_at = -1
    for number, entry in enumerate(told, 1):
        if isinstance(entry, str):
            log.forget_all()
            forgotten_at = log.position
        else:
            log.tell([entry], heard=number if numbered else None)
            history += [(log.position, entry[0], id_) for id_ in dict.fromkeys(entry[1])]
        assert log.position > positions[-1]
        positions.append(log.position)

    exact_from = max([forgotten_at, *(position for position, _, _ in history[:-most])])
    for since in positions:
        for space in SPACES:
            for id_ in "abcdef":
                named: list[Named] = [(space, [id_])]
                truth = any(position > since and (s, i) == (space, id_) for position, s, i in history) or since < forgotten_at
                found = log.touched(since, named)
                assert found or not truth
                if since >= exact_from:
                    assert found == truth
