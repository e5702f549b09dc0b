"""Aggregated views compiled for writing: which events change which rows, and where each feature's state lies in them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from feature_retrieval.aggregation.distinct import hash_of
from feature_retrieval.aggregation.events import NOT_WRITABLE, TYPES, Parsed, Refusal
from feature_retrieval.aggregation.rings import NEVER, Index
from feature_retrieval.aggregation.windows import MAX_VALUE, MICRO, Taken, Window, window_of
from feature_retrieval.permissions import may_feed
from feature_retrieval.row_codec import Bytes2D, Id, RowCodec, encode_id, header
from plait.registry.records import Aggregate, FeatureSchema, FeatureView, Snapshot

# The events known of an entity are kept in a set per so much time, so that old ones are forgotten piecewise. Never change it: an event would be
# looked for in another set than the one it was noted in, and counted again.
_BUCKET_US: Final = 14_400 * MICRO
_IDS: Final = {"subject": 0, "object": 1}
_SUMS: Final = frozenset({"count", "sum", "mean"})


@dataclass(frozen=True, slots=True)
class Aggregated:
    """One feature of an aggregated view. `value` as in the manifest; `types`: numbers of the events that count; its state is at `at`."""

    name: str
    window: Window
    types: frozenset[int]
    value: str
    sums: bool
    distinct: bool
    at: slice

    def take(self, events: Sequence[Parsed], ids: Sequence[Any], rows: Index) -> Taken | None:
        """Return what this feature takes of events; `ids` hold (subject, object) of each, `rows` which row each changes; None = nothing."""
        wanted = [n for n, event in enumerate(events) if event.type in self.types]
        if self.distinct and self.value in _IDS:  # nobody is not somebody
            wanted = [n for n in wanted if ids[n][_IDS[self.value]] is not None]
        if not wanted:
            return None
        count = len(wanted)
        chosen = events if count == len(events) else [events[n] for n in wanted]
        values, hashes = np.ones(count), np.empty(0, np.uint64)
        if self.distinct:
            hashes = np.fromiter((hash_of(_distinct_bytes(self.value, events[n], ids[n])) for n in wanted), np.uint64, count)
        elif self.value == "value":
            values = np.fromiter((parsed.event.value for parsed in chosen), np.float64, count)
        elif self.value:
            values = np.fromiter((parsed.event.values[self.value] for parsed in chosen), np.float64, count)
        times = np.fromiter((parsed.time_us for parsed in chosen), np.int64, count)
        marks = np.fromiter((parsed.fingerprint for parsed in chosen), np.int64, count)
        return Taken(rows if count == len(events) else rows[wanted], times, values, hashes, marks)

    def misses(self, parsed: Parsed) -> bool:
        """Whether the feature counts this event, but cannot take its value."""
        if parsed.type not in self.types or not self.value or self.value in _IDS:
            return False
        if self.value != "value" and self.value not in parsed.event.values:
            return True
        return self.sums and abs(parsed.event.value if self.value == "value" else parsed.event.values[self.value]) > MAX_VALUE


@dataclass(frozen=True, slots=True)
class AggregatedView:
    """One version of an aggregated view, ready to take events."""

    view: FeatureView
    codec: RowCodec
    older: dict[int, RowCodec]  # by schema id
    features: tuple[Aggregated, ...]
    types: frozenset[int]
    by_subject: bool
    needs_ids: bool  # some feature tells subjects or objects apart
    memory_us: int  # how long after its time an event is taken, and its duplicates known
    blank: bytes

    def bucket(self, time_us: int) -> int:
        """Return which set of known events one of this time is in."""
        return time_us // _BUCKET_US

    @property
    def ttl_ms(self) -> int:
        """How long a row is kept after its last event, 0 = for ever."""
        return int(self.view.retention_s * 1000)

    def about(self, parsed: Parsed) -> Any:
        """Return the EntityRows of whose row an event changes."""
        return parsed.event.subject if self.by_subject else parsed.event.object

    def refusal(self, parsed: Parsed, now_us: int, *, however_late: bool = False) -> Refusal | None:
        """Return why this view cannot take an event of its own, None = it can."""
        if parsed.time_us < now_us - self.memory_us and not however_late:
            return Refusal(
                "EVENT_TOO_LATE", f"view {self.view.name!r} takes events up to {self.memory_us / MICRO:.0f} s old: see lateness_s"
            )
        missing = [feature for feature in self.features if feature.misses(parsed)]
        if missing:
            return Refusal(
                "VALUE_INVALID",
                f"feature {self.view.name}:{missing[0].name} needs {missing[0].value!r}, which is missing or beyond {MAX_VALUE:.0f}",
            )
        return None

    def widen(self, rows: Sequence[bytes | None]) -> tuple[Bytes2D, list[int]]:
        """Return rows as one block of the current schema that may be written to, blank where there is none, and which cannot be read.

        Columns that are younger than a row begin blank. Rows of a schema that this process does not know yet cannot be read.
        """
        codec = self.codec
        block = np.frombuffer(bytearray(b"".join([row if codec.is_current(row) else self.blank for row in rows])), np.uint8)  # type: ignore[misc]
        block = block.reshape(len(rows), codec.row_bytes)
        unreadable = []
        for at, row in enumerate(rows):
            if row is None or codec.is_current(row):
                continue
            older = self.older.get(int.from_bytes(row[2:4], "little"))
            if older is None or not older.is_current(row):
                unreadable.append(at)
                continue
            was = np.frombuffer(row, np.uint8)[None, :]
            header(block)[at : at + 1] = header(was)
            header(block)["schema"][at] = codec.schema_id
            for name, column in older.columns.items():
                block[at, codec.columns[name].offset : codec.columns[name].end] = was[0, column.offset : column.end]
        return block, unreadable

    def merge(self, block: Bytes2D, events: Sequence[Parsed], ids: Sequence[Any], rows: Index) -> None:
        """Let events change rows in place: `rows[n]` is the row of event n, `ids[n]` its (subject, object).

        A row's event time is that of its newest event, its sequence how many events it has taken, so no two states of it are alike.
        """
        head = header(block)
        times = head["event_time_us"].copy()
        np.maximum.at(times, rows, np.fromiter((parsed.time_us for parsed in events), np.int64, len(events)))
        head["event_time_us"] = times
        head["sequence"] += np.bincount(rows, minlength=len(block)).astype(np.uint64)
        for feature in self.features:
            taken = feature.take(events, ids, rows)
            if taken is not None:
                feature.window.merge(block[:, feature.at], taken)


class AggregationPlans:
    """The aggregated views of one snapshot, current and past versions, by what events they take."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.views = tuple(compile_view(view) for view in _versions(snapshot))
        self.by_type: dict[int, tuple[AggregatedView, ...]] = {
            number: tuple(view for view in self.views if number in view.types) for number in TYPES.values()
        }

    def fed_by(
        self, parsed: Parsed, tenant: str, publisher: str, only: tuple[str, int] | None = None
    ) -> Sequence[AggregatedView] | Refusal:
        """Return the views that count an event of a publisher: its type, about such an entity, from whom they take events at all.

        Views whose writers do not name the publisher pass it by; it is refused where that leaves none. `only`: name and version of
        the one view that is asked for.
        """
        found = [view for view in self.by_type[parsed.type] if view.about(parsed).entity_type == view.view.entity.type]
        if only is not None:
            found = [view for view in found if (view.view.name, view.view.version) == only]
        open_to = [view for view in found if not view.view.writers or may_feed(view.view, tenant, publisher)]
        return NOT_WRITABLE if found and not open_to else open_to

    def epochs(self, tenant: str, view: FeatureView) -> Sequence[int]:
        """Return the epochs of a view whose rows events change: all that are in use."""
        found = self.snapshot.epochs_of(tenant, view.name, view.version)
        return [epoch for epoch in (found.serving, found.building, found.previous) if epoch is not None]


def _versions(snapshot: Snapshot) -> Iterator[FeatureView]:
    for view in snapshot.feature_views.values():
        for version in (view.version, *(past.version for past in view.versions)):
            found = view.at(version)
            if found is not None and found.aggregation is not None:
                yield found


def compile_view(view: FeatureView) -> AggregatedView:
    """Compile one aggregated view; the manifest's rules hold for it."""
    assert view.aggregation is not None  # noqa: S101  (the caller asks for aggregated views only)
    schemas = view.schemas or (FeatureSchema(id=1, features=view.features),)
    codec = RowCodec(schemas[-1])
    features = tuple(
        _aggregated(feature.name, feature.aggregate, codec) for feature in schemas[-1].features if feature.aggregate is not None
    )
    longest_s = max((f.aggregate.window_s for f in schemas[-1].features if f.aggregate is not None), default=0.0)
    memory_s = longest_s + view.aggregation.lateness_s
    return AggregatedView(
        view=view,
        codec=codec,
        older={schema.id: RowCodec(schema) for schema in schemas[:-1]},
        features=features,
        types=frozenset().union(*(feature.types for feature in features)),
        by_subject=view.aggregation.entity_from == "subject",
        needs_ids=any(feature.distinct and feature.value in _IDS for feature in features),
        memory_us=round(memory_s * MICRO),
        blank=_blank(codec, features),
    )


def _aggregated(name: str, aggregate: Aggregate, codec: RowCodec) -> Aggregated:
    column = codec.columns[name]
    return Aggregated(
        name=name,
        window=window_of(aggregate),
        types=frozenset(TYPES[event] for event in aggregate.events if event in TYPES),
        value=aggregate.value,
        sums=aggregate.function in _SUMS,
        distinct=aggregate.function == "distinct",
        at=slice(column.offset, column.end),
    )


def _blank(codec: RowCodec, features: Sequence[Aggregated]) -> bytes:
    """Return a row before any event: no column is null, because what a state is worth is for the moment of reading to say."""
    block = codec.blank(1)
    codec.set_nulls(block, np.zeros((1, len(codec.columns)), np.bool_))
    header(block)["event_time_us"] = NEVER
    for feature in features:
        block[0, feature.at] = np.frombuffer(feature.window.blank(), np.uint8)
    return block.tobytes()


def _distinct_bytes(value: str, parsed: Parsed, ids: tuple[Id | None, Id | None]) -> bytes:
    """Return what a distinct count tells apart: a typed id, or a number's 8 bytes."""
    if value in _IDS:
        entity_id = ids[_IDS[value]]
        assert entity_id is not None  # noqa: S101  (`take` leaves those out)
        return encode_id(entity_id)
    number = parsed.event.value if value == "value" else parsed.event.values[value]
    return struct.pack("<d", number + 0.0)
