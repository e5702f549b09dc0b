"""Ids as they travel and ids as Python has them: read once for both services, so that a key of several parts is the same key in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plait.registry.records import Entity

IdPart = str | int
Id = str | int | tuple[IdPart, ...]


def read_ids(ids: Any, entity: Entity) -> tuple[Sequence[Id], str]:
    """Return the ids of an EntityIds message, and what is wrong with them (empty = nothing).

    Composite ones become tuples. The words tell places, never an id: it may be a person's.
    """
    lists = {"string": ids.string_ids, "int64": ids.int64_ids, "composite": ids.composite_ids}
    given = [kind for kind, values in lists.items() if values]
    if len(given) > 1:
        return (), f"only one of {[f'{kind}_ids' for kind in given]} may be set"
    if not given:
        return (), "at least one id is needed"
    if given[0] != entity.key:
        return (), f"{given[0]}_ids are given, but the entity type's key is {entity.key}: set {entity.key}_ids"
    if entity.key == "composite":
        found = composites(ids)
        return found, misfit(found, entity)
    values: Sequence[Id] = lists[entity.key][:]
    return values, "an id is empty" if entity.key == "string" and "" in values else ""


def composites(ids: Any) -> list[tuple[IdPart, ...]]:
    """Return the composite ids of an EntityIds message as tuples; one with a part that is not set becomes the empty tuple, which fits nothing."""
    return [_composite(key.parts) for key in ids.composite_ids]


def _composite(parts: Any) -> tuple[IdPart, ...]:
    kinds = [part.WhichOneof("part") for part in parts]
    return () if None in kinds else tuple(getattr(part, kind) for part, kind in zip(parts, kinds, strict=True))


def misfit(found: Sequence[tuple[IdPart, ...]], entity: Entity) -> str:
    """Return where composite ids do not have the declared parts, empty where all have."""
    wanted = tuple(str if part.type == "string" else int for part in entity.parts)
    for at, key in enumerate(found):
        if tuple(map(type, key)) != wanted:
            shape = ", ".join(f"{part.name} ({part.type})" for part in entity.parts)
            return f"composite_ids[{at}] does not have the parts of {entity.type!r}: {shape}"
    return ""
