"""What may change in something already published, and what may not.

Rows in the store carry the schema id they were written with, under a key that holds the view's version. So within a version columns
are only ever appended, each append is a new schema, and a version that was used before (also by a view since deleted) goes on
where it stopped. A published model version stays what it was for ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from plait.registry.records import Feature, FeatureSchema, FeatureView, Model, Record
from plait.registry.resources import Past
from plait.registry.rules import Finding

MAX_SCHEMA_ID: Final = 2**16 - 1  # u16 in the row's header


def evolve(record: Record, past: Past) -> tuple[Record, list[Finding]]:
    """Return the record as it is to be stored (a view gets its schemas) and what forbids it."""
    if isinstance(record, FeatureView):
        return _evolve_view(record, past.views.get((record.name, record.version)))
    if isinstance(record, Model):
        return record, list(_published(record, past))
    return record, []


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
        was = f"{old.entity.type} (key {old.entity.key})"
        yield ("entity",), f"was {was} in version {view.version} and cannot change within it; {_bump(view)}"
    columns = [_column(f) for f in view.features]
    for index, feature in enumerate(old.schemas[-1].features):
        wanted = _column(feature)
        if index < len(columns) and columns[index] == wanted:
            continue
        yield ("features",), f"{_what_happened(feature, view)}; {_bump(view)}"
        return  # the rest is shifted by this one


def _what_happened(feature: Feature, view: FeatureView) -> str:
    now = next((f for f in view.features if f.name == feature.name), None)
    if now is None:
        return f"column {feature.name!r} was removed, but rows of version {view.version} have it"
    if now.dtype != feature.dtype:
        return f"column {feature.name!r} was retyped from {feature.dtype} to {now.dtype}, but its rows keep the old type"
    return f"column {feature.name!r} was moved, but columns are told apart by position; append new ones at the end"


def _bump(view: FeatureView) -> str:
    return f"set version: {view.version + 1} (it starts with no rows)"


def _column(feature: Feature) -> tuple[str, str]:
    return feature.name, feature.dtype


def _published(model: Model, past: Past) -> Iterator[Finding]:
    for index, version in enumerate(model.versions):
        published = past.digests.get((model.name, version.version), "")
        if published and version.digest and version.digest != published:
            was = f"version {version.version} was published as {published} and cannot become {version.digest}"
            yield ("versions", index, "digest"), f"{was}; publish it under a new version"
