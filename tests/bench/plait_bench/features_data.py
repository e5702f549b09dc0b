"""What is written and asked in the features benchmark: shapes, values, ids, and a replay in which few entities get most of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from plait.registry.records import Aggregate, Aggregation, Entity, Feature, FeatureSet, FeatureView, ModelInput

Values = npt.NDArray[np.float32]
ENTITY: Final = "item"
INPUT: Final = "item"
SMALL_COLUMNS: Final = 20  # of the view that is written at full speed and replayed: what a marketplace knows of a listing
COUNTED_COLUMNS: Final = 4
QUESTIONS: Final = 32  # different sets of ids that are asked in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """So many entities per read, of so many float32 features. Twice as many entities are stored."""

    rows: int
    columns: int

    @property
    def name(self) -> str:
        """For a view, a feature set ("…-set") and the report."""
        return f"{self.rows}x{self.columns}"

    @property
    def feature_set(self) -> str:
        """Its feature set's name."""
        return set_name(self.name)

    @property
    def ids(self) -> list[str]:
        """Every entity stored."""
        return entity_ids(2 * self.rows)

    @property
    def values(self) -> Values:
        """[entities, columns], the same each time."""
        return np.random.default_rng(self.columns).standard_normal((2 * self.rows, self.columns), np.float32)

    def questions(self) -> list[npt.NDArray[np.intp]]:
        """Return sets of positions in `ids`, each `rows` long."""
        generator = np.random.default_rng(self.rows)
        return [generator.permutation(2 * self.rows)[: self.rows] for _ in range(QUESTIONS)]


SHAPES: Final = (Shape(rows=100, columns=50), Shape(rows=500, columns=64), Shape(rows=1000, columns=300))
SMALL: Final = "small"
COUNTED: Final = "counted"
ACTIVITY: Final = "activity"


def entity_ids(count: int) -> list[str]:
    """Return that many ids."""
    return [f"item-{n:07d}" for n in range(count)]


def set_name(view: str) -> str:
    """Return the name of the set with all of a view's features."""
    return f"{view}-set"


def view_of(name: str, columns: int) -> FeatureView:
    """Return a view of float32 features f0, f1, …"""
    return FeatureView(name=name, entity=Entity(type=ENTITY), features=tuple(Feature(name=f"f{n}", default=0.0) for n in range(columns)))


def set_of(view: FeatureView) -> FeatureSet:
    """Return the set whose one input is all of a view's features, in order."""
    features = tuple(f"{view.name}:{feature.name}" for feature in view.features)
    return FeatureSet(name=set_name(view.name), inputs=(ModelInput(name=INPUT, entity=ENTITY, features=features),))


def records(shapes: Sequence[Shape]) -> list[FeatureView | FeatureSet]:
    """Return everything the registry must know."""
    views = [view_of(shape.name, shape.columns) for shape in shapes] + [view_of(SMALL, SMALL_COLUMNS), view_of(COUNTED, COUNTED_COLUMNS)]
    views.append(activity_view())
    return [*views, *map(set_of, views)]


def activity_view() -> FeatureView:
    """Return the view that is counted from events: how many, the sum of their values, and the last one's."""
    functions: dict[str, tuple[Literal["count", "sum", "last"], str]] = {
        "f0": ("count", ""), "f1": ("sum", "value"), "f2": ("last", "value")
    }  # fmt: skip
    features = tuple(
        Feature(name=name, default=0.0, aggregate=Aggregate(function=function, events=("view",), value=value))
        for name, (function, value) in functions.items()
    )
    return FeatureView(name=ACTIVITY, entity=Entity(type=ENTITY), features=features, aggregation=Aggregation())


def zipf(keys: int, exponent: float, lookups: int, seed: int) -> npt.NDArray[np.intp]:
    """Return positions of keys: the n-th most wanted is asked for in proportion to n^-exponent (Zipf's law); which one that is, is shuffled."""
    generator = np.random.default_rng(seed)
    weights = np.cumsum(np.arange(1, keys + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(weights, generator.random(lookups) * weights[-1])
    asked: npt.NDArray[np.intp] = generator.permutation(keys)[ranks]
    return asked


@dataclass(frozen=True, slots=True)
class Events:
    """Writes in the order they arrive: parallel arrays. `number` says which event a write is; a repeated one comes again as it was."""

    entity: npt.NDArray[np.int64]
    event_time_us: npt.NDArray[np.int64]
    sequence: npt.NDArray[np.uint64]
    number: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.number)

    def at(self, where: Any) -> Events:
        """Return some of them."""
        return Events(self.entity[where], self.event_time_us[where], self.sequence[where], self.number[where])

    def values(self) -> Values:
        """Return [writes, COUNTED_COLUMNS]: which event it is, in numbers that float32 holds exactly."""
        columns = [self.number % 4096, self.number // 4096, self.entity % 4096, self.entity // 4096]
        return np.stack(columns, axis=1).astype(np.float32)


def shuffled_events(distinct: int, entities: int, now_us: int, repeated: float = 0.3, seed: int = 7) -> Events:
    """Return `distinct` events and a share of them again, in an order that has nothing to do with their times. Some times are shared."""
    generator = np.random.default_rng(seed)
    entity = generator.integers(0, entities, distinct)
    # Few different times, so that the sequence often has to decide.
    times = now_us - generator.integers(1, 1 + max(distinct // (4 * entities), 2), distinct) * 1_000_000
    events = Events(entity, times, generator.permutation(distinct).astype(np.uint64), np.arange(distinct))
    again = generator.integers(0, distinct, int(distinct * repeated))
    return events.at(generator.permutation(np.concatenate([np.arange(distinct), again])))


def newest(events: Events, entities: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return, per entity, the number of the event that must be left (the greatest by time, then sequence), and whether it has any."""
    order = np.lexsort((events.sequence, events.event_time_us, events.entity))
    last = np.full(entities, -1, np.int64)
    last[events.entity[order]] = events.number[order]  # later ones overwrite earlier ones
    return last, last >= 0


def counted(events: Events, entities: int) -> Values:
    """Return [entities, 3]: what the activity view must say of events whose value is `value_of`, each counted once."""
    _, first = np.unique(events.number, return_index=True)
    once = events.at(first)
    values = value_of(once)
    found = np.zeros((entities, 3), np.float32)
    found[:, 0] = np.bincount(once.entity, minlength=entities)
    found[:, 1] = np.bincount(once.entity, weights=values, minlength=entities)
    order = np.argsort(once.event_time_us)
    found[once.entity[order], 2] = values[order]  # later ones overwrite earlier ones
    return found


def value_of(events: Events) -> npt.NDArray[np.int64]:
    """Return each event's value: small and whole, so that a float32 holds their sums exactly."""
    values: npt.NDArray[np.int64] = events.number % 1000
    return values


def spread_events(distinct: int, entities: int, now_us: int, repeated: float = 0.3, seed: int = 9) -> Events:
    """Return shuffled events, some of them twice, no two different ones of one time: which is the last is then not a matter of hashes."""
    generator = np.random.default_rng(seed)
    times = now_us - 1000 * (1 + generator.permutation(distinct))
    events = Events(generator.integers(0, entities, distinct), times, np.zeros(distinct, np.uint64), np.arange(distinct))
    again = generator.integers(0, distinct, int(distinct * repeated))
    return events.at(generator.permutation(np.concatenate([np.arange(distinct), again])))
