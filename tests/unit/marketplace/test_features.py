"""Features of a moment know nothing of what came after it, and are what a plain count gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.data import Dataset
from marketplace.features import AGE_BANDS, GLOBAL_MEAN, HALF_LIFE_S, LIKED, SHRINK, Features, Running, compute, view_features


def until(data: Dataset, events: int) -> Dataset:
    """The data set as it was after so many events."""
    names = ("event_user", "event_item", "rating", "event_time_s")
    return dataclasses.replace(data, **{name: getattr(data, name)[:events] for name in names})


@st.composite
def small(draw: st.DrawFn) -> Dataset:
    """A few users and items, and events between them in any order, some in the same second."""
    users, items, events = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 25))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    genres = random.integers(0, 2, (items, 3)).astype(np.float32)
    return Dataset(
        user_ids=tuple(f"u{n}" for n in range(users)),
        item_ids=tuple(f"i{n}" for n in range(items)),
        titles=tuple(f"t{n}" for n in range(items)),
        age=random.integers(7, 80, users).astype(np.float32),
        male=random.integers(0, 2, users).astype(np.float32),
        occupation=random.integers(0, 2, users),
        occupations=("artist", "writer"),
        genres=genres,
        genre_names=("A", "B", "C"),
        year=random.integers(1930, 1999, items).astype(np.float32),
        event_user=random.integers(0, users, events),
        event_item=random.integers(0, items, events),
        rating=random.integers(1, 6, events).astype(np.float32),
        event_time_s=np.sort(random.integers(0, draw(st.sampled_from([3, 10_000_000])), events)),
    )


def everybody(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(count, dtype=np.int64)


@settings(max_examples=80, deadline=None)
@given(small(), st.data())
def test_what_comes_later_changes_nothing(data: Dataset, choice: st.DataObject) -> None:
    now = choice.draw(st.integers(1, len(data.rating)))
    whole, past = compute(data), compute(until(data, now))
    for view, entities in (("user_behaviour", data.user_ids), ("item_stats", data.item_ids)):
        who = everybody(len(entities))
        running: Running = getattr(whole, view)
        then: Running = getattr(past, view)
        np.testing.assert_allclose(running.rows[running.before(who, now)], then.rows[then.latest(who)], rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(small(), st.data())
def test_an_event_is_not_part_of_its_own_features(data: Dataset, choice: st.DataObject) -> None:
    at = choice.draw(st.integers(0, len(data.rating) - 1))
    other = dataclasses.replace(data, rating=data.rating.copy())
    other.rating[at] = 6 - other.rating[at] if other.rating[at] != 3 else 1
    rows = []
    for version in (compute(data), compute(other)):
        user, item = data.event_user[[at]], data.event_item[[at]]
        user_rows, item_rows = version.user_behaviour.before(user, at), version.item_stats.before(item, at)
        rows.append(np.concatenate([version.user(user, user_rows), version.item(item, item_rows)], axis=1))
    np.testing.assert_array_equal(*rows)
    assert not np.array_equal(compute(data).item_stats.rows[at + 1], compute(other).item_stats.rows[at + 1])  # but of the next one's


def mean(ratings: list[float]) -> float:
    return (sum(ratings) + SHRINK * GLOBAL_MEAN) / (len(ratings) + SHRINK) - GLOBAL_MEAN


def share(part: int, whole: int) -> float:
    return part / max(whole, 1)


@settings(max_examples=60, deadline=None)
@given(small(), st.data())
def test_features_are_what_a_plain_count_gives(data: Dataset, choice: st.DataObject) -> None:
    now = choice.draw(st.integers(0, len(data.rating)))
    features, names = compute(data), view_features(data)
    events = range(now)
    for item in range(len(data.item_ids)):
        mine = [n for n in events if data.event_item[n] == item]
        ratings = [float(data.rating[n]) for n in mine]
        users = [int(data.event_user[n]) for n in mine]
        bands = [sum(data.age[u] >= limit for limit in AGE_BANDS) for u in users]
        last = data.event_time_s[mine[-1]] if mine else 0
        expected = {
            "log_events": math.log1p(len(mine)),
            "rating_mean": mean(ratings) if mine else 0,
            "like_share": share(sum(r >= LIKED for r in ratings), len(mine)),
            "rating_spread": float(np.std(ratings)) if mine else 0,
            "log_recent": math.log1p(sum(2 ** ((int(data.event_time_s[n]) - int(last)) / HALF_LIFE_S) for n in mine)),
            "days_listed": math.log1p((int(last) - int(data.event_time_s[mine[0]])) / 86400) if mine else 0,
            "male_share": share(sum(data.male[u] == 1 for u in users), len(mine)),
            "mean_female": mean([r for r, u in zip(ratings, users, strict=True) if data.male[u] == 0]),
            "share_age_2": share(bands.count(2), len(mine)),
            "mean_age_2": mean([r for r, b in zip(ratings, bands, strict=True) if b == 2]),
            "mean_writer": mean([r for r, u in zip(ratings, users, strict=True) if data.occupation[u] == 1]),
        }
        row = features.item_stats.rows[features.item_stats.before(everybody(item + 1)[-1:], now)][0]
        found = dict(zip(names["item-stats"], row.tolist(), strict=True))
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-3)
    for user in range(len(data.user_ids)):
        mine = [n for n in events if data.event_user[n] == user]
        of_b = [float(data.rating[n]) for n in mine if data.genres[data.event_item[n], 1]]
        expected = {
            "log_events": math.log1p(len(mine)),
            "rating_mean": mean([float(data.rating[n]) for n in mine]),
            "like_share": share(sum(data.rating[n] >= LIKED for n in mine), len(mine)),
            "share_b": share(len(of_b), len(mine)),
            "mean_b": mean(of_b),
        }
        row = features.user_behaviour.rows[features.user_behaviour.before(everybody(user + 1)[-1:], now)][0]
        found = dict(zip(names["user-behaviour"], row.tolist(), strict=True))
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_whoever_has_no_events_has_zeros(data: Dataset, features: Features) -> None:
    new = compute(dataclasses.replace(until(data, 1), user_ids=data.user_ids))
    for running, owner in ((new.user_behaviour, data.event_user[0]), (new.item_stats, data.event_item[0])):
        rows = running.rows[running.latest(everybody(10))]
        assert not np.delete(rows, np.flatnonzero(everybody(10) == owner), axis=0).any()
    for running in (features.user_behaviour, features.item_stats):
        assert running.before(everybody(10), 0).tolist() == [0] * 10
        assert not running.rows[0].any()


def test_every_column_has_a_name_of_its_own(data: Dataset, features: Features) -> None:
    names = view_features(data)
    widths = {
        "user-profile": features.user_profile.shape[1],
        "user-behaviour": features.user_behaviour.rows.shape[1],
        "item-content": features.item_content.shape[1],
        "item-stats": features.item_stats.rows.shape[1],
    }
    assert {view: len(columns) for view, columns in names.items()} == widths
    assert all(len(set(columns)) == len(columns) for columns in names.values())
    assert {"genre_children_s", "genre_film_noir", "genre_sci_fi"} < set(names["item-content"])


def test_static_views_are_the_columns_they_are_called(data: Dataset, features: Features) -> None:
    names = view_features(data)
    profile = dict(zip(names["user-profile"], features.user_profile[2].tolist(), strict=True))
    assert profile["age"] == pytest.approx(data.age[2] / 100)
    assert [name for name, value in profile.items() if name.startswith("occupation_") and value] == ["occupation_educator"]
    content = dict(zip(names["item-content"], features.item_content[0].tolist(), strict=True))
    assert content["year"] == pytest.approx((1931 - 1990) / 10)
    assert [name for name, value in content.items() if name.startswith("genre_") and value] == ["genre_adventure"]
    unknown_year = int(np.flatnonzero(data.year == 0)[0])
    assert features.item_content[unknown_year, 0] == 0


def test_everything_is_finite_float32(features: Features) -> None:
    for array in (features.user_profile, features.item_content, features.user_behaviour.rows, features.item_stats.rows):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
