"""What may change in something already published, and what may not.

Rows in the store carry the schema id they were written with, under a key that holds the view's version. So within a version columns
are only ever appended, each append is a new schema, and a version that was used before (also by a view since deleted) goes on
where it stopped. Versions that feature sets pin are kept beside the current one, and so is always the newest of the others. A published
model version stays what it was for ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Final

from plait.registry.findings import Finding
from plait.registry.records import Feature, FeatureSchema, FeatureView, Model, PastVersion, Record
from plait.registry.resources import Past

MAX_SCHEMA_ID: Final = 2**16 - 1  # u16 in the row's header
_FIXED: Final = ("width", "scale", "hash_buckets", "max_length", "pad", "aggregate")  # of a column, while rows have it


def evolve(record: Record, past: Past, pinned: Collection[tuple[str, int]] = ()) -> tuple[Record, list[Finding]]:
    """Return the record as it is to be stored (a view gets its schemas and its earlier versions) and what forbids it.

    `pinned`: the versions of views that feature sets read by number, as (view, version).
    """
    if isinstance(record, FeatureView):
        record = dataclasses.replace(record, versions=_versions(record, past, pinned))
        return _evolve_view(record, past.views.get((record.name, record.version)))
    if isinstance(record, Model):
        return record, list(_published(record, past))
    return record, []


def _versions(view: FeatureView, past: Past, pinned: Collection[tuple[str, int]]) -> tuple[PastVersion, ...]:
    others = sorted(version for name, version in past.views if name == view.name and version != view.version)
    return tuple(_past(past.views[view.name, v]) for v in others if v == others[-1] or (view.name, v) in pinned)


def _past(view: FeatureView) -> PastVersion:
    return PastVersion(
        version=view.version,
        entity=view.entity,
        schemas=view.schemas,
        max_age_s=view.max_age_s,
        retention_s=view.retention_s,
        aggregation=view.aggregation,
    )


def _evolve_view(view: FeatureView, old: FeatureView | None) -> tuple[FeatureView, list[Finding]]:
    if old is None:
        return dataclasses.replace(view, schemas=(FeatureSchema(id=1, features=view.features),)), []
    found = list(_incompatible(view, old))
    if found:
        return view, found
    current = old.schemas[-1]
    if len(view.features) == len(current.features):
        kept = dataclasses.replace(current, features=view.features)  # defaults and descriptions may have changed
        return dataclasses.replace(view, schemas=(*old.schemas[:-1], kept)), []
    if current.id >= MAX_SCHEMA_ID:
        return view, [(("features",), f"has changed {MAX_SCHEMA_ID} times in version {view.version}; {_bump(view)}")]
    added = FeatureSchema(id=current.id + 1, features=view.features)
    return dataclasses.replace(view, schemas=(*old.schemas, added)), []


def _incompatible(view: FeatureView, old: FeatureView) -> Iterator[Finding]:
    if view.entity != old.entity:
        was = f"{old.entity.type} (key {_key(old)})"
        yield ("entity",), f"was {was} in version {view.version} and cannot change within it; {_bump(view)}"
    yield from _same_events(view, old)
    for index, feature in enumerate(old.schemas[-1].features):
        if index < len(view.features) and not _differs(view.features[index], feature):
            continue
        yield ("features",), f"{_what_happened(feature, view)}; {_bump(view)}"
        return  # the rest is shifted by this one


def _key(view: FeatureView) -> str:
    parts = ", ".join(f"{part.name} {part.type}" for part in view.entity.parts)
    return f"{view.entity.key} of {parts}" if parts else view.entity.key


def _same_events(view: FeatureView, old: FeatureView) -> Iterator[Finding]:
    before, now = old.aggregation, view.aggregation
    if (before is None) != (now is None):
        yield ("aggregation",), f"cannot come or go within version {view.version}, whose rows hold something else; {_bump(view)}"
    elif before is not None and now is not None and before.entity_from != now.entity_from:
        yield ("aggregation", "entity_from"), f"was {before.entity_from} in version {view.version}; {_bump(view)}"


def _differs(now: Feature, before: Feature) -> bool:
    """Return whether rows that hold `before` would be read as something else."""
    return now.name != before.name or bool(_changed(now, before))


def _changed(now: Feature, before: Feature) -> str:
    """Return what of a column cannot change while rows have it; empty where all may stay."""
    if now.dtype != before.dtype:
        return f"was retyped from {before.dtype} to {now.dtype}, but its rows keep the old type"
    for field in _FIXED:
        was, is_now = getattr(before, field), getattr(now, field)
        if was != is_now:
            told = f" from {was} to {is_now}" if isinstance(was, int | float) else ""
            return f"has another {field}{told}, but its rows keep the old one"
    if now.vocabulary[: len(before.vocabulary)] != before.vocabulary:
        return "has another vocabulary, but its rows hold the places of the old words; add new words at the end"
    if bool(now.vocabulary) != bool(before.vocabulary):
        return "has a vocabulary now, but its rows hold hashes"
    return ""


def _what_happened(feature: Feature, view: FeatureView) -> str:
    now = next((f for f in view.features if f.name == feature.name), None)
    if now is None:
        return f"column {feature.name!r} was removed, but rows of version {view.version} have it"
    if changed := _changed(now, feature):
        return f"column {feature.name!r} {changed}"
    return f"column {feature.name!r} was moved, but columns are told apart by position; append new ones at the end"


def _bump(view: FeatureView) -> str:
    return f"set version: {view.version + 1} (it starts with no rows)"


def _published(model: Model, past: Past) -> Iterator[Finding]:
    for index, version in enumerate(model.versions):
        published = past.digests.get((model.name, version.version), "")
        if published and version.digest and version.digest != published:
            was = f"version {version.version} was published as {published} and cannot become {version.digest}"
            yield ("versions", index, "digest"), f"{was}; publish it under a new version"
