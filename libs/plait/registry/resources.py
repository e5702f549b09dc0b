"""A record with what the registry knows about it, and how it changed: what `store` answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal

from plait.registry.records import ApiKey, Epochs, FeatureView, Kind, Record, Snapshot
from plait.registry.specs import kind_of

Key = tuple[Kind, str]
Action = Literal["created", "updated", "unchanged", "deleted"]

_TABLES: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        "Model": "models",
        "FeatureView": "feature_views",
        "FeatureSet": "feature_sets",
        "Route": "routes",
        "Tenant": "tenants",
        "Experiment": "experiments",
        "Pool": "pools",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A stored record. `generation` counts its changes from 1 (also across a delete), `revision` is the registry's at the last one."""

    record: Record
    generation: int
    revision: int
    created_at: datetime
    updated_at: datetime

    @property
    def kind(self) -> Kind:
        return kind_of(self.record)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def etag(self) -> str:
        """Changes whenever the resource does; give it back on a write to be sure that nobody was faster."""
        return f"g{self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one resource (of one key with kind "ApiKey", of a view's epochs with "FeatureEpoch"): the answer of a write, and an
    entry of the audit log.

    `before` and `after` are stored specs, None where there was or is nothing. A dry run has the revision it looked at.
    """

    action: Action
    kind: Kind | Literal["ApiKey", "FeatureEpoch"]
    name: str
    generation: int
    revision: int
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    actor: str = ""
    reason: str = ""
    changed_at: datetime | None = None

    def differences(self) -> list[Difference]:
        """Return which fields changed, and how."""
        return list(diff(self.before or {}, self.after or {}))


@dataclass(frozen=True, slots=True)
class Difference:
    """One field before and after; None where it was or is absent."""

    field: str
    before: object
    after: object


def diff(before: object, after: object, at: str = "") -> Iterator[Difference]:
    """Yield the leaves that differ. Lists of things with a name (or a version) are matched by it, others by position."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys((*before, *after)):
            yield from diff(before.get(name), after.get(name), f"{at}.{name}" if at else str(name))
    elif isinstance(before, list) and isinstance(after, list):
        old, new = _entries(before), _entries(after)
        for name in dict.fromkeys((*old, *new)):
            yield from diff(old.get(name), new.get(name), f"{at}[{name}]")
    elif before != after:
        yield Difference(at, before, after)


def _entries(items: list[Any]) -> dict[object, Any]:
    for label in ("name", "version", "id"):
        if all(isinstance(item, Mapping) and label in item for item in items):
            named = {item[label]: item for item in items}
            if len(named) == len(items):
                return named
    return dict(enumerate(items))


def snapshot_of(
    revision: int, records: Iterable[Record], keys: Iterable[ApiKey], epochs: Mapping[tuple[str, str, int], Epochs] = MappingProxyType({})
) -> Snapshot:
    """Put records, keys and the epochs of views into one immutable snapshot."""
    tables: dict[str, dict[str, Any]] = {table: {} for table in _TABLES.values()}
    for record in records:
        tables[_TABLES[kind_of(record)]][record.name] = record
    frozen = {table: MappingProxyType(found) for table, found in tables.items()}
    by_hash = MappingProxyType({key.sha256: key for key in keys})
    return Snapshot(revision=revision, keys=by_hash, epochs=MappingProxyType(dict(epochs)), **frozen)


def records_of(snapshot: Snapshot) -> list[Record]:
    """Return every record of a snapshot, by kind and name."""
    return [record for table in _TABLES.values() for _, record in sorted(getattr(snapshot, table).items())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What was ever published under the names at hand, deleted or not: rows and artifacts of those days are still around.

    `views`: the newest generation of each (view, version); `digests`: that of each (model, version).
    """

    views: Mapping[tuple[str, int], FeatureView] = field(default_factory=dict)
    digests: Mapping[tuple[str, str], str] = field(default_factory=dict)
