"""Offsets against a plain model: what is committed never passes over a message that is not done, and reaches every one that is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.sources.offsets import Offsets


@given(data=st.data(), gaps=st.lists(st.integers(1, 3), min_size=1, max_size=30))
def test_a_commit_covers_exactly_what_is_done_from_below(data: st.DataObject, gaps: list[int]) -> None:
    offsets = Offsets()
    delivered: list[int] = []
    done: set[int] = set()
    committed = None
    upcoming = [sum(gaps[: n + 1]) for n in range(len(gaps))]  # compacted topics and transactions leave gaps
    while upcoming or len(done) < len(delivered):
        waiting = [offset for offset in delivered if offset not in done]
        if upcoming and (not waiting or data.draw(st.booleans())):
            offset = upcoming.pop(0)
            offsets.delivered(("t", 0, offset), 1000 + offset)
            delivered.append(offset)
        else:
            some = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
            done |= set(some)
            moved = offsets.done(("t", 0, offset) for offset in some)
            still = [offset for offset in delivered if offset not in done]
            lowest = still[0] if still else delivered[-1] + 1
            if ("t", 0) in moved:
                committed = moved["t", 0]
                assert committed == lowest
            assert committed is None or committed <= lowest
            assert offsets.oldest("t", 0) == (still[0] if still else None)
            assert offsets.reached_us("t", 0) == (1000 + still[0] - 1 if still else 1000 + delivered[-1])
            assert all(committed is not None and offset < committed for offset in delivered if offset < lowest)
    assert committed == delivered[-1] + 1


def test_partitions_are_apart_and_one_that_was_given_up_is_not_committed() -> None:
    offsets = Offsets()
    for place in (("t", 0, 5), ("t", 1, 9), ("u", 0, 7)):
        offsets.delivered(place, 1)
    offsets.give_up([("t", 1)])
    assert offsets.done([("t", 1, 9), ("u", 0, 7)]) == {("u", 0): 8}
    assert offsets.done([("t", 0, 5)]) == {("t", 0): 6}
    assert repr(offsets) == "<Offsets partitions=2 open=0>"
