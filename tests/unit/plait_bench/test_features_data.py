"""What is written and asked: the expected end of shuffled events is checked against the rule itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plait.registry import rules
from plait_bench.features_data import (
    COUNTED,
    SHAPES,
    SMALL,
    Events,
    counted,
    newest,
    records,
    shuffled_events,
    spread_events,
    value_of,
    zipf,
)

_EVENT = st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))


@given(st.lists(_EVENT, min_size=1, max_size=30))
def test_what_is_left_is_the_greatest_by_time_then_sequence(listed: list[tuple[int, int, int]]) -> None:
    unique = {event: number for number, event in enumerate(listed)}  # two events of one time and sequence are not made here
    columns = np.array([(*event, number) for event, number in unique.items()]).T
    events = Events(columns[0], columns[1], columns[2].astype(np.uint64), columns[3])
    last, there = newest(events, 5)
    for entity in range(5):
        known = [(time, sequence, number) for (of, time, sequence), number in unique.items() if of == entity]
        assert there[entity] == bool(known)
        if known:
            assert last[entity] == max(known)[2]


def test_events_are_shuffled_and_repeated_as_they_were() -> None:
    now_us = 1_700_000_000_000_000
    events = shuffled_events(4000, 200, now_us)
    assert len(events) == 5200
    assert set(events.number.tolist()) == set(range(4000))
    assert (np.diff(events.event_time_us) < 0).mean() > 0.3  # in no order of time
    assert events.event_time_us.max() < now_us
    first: dict[int, tuple[int, int, int]] = {}
    for number, *rest in zip(*(a.tolist() for a in (events.number, events.entity, events.event_time_us, events.sequence)), strict=True):
        assert first.setdefault(number, tuple(rest)) == tuple(rest)
    assert len(set(zip(events.entity.tolist(), events.event_time_us.tolist(), strict=True))) < 4000  # the sequence has to decide sometimes


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**32))
def test_each_event_counts_once(distinct: int, entities: int, seed: int) -> None:
    events = spread_events(distinct, entities, 1_700_000_000_000_000, seed=seed)
    known = {
        number: (entity, time_us, value)
        for number, entity, time_us, value in zip(
            *(a.tolist() for a in (events.number, events.entity, events.event_time_us, value_of(events))), strict=True
        )
    }
    assert len({time_us for _, time_us, _ in known.values()}) == distinct
    for entity, row in enumerate(counted(events, entities).tolist()):
        own = sorted((time_us, value) for of, time_us, value in known.values() if of == entity)
        assert row == [len(own), sum(value for _, value in own), own[-1][1] if own else 0]


def test_values_tell_events_apart_exactly() -> None:
    numbers = np.array([0, 4095, 4096, 16_777_217, 1_299_999])
    values = Events(numbers, numbers, numbers.astype(np.uint64), numbers).values()
    assert (values[:, 0].astype(np.int64) + 4096 * values[:, 1].astype(np.int64)).tolist() == numbers.tolist()


def test_zipf_asks_in_proportion_to_the_rank() -> None:
    keys = zipf(1000, 1.0, 200_000, seed=1)
    counts = np.sort(np.bincount(keys, minlength=1000))[::-1]
    expected = 200_000 / np.sum(1 / np.arange(1, 1001))
    np.testing.assert_allclose(counts[:3], [expected, expected / 2, expected / 3], rtol=0.05)
    assert keys.max() < 1000


def test_the_registry_takes_the_records() -> None:
    made = records(SHAPES)
    assert [rules.check(record) for record in made] == [[]] * len(made)
    assert {record.name for record in made} >= {SMALL, COUNTED, "500x64", "500x64-set"}
    for shape in SHAPES:
        assert all(len(set(question.tolist())) == shape.rows for question in shape.questions())
