from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import Unavailable
from plait.registry.records import EMPTY, Snapshot
from plait.registry.watcher import FIRST_BACKOFF_S, MAX_BACKOFF_S, Watcher, backoff_s


@given(st.integers(1, 10_000), st.integers())
def test_backoff_grows_to_its_limit_and_is_spread_out(failures: int, seed: int) -> None:
    spread = random.Random(seed)  # noqa: S311 - nothing secret
    ceiling = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30))
    assert ceiling / 2 <= backoff_s(failures, spread.uniform) <= ceiling


async def test_a_new_watcher_holds_the_empty_snapshot_and_says_so() -> None:
    watcher = Watcher("postgresql://nowhere")
    assert watcher.snapshot is EMPTY
    assert repr(watcher).startswith("<Watcher disconnected source=none revision=0 ")
    with pytest.raises(Unavailable, match="check the DSN"):
        await watcher.first(0)


async def test_subscribers_can_leave_and_hear_nothing_before_there_is_something() -> None:
    watcher, seen = Watcher(""), list[Snapshot]()
    stop = watcher.subscribe(seen.append)
    assert seen == []
    watcher._swap(Snapshot(revision=1))
    watcher._swap(Snapshot(revision=1))
    stop()
    watcher._swap(Snapshot(revision=2))
    assert [s.revision for s in seen] == [1]
    assert watcher.snapshot.revision == 2
