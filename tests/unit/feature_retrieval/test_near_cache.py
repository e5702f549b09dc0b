"""The near cache against a model of the store: whatever crosses whatever, it never tells what is no longer true."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from feature_retrieval.near_cache import MISS, UNKNOWN, Found, NearCache, Reading, ViewCache
from feature_retrieval.row_codec import KeySpace, RowCodec, header, split
from plait.registry.records import Feature, FeatureSchema

CODEC = RowCodec(FeatureSchema(id=2, features=(Feature(name="a"),)))
OTHER_SCHEMA = RowCodec(FeatureSchema(id=1, features=(Feature(name="b"),)))  # its rows are as long
SPACE = KeySpace.of("default", "item", "stats", 1)
OTHER_VIEW = KeySpace.of("default", "item", "content", 1)
STRANGER = KeySpace.of("stranger", "item", "stats", 1)
PREFIXES = [SPACE.prefix]
MAX_AGE_S = 60.0
NOW_US = 1_000_000
IDS = ("a", "b", "c", "d", "e")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def row(number: int, codec: RowCodec = CODEC) -> bytes:
    block = codec.blank(1)
    header(block)["sequence"] = number
    return split(block)[0]


def cache_of(max_bytes: int = 1 << 20, clock: Clock | None = None) -> NearCache:
    cache = NearCache(max_bytes, MAX_AGE_S, clock or Clock())
    cache.connected(PREFIXES)
    return cache


def fill(cache: NearCache, rows: dict[str, bytes | None], space: KeySpace = SPACE) -> None:
    reading = cache.begin(space, CODEC)
    assert reading is not None
    cache.end(reading, list(rows), list(rows.values()))


def find(cache: NearCache, ids: list[str], space: KeySpace = SPACE, codec: RowCodec = CODEC) -> Found | None:
    places = cache.places(space.prefix, ids)
    return None if places is None else cache.find(space, codec, places, NOW_US)


def views(cache: NearCache) -> list[ViewCache]:
    return [view for entity in cache._entities.values() for view in entity.views.values()]


def look(cache: NearCache, ids: list[str], space: KeySpace = SPACE) -> list[int | str]:
    """What is held of each id: a row's number, "miss" or "unknown"."""
    found = find(cache, ids, space)
    if found is None:
        return ["unknown"] * len(ids)
    numbers = iter(header(found.rows[found.codes >= 0])["sequence"].tolist())
    told: list[int | str] = [next(numbers) if code >= 0 else {MISS: "miss", UNKNOWN: "unknown"}[code] for code in found.codes.tolist()]
    assert found.clean == all(code > NOW_US for code in found.codes.tolist())
    assert next(numbers, None) is None
    return told


class Crossing(RuleBasedStateMachine):
    """Reads, writes and the store's messages in every order. The model: what the store holds, and what it has not told us yet."""

    reads = Bundle("reads")
    answers = Bundle("answers")

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.cache = NearCache(1 << 20, MAX_AGE_S, self.clock)
        self.connected = False
        self.store: dict[str, bytes] = {}
        self.untold: list[list[str]] = []
        self.writes = 0
        self.under_way = 0

    @rule()
    def connect(self) -> None:
        if not self.connected:
            self.cache.connected(PREFIXES)
            self.connected, self.untold = True, []

    @rule()
    def disconnect(self) -> None:
        self.cache.disconnected()
        self.connected, self.untold = False, []

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True), deleted=st.booleans())
    def write(self, ids: list[str], deleted: bool) -> None:
        for entity_id in ids:
            self.writes += 1
            if deleted:
                self.store.pop(entity_id, None)
            else:
                self.store[entity_id] = row(self.writes)
        if self.connected:
            self.untold.append(ids)

    @rule()
    def tell(self) -> None:
        if self.untold:
            ids = self.untold.pop(0)
            self.cache.changed([*SPACE.keys(ids), *OTHER_VIEW.keys(ids), b"p1{something else"])

    @rule()
    def tell_that_all_is_gone(self) -> None:
        if self.connected:
            self.store.clear()
            self.untold = []
            self.cache.changed(None)

    @rule(target=reads, ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True))
    def begin(self, ids: list[str]) -> tuple[list[str], Reading | None]:
        reading = self.cache.begin(SPACE, CODEC)
        assert (reading is None) == (not self.connected)
        self.under_way += 1
        return ids, reading

    @rule(target=answers, read=consumes(reads))
    def the_store_answers(self, read: tuple[list[str], Reading | None]) -> tuple[list[str], Reading | None, list[bytes | None]]:
        ids, reading = read
        return ids, reading, [self.store.get(i) for i in ids]

    @rule(answer=consumes(answers))
    def end(self, answer: tuple[list[str], Reading | None, list[bytes | None]]) -> None:
        ids, reading, rows = answer
        if reading is not None:
            self.cache.end(reading, ids, rows)
        self.under_way -= 1

    @rule(answer=consumes(reads))
    def fail(self, answer: tuple[list[str], Reading | None]) -> None:
        if answer[1] is not None:
            self.cache.end(answer[1], [], [])
        self.under_way -= 1

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True))
    def read_at_once(self, ids: list[str]) -> None:
        """What crosses nothing is kept, else the cache would be true but useless."""
        reading = self.cache.begin(SPACE, CODEC)
        if reading is None:
            return
        self.cache.end(reading, ids, [self.store.get(i) for i in ids])
        held = look(self.cache, ids)
        for entity_id, told in zip(ids, held, strict=True):
            if not any(entity_id in untold for untold in self.untold):
                assert told == (int(header(np.frombuffer(self.store[entity_id], np.uint8)[None])["sequence"][0])
                                if entity_id in self.store else "miss")  # fmt: skip

    @rule(seconds=st.sampled_from([1.0, 40.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        if seconds > MAX_AGE_S:
            assert set(look(self.cache, list(IDS))) == {"unknown"}

    @invariant()
    def what_is_held_is_true(self) -> None:
        held = look(self.cache, list(IDS))
        if not self.connected:
            assert set(held) == {"unknown"}
            return
        for entity_id, told in zip(IDS, held, strict=True):
            if told == "unknown" or any(entity_id in untold for untold in self.untold):
                continue
            stored = self.store.get(entity_id)
            assert told == ("miss" if stored is None else int(header(np.frombuffer(stored, np.uint8)[None])["sequence"][0]))

    @invariant()
    def nothing_is_remembered_of_reads_that_are_over(self) -> None:
        if self.under_way == 0:
            assert not any(view.changed_at for view in views(self.cache))


TestCrossing = Crossing.TestCase
TestCrossing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_it_is_off_until_changes_are_told_and_after() -> None:
    cache = NearCache(1 << 20, MAX_AGE_S, Clock())
    assert not cache.on
    assert cache.begin(SPACE, CODEC) is None
    assert repr(cache) == f"<NearCache off entity_types=0 ids=0 bytes=0/{1 << 20}>"
    cache.connected(PREFIXES)
    fill(cache, {"a": row(1), "none": None})
    assert look(cache, ["none", "a", "b"]) == ["miss", 1, "unknown"]
    assert repr(cache).startswith("<NearCache on entity_types=1 ids=2 bytes=")
    cache.disconnected()
    assert (cache.on, cache.size_bytes) == (False, 0)
    cache.connected(PREFIXES)
    assert look(cache, ["a", "none"]) == ["unknown"] * 2


def test_without_memory_it_is_never_on() -> None:
    cache = cache_of(max_bytes=0)
    assert not cache.on
    assert cache.begin(SPACE, CODEC) is None


def test_a_read_that_began_before_a_change_is_not_kept() -> None:
    cache = cache_of()
    early = cache.begin(SPACE, CODEC)
    cache.changed(SPACE.keys(["a"]))
    late = cache.begin(SPACE, CODEC)
    assert early is not None
    assert late is not None
    cache.end(late, ["a"], [row(2)])
    cache.end(early, ["a", "b"], [row(1), row(1)])
    assert look(cache, ["a", "b"]) == [2, 1]


@pytest.mark.parametrize("end_of_an_era", [lambda c: c.changed(None), lambda c: (c.disconnected(), c.connected(PREFIXES))])
def test_a_read_that_outlived_everything_is_not_kept(end_of_an_era: object) -> None:
    cache = cache_of()
    reading = cache.begin(SPACE, CODEC)
    assert reading is not None
    end_of_an_era(cache)  # type: ignore[operator]
    cache.end(reading, ["a"], [row(1)])
    assert look(cache, ["a"]) == ["unknown"]


def test_found_rows_stay_what_they_were_while_the_caller_waits() -> None:
    cache = cache_of()
    fill(cache, {"a": row(1)})
    found = find(cache, ["a", "b"])
    assert found is not None
    cache.changed(SPACE.keys(["a"]))
    fill(cache, {"a": row(2), "b": row(3)})
    assert header(found.rows[found.codes >= 0])["sequence"].tolist() == [1]


def test_views_are_kept_apart() -> None:
    cache = cache_of()
    fill(cache, {"a": row(1)})
    fill(cache, {"a": row(2)}, OTHER_VIEW)
    cache.changed(OTHER_VIEW.keys(["a"]))
    assert look(cache, ["a"]) == [1]
    assert look(cache, ["a"], OTHER_VIEW) == ["unknown"]


def test_rows_whose_changes_nobody_tells_are_not_kept() -> None:
    cache = cache_of()
    assert cache.begin(STRANGER, CODEC) is None
    cache.connected([STRANGER.prefix])
    assert cache.begin(STRANGER, CODEC) is not None


@pytest.mark.parametrize("bad", [b"", b"x", row(1)[:-1], row(1) + b"x", row(1, OTHER_SCHEMA), b"\2\0" + row(1)[2:]])
def test_rows_of_another_schema_or_damaged_are_not_kept(bad: bytes) -> None:
    cache = cache_of()
    fill(cache, {"bad": bad, "good": row(1)})
    assert look(cache, ["bad", "good"]) == ["unknown", 1]


def test_schemas_are_kept_apart() -> None:
    cache = cache_of()
    fill(cache, {"a": row(1)})
    assert find(cache, ["a"], codec=OTHER_SCHEMA) is None


def test_rows_and_misses_grow_old() -> None:
    clock = Clock()
    cache = cache_of(clock=clock)
    fill(cache, {"a": row(1), "none": None})
    clock.now_s += 40
    fill(cache, {"b": row(2), "nothing": None})
    assert look(cache, ["a", "none", "b", "nothing"]) == [1, "miss", 2, "miss"]
    clock.now_s += 40
    assert look(cache, ["a", "none", "b", "nothing"]) == ["unknown", "unknown", 2, "miss"]
    fill(cache, {"a": row(3)})
    assert look(cache, ["a"]) == [3]


def test_it_is_bounded_in_bytes_and_keeps_what_is_asked_for() -> None:
    limit = 400_000
    cache = cache_of(max_bytes=limit)
    fill(cache, {"hot": row(7)})
    for start in range(0, 40_000, 500):
        fill(cache, {f"i{start + n}": row(n) for n in range(500)})
        assert limit / 4 < cache.size_bytes <= limit
        assert look(cache, ["hot", f"i{start + 499}"]) == [7, 499]
    assert not cache.resets  # nothing was forgotten but what had to go


def test_more_than_fits_at_once_is_kept_in_part() -> None:
    cache = cache_of(max_bytes=50_000)
    fill(cache, {f"i{n}": row(n) for n in range(10_000)})
    held = look(cache, [f"i{n}" for n in range(10_000)])
    assert {told for n, told in enumerate(held) if told != n} == {"unknown"}
    assert 64 < sum(told != "unknown" for told in held) < 500
    assert cache.size_bytes <= 50_000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 299), st.integers(1, 90), st.booleans()),
            st.tuples(st.just("write"), st.integers(0, 299), st.integers(1, 40), st.booleans()),
        ),
        max_size=60,
    ),
    st.integers(16_000, 60_000),
)
def test_whoever_makes_room_for_whom_no_row_is_another_s(steps: list[tuple[str, int, int, bool]], max_bytes: int) -> None:
    """Two views of one entity type share slots, and all of them together hold a part of the ids only."""
    cache = cache_of(max_bytes=max_bytes)
    stored: dict[KeySpace, dict[str, int]] = {SPACE: {}, OTHER_VIEW: {}}
    for version, (what, first, count, other) in enumerate(steps, start=1):
        ids, space = [f"i{n % 300}" for n in range(first, first + count)], OTHER_VIEW if other else SPACE
        if what == "write":
            stored[space].update(dict.fromkeys(ids, version))
            cache.changed(space.keys(ids))
        else:
            fill(cache, {i: blank(sequence=stored[space][i]) if i in stored[space] else None for i in ids}, space)
            assert (
                "unknown" not in look(cache, ids[-1:], space) or cache.resets or count > 8
            )  # of a batch as large as all of it, some make room for others
        assert cache.size_bytes <= max_bytes
        for looked, rows in stored.items():
            everybody = [f"i{n}" for n in range(300)]
            for entity_id, told in zip(everybody, look(cache, everybody, looked), strict=True):
                assert told in ("unknown", rows.get(entity_id, "miss"))


@pytest.mark.parametrize("skew", [1.0, 1.2])
def test_on_a_skewed_stream_it_hits_about_as_often_as_an_lru_of_its_size(skew: float) -> None:
    keys, reads, batch = 20_000, 60_000, 100
    weights = np.arange(1, keys + 1) ** -skew
    asked = np.random.default_rng(5).choice(keys, reads, p=weights / weights.sum())
    cache = cache_of(max_bytes=500_000)
    lru: OrderedDict[str, None] = OrderedDict()
    hits = lru_hits = 0
    for start in range(0, reads, batch):
        ids = list(dict.fromkeys(f"i{n}" for n in asked[start : start + batch].tolist()))
        missing = [i for i, told in zip(ids, look(cache, ids), strict=True) if told == "unknown"]
        hits += len(ids) - len(missing)
        fill(cache, {i: row(1) for i in missing})
        [entity] = cache._entities.values()
        for entity_id in ids:
            lru_hits += entity_id in lru
            lru[entity_id] = None
            lru.move_to_end(entity_id)
            if len(lru) > entity.capacity:
                lru.popitem(last=False)
    assert len(lru) < keys / 4
    assert (lru_hits - hits) / reads < 0.05


def test_an_entity_type_that_took_everything_gives_way_to_another() -> None:
    users = KeySpace.of("default", "user", "profile", 1)
    cache = cache_of(max_bytes=200_000)
    cache.connected([SPACE.prefix, users.prefix])
    fill(cache, {f"i{n}": row(n) for n in range(5_000)})
    assert cache.size_bytes > 190_000
    fill(cache, {"u": row(3)}, users)
    assert look(cache, ["u"], users) == [3]
    assert cache.resets["rebalanced"] == 1
    fill(cache, {"i": row(4)})
    assert (look(cache, ["i"]), look(cache, ["u"], users)) == ([4], [3])
    assert cache.size_bytes <= 200_000
    assert cache.resets["rebalanced"] == 1  # they do not push each other out


def test_what_is_found_is_counted() -> None:
    cache = cache_of()
    fill(cache, {"a": blank(), "none": None})
    for ids in (["a"], ["a", "none", "b"]):
        cache.count(find(cache, ids), len(ids))
    cache.count(find(cache, ["x"], OTHER_VIEW), 1)
    assert cache.lookups == {"hit": 2, "miss": 1, "unknown": 2}
    cache.changed(SPACE.keys(["a", "b"]))
    cache.changed(None)
    assert (cache.invalidations, cache.resets) == (2, {"flushed": 1})


@pytest.mark.parametrize("key", [b"", b"p1{", b"p1{\xff", SPACE.prefix, SPACE.prefix + b"s", SPACE.prefix + b"s\0\1a", b"\xff" * 9])
def test_keys_that_are_none_of_ours_change_nothing(key: bytes) -> None:
    cache = cache_of()
    fill(cache, {"a": row(1)})
    cache.changed([key])
    assert look(cache, ["a"]) == [1]


def test_misses_count_towards_the_bound() -> None:
    cache = cache_of(max_bytes=50_000)
    for start in range(0, 5_000, 100):
        fill(cache, {f"i{start + n}": None for n in range(100)})
        assert 0 <= cache.size_bytes <= 50_000


def test_changes_remembered_for_reads_under_way_count_towards_the_bound() -> None:
    cache = cache_of(max_bytes=50_000)
    assert cache.begin(SPACE, CODEC) is not None  # never ends
    for start in range(0, 5_000, 100):
        cache.changed(SPACE.keys([f"i{start + n}" for n in range(100)]))
        fill(cache, {"a": None})
        assert sum(len(view.changed_at) for view in views(cache)) < 500


def test_an_id_keeps_its_slot_through_changes() -> None:
    cache = cache_of()
    sizes: Counter[int] = Counter()
    for turn in range(3_000):
        fill(cache, {f"i{turn % 7}": row(turn)})
        cache.changed(SPACE.keys([f"i{(turn + 3) % 7}"]))
        [view] = views(cache)
        sizes[len(view.rows)] += 1
    assert list(sizes) == [1024]


def test_rows_outlive_growth() -> None:
    cache = cache_of()
    fill(cache, {f"i{n}": row(n) for n in range(3_000)})
    assert look(cache, [f"i{n}" for n in range(2_999, -1, -1)]) == list(range(2_999, -1, -1))


def test_views_of_an_entity_share_slots_and_nothing_else() -> None:
    cache = cache_of()
    fill(cache, {f"i{n}": row(n) for n in range(1_500)})
    fill(cache, {"new": row(7), "i3": None}, OTHER_VIEW)
    assert look(cache, ["new", "i3", "i4"]) == ["unknown", 3, 4]
    assert look(cache, ["new", "i3", "i4"], OTHER_VIEW) == [7, "miss", "unknown"]


def blank(**changes: int) -> bytes:
    block = CODEC.blank(1)
    CODEC.set_nulls(block, np.zeros((1, 1), np.bool_))
    for name, value in changes.items():
        header(block)[name] = value
    return split(block)[0]


@pytest.mark.parametrize(
    ("kept", "clean"),
    [
        (blank(), True),
        (blank(expires_us=NOW_US + 1), True),
        (blank(expires_us=NOW_US), False),
        (blank(expires_us=1), False),
        (blank(flags=1), False),
        (row(0), False),  # its column is null
    ],
)
def test_clean_means_that_nothing_needs_to_be_looked_at(kept: bytes, clean: bool) -> None:
    cache = cache_of()
    fill(cache, {"good": blank(), "kept": kept})
    for ids, expected in ((["good"], True), (["good", "kept"], clean), (["good", "stranger"], False)):
        found = find(cache, ids)
        assert found is not None
        assert found.clean == expected
    assert np.count_nonzero(found.codes >= 0) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("held", [1, 2, 1023, 1024, 1025])
def test_an_id_nobody_has_heard_of_is_given_no_other_s_row(held: int) -> None:
    """Also where every slot is taken by a row that is simply good."""
    cache = cache_of()
    fill(cache, {f"i{n}": blank(sequence=n + 1) for n in range(held)})
    last = f"i{held - 1}"
    for ids, told in ((["stranger"], ["unknown"]), ([last, "stranger"], [held, "unknown"]), (["stranger", last], ["unknown", held])):
        assert look(cache, ids) == told
    assert look(cache, ["i0", last]) == [1, held]
