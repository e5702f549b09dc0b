"""The window forgets what is old and nothing else; ejections double."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.outliers import FAILURE_SHARE, MIN_CALLS, Ejection, Window

CALLS = st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=120)


@given(CALLS)
def test_a_window_agrees_with_the_list_of_calls_up_to_one_bucket(calls: list[tuple[float, bool]]) -> None:
    window, seen, now_s = Window(10.0), list[tuple[int, bool]](), 1000.0
    for passed_s, failed in calls:
        now_s += passed_s
        window.count(now_s, failed=failed)
        seen.append((int(now_s), failed))
        recent = [f for at, f in seen if at > int(now_s) - 10]
        assert window.bad(now_s) == (len(recent) >= MIN_CALLS and sum(recent) >= FAILURE_SHARE * len(recent))


def test_what_was_cleared_or_is_long_ago_counts_no_more() -> None:
    window = Window()
    for _ in range(MIN_CALLS):
        window.count(50.0, failed=True)
    assert window.bad(50.0)
    assert window.bad(59.0)
    assert not window.bad(60.0)
    for _ in range(MIN_CALLS):
        window.count(60.0, failed=True)
    window.clear()
    assert not window.bad(60.0)


def test_an_ejection_doubles_in_a_row_and_starts_anew() -> None:
    ejection = Ejection()
    assert [ejection.eject(now, 1.0, 3.0) for now in (10.0, 10.5, 11.0, 13.0, 16.0)] == [1.0, 0.0, 2.0, 3.0, 3.0]
    ejection.end()
    assert ejection.eject(16.0, 1.0, 3.0) == 1.0
