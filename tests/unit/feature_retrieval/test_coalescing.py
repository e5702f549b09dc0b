"""Shared reads: whoever comes, waits, leaves or fails, each caller is told what it would have been told alone, and never anything older."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_retrieval.audience import Audience
from feature_retrieval.coalescing import MAX_SHARED_KEYS, CoalescedReads
from feature_retrieval.store.rows import Read
from feature_retrieval.store.tracking import Listener
from plait.errors import Unavailable

LONG_S = 1000.0  # no test waits for it; what arrives in time is the store's decision
KEYS = [b"p%d" % n for n in range(6)]


@dataclass
class Store:
    """Rows are their versions. A key arrives when `needs_s` is at most the time given, fails when in `failing`; answers wait for their turn."""

    versions: dict[bytes, int] = field(default_factory=dict)
    needs_s: dict[bytes, float] = field(default_factory=dict)
    failing: set[bytes] = field(default_factory=set)
    away: bool = False
    at_once: bool = False
    asked: list[list[bytes]] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        self.asked.append(list(keys))
        away = self.away
        rows: list[bytes | None] = [b"%d" % self.versions[key] if key in self.versions else None for key in keys]
        if not self.at_once:
            gate = asyncio.get_running_loop().create_future()
            self.waiting.append(gate)
            await gate
        if away:
            raise Unavailable("away", reason="STORE_UNAVAILABLE")
        late = [at for at, key in enumerate(keys) if self.needs_s.get(key, 0) > timeout_s and key not in self.failing]
        failed = [at for at, key in enumerate(keys) if key in self.failing]
        for at in (*late, *failed):
            rows[at] = None
        return Read(rows, late=np.array(late, np.intp), failed=np.array(failed, np.intp))

    def release(self, which: int = 0) -> None:
        """Let one read answer."""
        waiting = [gate for gate in self.waiting if not gate.done()]
        if waiting:
            waiting[which % len(waiting)].set_result(None)


def versions(read: Read) -> list[int | None]:
    return [None if row is None else int(row) for row in read.rows]


def start(reads: CoalescedReads, keys: Sequence[bytes], timeout_s: float = LONG_S) -> asyncio.Task[Read]:
    return asyncio.create_task(reads.read(list(keys), timeout_s))


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def finish(store: Store, tasks: Sequence[asyncio.Task[Read]]) -> list[Any]:
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        for _ in store.waiting:
            store.release()
    return await asyncio.gather(*tasks, return_exceptions=True)


# --- the invariant ------------------------------------------------------------------------------------------------------------------------

_SOME = st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True)
_TIMES = (LONG_S, 1.4 * LONG_S, 3 * LONG_S)
_STEPS = st.one_of(
    st.tuples(st.just("start"), _SOME, st.sampled_from(_TIMES)),
    st.tuples(st.just("start"), _SOME, st.just(LONG_S)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
    st.tuples(st.just("release"), st.integers(0, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("write"), st.sampled_from(KEYS)),
    st.tuples(st.just("outage"), st.booleans()),
    st.tuples(st.just("tracking"), st.booleans()),
)


@dataclass
class Caller:
    keys: list[bytes]
    timeout_s: float
    known: dict[bytes, int]  # versions that must not be missed
    task: asyncio.Task[Read]
    left: bool = False


class Play:
    """Callers, a store and what happens to them."""

    def __init__(self, store: Store, *, tracked: bool) -> None:
        self.store = store
        self.reads = CoalescedReads(store)
        self.callers: list[Caller] = []
        self.outages = 0
        if tracked:
            self.reads.connected([b"p"])

    async def do(self, step: Any) -> None:
        match step:
            case ("start", keys, timeout_s):
                self.callers.append(Caller(keys, timeout_s, dict(self.store.versions), start(self.reads, keys, timeout_s)))
            case ("turn", count):
                await turns(count)
            case ("release", which):
                self.store.release(which)
            case ("cancel", which) if which < len(self.callers) and not self.callers[which].task.done():
                self.callers[which].task.cancel()
                self.callers[which].left = True
            case ("write", key):  # told at once: how long that takes is the tracking connection's affair
                self.store.versions[key] = self.store.versions.get(key, -1) + 1
                self.reads.changed([key])
            case ("outage", away):
                self.store.away = away
                self.outages += away
            case ("tracking", on):
                self.reads.connected([b"p"]) if on else self.reads.disconnected()
            case _:
                pass

    def check(self, caller: Caller, answer: Read) -> None:
        """What arrived is no older than what the caller knew; what did not would not have arrived alone either."""
        store = self.store
        if not self.outages:
            failing = [key in store.failing for key in caller.keys]
            late = [store.needs_s.get(key, 0) > caller.timeout_s for key in caller.keys]
            assert answer.failed.tolist() == np.flatnonzero(failing).tolist()
            assert answer.late.tolist() == np.flatnonzero(np.array(late) & ~np.array(failing)).tolist()
        unknown = {*answer.late.tolist(), *answer.failed.tolist()}
        for at, (key, version) in enumerate(zip(caller.keys, versions(answer), strict=True)):
            assert (version is None) if at in unknown else (-1 if version is None else version) >= caller.known.get(key, -1)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(_STEPS, max_size=40),
    needs=st.dictionaries(st.sampled_from(KEYS), st.sampled_from([1.2 * LONG_S, 2 * LONG_S, 5 * LONG_S]), max_size=2),
    failing=st.sets(st.sampled_from(KEYS), max_size=1),
    tracked=st.booleans(),
)
async def test_each_caller_is_told_what_it_would_be_told_alone(
    steps: list[Any], needs: dict[bytes, float], failing: set[bytes], tracked: bool
) -> None:
    play = Play(Store(versions=dict.fromkeys(KEYS[1:], 0), needs_s=needs, failing=failing), tracked=tracked)
    for step in steps:
        await play.do(step)
    answers = await finish(play.store, [caller.task for caller in play.callers])
    for caller, answer in zip(play.callers, answers, strict=True):
        if caller.left:
            assert isinstance(answer, asyncio.CancelledError | Read | Unavailable)
        elif isinstance(answer, Read):
            play.check(caller, answer)
        else:
            assert isinstance(answer, Unavailable)
            assert play.outages
    await turns()
    assert repr(play.reads).startswith("<CoalescedReads flights=0 ")
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "shared read"]


# --- what is shared -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(KEYS), min_size=1, unique=True), min_size=2, max_size=20))
async def test_callers_of_one_turn_ask_for_each_key_once(wanted: list[list[bytes]]) -> None:
    store = Store(versions={key: n for n, key in enumerate(KEYS)}, at_once=True)
    reads = CoalescedReads(store)
    answers = await asyncio.gather(*(reads.read(keys, LONG_S) for keys in wanted))
    assert [versions(answer) for answer in answers] == [[store.versions[key] for key in keys] for keys in wanted]
    [asked] = store.asked
    assert sorted(asked) == sorted({key for keys in wanted for key in keys})
    assert reads.shared_keys == sum(map(len, wanted)) - len(asked)


async def test_a_lone_caller_s_keys_are_passed_on_as_they_are() -> None:
    class Same(Store):
        async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
            assert keys is given
            return await super().read(keys, timeout_s)

    given = [KEYS[0]]
    store = Same(at_once=True)
    reads = CoalescedReads(store)
    await reads.read(given, LONG_S)
    reads.connected([b"p"])
    await reads.read(given, LONG_S)
    assert len(store.asked) == 2


async def test_a_hundred_callers_of_a_cold_key_are_one_read_and_one_more_after_it_changed() -> None:
    store = Store(versions={KEYS[0]: 1})
    reads = CoalescedReads(store)
    reads.connected([b"p"])
    for version in (1, 2):
        callers = []
        for n in range(100):
            callers.append(start(reads, KEYS[:1]))
            await turns(n % 3)
        assert len(store.asked) == version
        assert [versions(a) for a in await finish(store, callers)] == [[version]] * 100
        store.versions[KEYS[0]] = 2
        reads.changed(KEYS[:1])


async def test_of_a_read_under_way_only_the_rest_is_asked() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    reads.connected([b"p"])
    first = start(reads, KEYS[:3])
    await turns()
    reads.changed([KEYS[2]])
    second = start(reads, KEYS[1:4])
    await turns()
    assert store.asked == [KEYS[:3], [KEYS[2], KEYS[3]]]
    assert [versions(answer) for answer in await finish(store, [first, second])] == [[5] * 3] * 2


@pytest.mark.parametrize("tracked", [[], [b"q"]])
async def test_a_read_whose_changes_nobody_tells_is_not_joined(tracked: list[bytes]) -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    if tracked:
        reads.connected(tracked)
    first = start(reads, KEYS[:3])
    await turns()
    store.versions = dict.fromkeys(KEYS, 6)  # written by this caller, whom nobody has to tell
    second = start(reads, KEYS[:3])
    await turns()
    assert len(store.asked) == 2
    assert [versions(answer) for answer in await finish(store, [first, second])] == [[5] * 3, [6] * 3]


@pytest.mark.parametrize(
    "gone", [lambda r: r.changed(None), lambda r: (r.disconnected(), r.connected([b"p"])), lambda r: r.connected([b"p"])]
)
async def test_when_changes_may_have_been_missed_nothing_under_way_is_joined(gone: Any) -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    reads.connected([b"p"])
    first = start(reads, KEYS)
    await turns()
    gone(reads)
    second = start(reads, KEYS)
    await turns()
    assert store.asked == [KEYS, KEYS]
    await finish(store, [first, second])


async def test_the_leader_leaves_before_its_read_began_and_the_others_are_read() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    leader, follower = start(reads, KEYS[:2]), start(reads, KEYS[1:3])
    await asyncio.sleep(0)
    leader.cancel()
    await turns()
    assert store.asked == [KEYS[1:3]]
    assert versions((await finish(store, [leader, follower]))[1]) == [5, 5]
    assert leader.cancelled()


async def test_a_follower_that_leaves_takes_nothing_with_it() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    leader, follower, other = (start(reads, KEYS[:2]) for _ in range(3))
    await turns()
    leader.cancel()
    follower.cancel()
    assert versions((await finish(store, [leader, follower, other]))[2]) == [5, 5]
    assert len(store.asked) == 1


async def test_a_joined_read_that_fails_is_not_this_caller_s_failure() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5), away=True)
    reads = CoalescedReads(store)
    reads.connected([b"p"])
    first = start(reads, KEYS)
    await turns()
    store.away = False
    second = start(reads, KEYS)
    await turns()
    assert len(store.asked) == 1  # it was joined
    failed, answer = await finish(store, [first, second])
    assert isinstance(failed, Unavailable)
    assert versions(answer) == [5] * 6


async def test_large_reads_and_very_different_deadlines_go_alone() -> None:
    store = Store(at_once=True)
    reads = CoalescedReads(store)
    many = [b"p%d" % n for n in range(MAX_SHARED_KEYS + 1)]
    await asyncio.gather(*(reads.read(many, LONG_S) for _ in range(2)))
    assert [len(asked) for asked in store.asked] == [len(many)] * 2
    store.asked.clear()
    await asyncio.gather(*(reads.read(KEYS, timeout_s) for timeout_s in (LONG_S, 2.1 * LONG_S, 1.9 * LONG_S)))
    assert sorted(map(len, store.asked)) == [6, 6]


async def test_closing_ends_what_nobody_waits_for() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)
    leader, follower = start(reads, KEYS), start(reads, KEYS)
    await turns()
    leader.cancel()
    follower.cancel()
    await turns()
    assert repr(reads) == "<CoalescedReads flights=1 shared=6/12>"
    await reads.close()
    assert repr(reads) == "<CoalescedReads flights=0 shared=6/12>"


def test_an_audience_hears_in_order() -> None:
    heard: list[Any] = []

    class Ear(Listener):
        def __init__(self, name: str) -> None:
            self.name = name

        def connected(self, prefixes: Sequence[bytes]) -> None:
            heard.append((self.name, "connected", list(prefixes)))

        def disconnected(self) -> None:
            heard.append((self.name, "disconnected"))

        def changed(self, keys: Sequence[bytes] | None) -> None:
            heard.append((self.name, keys))

    audience = Audience(Ear("a"), Ear("b"))
    audience.connected([b"p"])
    audience.changed(None)
    audience.disconnected()
    assert heard == [(n, *what) for what in (("connected", [b"p"]), (None,), ("disconnected",)) for n in "ab"]


@pytest.mark.parametrize("order", [1, -1])
async def test_the_shorter_deadline_ends_a_shared_read_and_the_longer_one_asks_again_for_the_rest(order: int) -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5), needs_s={KEYS[0]: 1.2 * LONG_S}, at_once=True)
    reads = CoalescedReads(store)
    answers = await asyncio.gather(*(reads.read(KEYS[:2], timeout_s) for timeout_s in (LONG_S, 1.4 * LONG_S)[::order]))
    short, long = answers[::order]
    assert (versions(short), short.late.tolist()) == ([None, 5], [0])
    assert (versions(long), long.late.tolist()) == ([5, 5], [])
    assert store.asked == [KEYS[:2], KEYS[:1]]


async def test_a_follower_that_leaves_before_the_read_began_takes_nobody_with_it() -> None:
    store = Store(versions=dict.fromkeys(KEYS, 5))
    reads = CoalescedReads(store)

    async def leave() -> None:
        follower.cancel()

    leader, follower, other, _ = (*(start(reads, KEYS[:2]) for _ in range(3)), asyncio.create_task(leave()))
    answers = await finish(store, [leader, follower, other])
    assert follower.cancelled()
    assert [versions(answer) for answer in (answers[0], answers[2])] == [[5, 5]] * 2


async def test_large_reads_with_nothing_in_common_go_alone_for_a_while() -> None:
    now = [0.0]
    store = Store(at_once=True)
    reads = CoalescedReads(store, lambda: now[0])
    apart = [[b"p%d" % n for n in range(start, start + 65)] for start in (0, 65)]

    async def asked(*wanted: list[bytes]) -> int:
        store.asked.clear()
        await asyncio.gather(*(reads.read(keys, LONG_S) for keys in wanted))
        return len(store.asked)

    seen = [await asked(*apart) for _ in range(40)]
    assert seen[0] == 1
    assert seen[-1] == 2
    assert await asked(KEYS, KEYS) == 1  # small ones go together all the same
    now[0] += 2
    assert await asked(apart[0], apart[0]) == 1
    assert [await asked(apart[0], apart[0]) for _ in range(40)] == [1] * 40
