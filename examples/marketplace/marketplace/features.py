"""What the marketplace knows of its users and items, and how it follows from the events.

One piece of code makes both what is written online after each event and what a model is trained on as of before each event, so the two cannot
drift apart: running sums over the events of each user and item, by cumulative sums over all events at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from marketplace.data import Dataset

LIKED: Final = 4.0  # a rating from here on is a like
GLOBAL_MEAN: Final = 3.5  # what a mean is drawn to while there are few ratings
SHRINK: Final = 5.0  # how many ratings' worth it is drawn
HALF_LIFE_S: Final = 14 * 86400.0  # of an item's recent popularity
AGE_BANDS: Final = (18, 25, 35, 45, 50, 56)  # MovieLens' own bands

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The state of every entity of one type after each of its events.

    `rows` float32 [events + 1, features]: row n + 1 is the state after event n (in time order over all entities), row 0 that of an entity
    without events. `keys` are sorted entity * (events + 1) + n, to find the last event of an entity before a given one.
    """

    rows: Array
    keys: Index
    events: int

    def before(self, entity: Index, event: Index | int) -> Index:
        """Return, for each entity, the row of its state just before event number `event`."""
        at = np.searchsorted(self.keys, entity * (self.events + 1) + event) - 1
        found = self.keys[np.maximum(at, 0)]
        own = (at >= 0) & (found // (self.events + 1) == entity)
        return np.where(own, found % (self.events + 1) + 1, 0)

    def latest(self, entity: Index) -> Index:
        """Return, for each entity, the row of its state after all events."""
        return self.before(entity, self.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Everything the model sees: two static views, two running ones, and the names of their columns."""

    user_profile: Array  # [users, …]
    item_content: Array  # [items, …]
    user_behaviour: Running
    item_stats: Running

    def user(self, users: Index, rows: Index) -> Array:
        """Return the model's user input [n, Du]: profile, then behaviour at the given rows."""
        return np.concatenate([self.user_profile[users], self.user_behaviour.rows[rows]], axis=1)

    def item(self, items: Index, rows: Index) -> Array:
        """Return the model's item input [n, Di]: content, then statistics at the given rows."""
        return np.concatenate([self.item_content[items], self.item_stats.rows[rows]], axis=1)


def view_features(data: Dataset) -> dict[str, tuple[str, ...]]:
    """Return the column names of each feature view, in order."""
    genres = [_slug(name) for name in data.genre_names]
    jobs = [_slug(name) for name in data.occupations]
    bands = range(len(AGE_BANDS) + 1)
    return {
        "user-profile": ("age", "male", *(f"occupation_{job}" for job in jobs)),
        "user-behaviour": ("log_events", "rating_mean", "like_share", *(f"share_{g}" for g in genres), *(f"mean_{g}" for g in genres)),
        "item-content": ("year", *(f"genre_{g}" for g in genres)),
        "item-stats": (
            *("log_events", "rating_mean", "like_share", "rating_spread", "log_recent", "days_listed"),
            *("male_share", "mean_male", "mean_female"),
            *(f"share_age_{b}" for b in bands),
            *(f"mean_age_{b}" for b in bands),
            *(f"mean_{job}" for job in jobs),
        ),
    }


def compute(data: Dataset) -> Features:
    """Compute every view over all events."""
    jobs = np.eye(len(data.occupations), dtype=np.float32)[data.occupation]
    profile = np.column_stack([data.age / 100, data.male, jobs]).astype(np.float32)
    year = np.where(data.year > 0, (data.year - 1990) / 10, 0)
    content = np.column_stack([year, data.genres]).astype(np.float32)
    return Features(user_profile=profile, item_content=content, user_behaviour=_user_behaviour(data), item_stats=_item_stats(data, jobs))


def _user_behaviour(data: Dataset) -> Running:
    rating = data.rating.astype(np.float64)[:, None]
    genres = data.genres[data.event_item].astype(np.float64)
    ones = np.ones_like(rating)
    per_event = np.concatenate([ones, rating, rating >= LIKED, genres, genres * rating], axis=1)
    sums, keys = _running_sums(data.event_user, per_event)
    width = data.genres.shape[1]
    count, total, likes = sums[:, :1], sums[:, 1:2], sums[:, 2:3]
    by_genre, rated = sums[:, 3 : 3 + width], sums[:, 3 + width :]
    rows = np.concatenate(
        [np.log1p(count), _mean(total, count), _share(likes, count), _share(by_genre, count), _mean(rated, by_genre)], axis=1
    )
    return Running(rows=rows.astype(np.float32), keys=keys, events=len(rating))


def _item_stats(data: Dataset, jobs: Array) -> Running:
    rating = data.rating.astype(np.float64)[:, None]
    user = data.event_user
    male = data.male[user].astype(np.float64)[:, None]
    band = np.eye(len(AGE_BANDS) + 1)[np.searchsorted(AGE_BANDS, data.age, side="right")][user]
    job = jobs[user].astype(np.float64)
    time_s = (data.event_time_s - data.event_time_s[0]).astype(np.float64)[:, None]
    weight = np.exp2(time_s / HALF_LIFE_S)  # a decayed count is a plain sum of these, scaled back to the moment it is asked for
    ones = np.ones_like(rating)
    parts = [
        ones,
        rating,
        rating**2,
        rating >= LIKED,
        weight,
        male,
        male * rating,
        (1 - male) * rating,
        band,
        band * rating,
        job,
        job * rating,
    ]
    sums, keys = _running_sums(data.event_item, np.concatenate(parts, axis=1))
    columns = np.split(sums, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    count, total, squares, likes, recent, males, male_total, female_total, bands, band_total, in_job, job_total = columns
    now = np.concatenate([[[0.0]], time_s])  # row n + 1 is the state at event n's time
    first = np.full(len(data.item_ids), np.inf)
    np.minimum.at(first, data.event_item, time_s[:, 0])
    listed = np.concatenate([[0.0], time_s[:, 0] - first[data.event_item]])[:, None] / 86400
    spread = np.sqrt(np.maximum(squares / np.maximum(count, 1) - (total / np.maximum(count, 1)) ** 2, 0))
    rows = np.concatenate(
        [
            *(np.log1p(count), _mean(total, count), _share(likes, count), spread),
            *(np.log1p(recent / np.exp2(now / HALF_LIFE_S)), np.log1p(listed)),
            *(_share(males, count), _mean(male_total, males), _mean(female_total, count - males)),
            *(_share(bands, count), _mean(band_total, bands), _mean(job_total, in_job)),
        ],
        axis=1,
    )
    return Running(rows=rows.astype(np.float32), keys=keys, events=len(rating))


def _running_sums(entity: Index, per_event: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], Index]:
    """Return the sums over each entity's events up to and including each event, by event number + 1 (row 0 is zero), and the sorted keys."""
    events = len(entity)
    order = np.argsort(entity, kind="stable")
    totals = np.cumsum(per_event[order], axis=0)
    starts = np.flatnonzero(np.diff(entity[order], prepend=-1))
    before = np.concatenate([np.zeros((1, per_event.shape[1])), totals])[starts]
    totals -= np.repeat(before, np.diff(np.append(starts, events)), axis=0)
    sums = np.zeros((events + 1, per_event.shape[1]))
    sums[order + 1] = totals
    return sums, entity[order] * (events + 1) + order


def _mean(total: npt.NDArray[np.float64], count: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return shrunk means, as a difference from the global one."""
    shrunk: npt.NDArray[np.float64] = (total + SHRINK * GLOBAL_MEAN) / (count + SHRINK) - GLOBAL_MEAN
    return shrunk


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = part / np.maximum(whole, 1)
    return shares


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")
