"""Ids as they travel and as Python has them: kinds are never mixed up, and what is wrong is told by its place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.api.types.v1 import types_pb2
from plait.registry.entity_ids import composites, read_ids
from plait.registry.records import Entity, KeyPart

STRING, INT64 = Entity(type="item"), Entity(type="item", key="int64")
BOTH = Entity(type="sku", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="number", type="int64")))
PARTS = st.tuples(st.text(max_size=4), st.integers(-(1 << 63), (1 << 63) - 1))


def message(*keys: tuple[str | int, ...]) -> types_pb2.EntityIds:
    ids = types_pb2.EntityIds()
    for key in keys:
        made = ids.composite_ids.add()
        for part in key:
            made.parts.add(**{"string_part" if isinstance(part, str) else "int64_part": part})  # type: ignore[arg-type]
    return ids


@given(st.lists(PARTS, min_size=1, max_size=5))
def test_composite_ids_become_tuples_of_the_declared_types(keys: list[tuple[str, int]]) -> None:
    assert read_ids(message(*keys), BOTH) == (keys, "")
    assert composites(message(*keys)) == keys


@pytest.mark.parametrize(
    ("ids", "entity", "words"),
    [
        (types_pb2.EntityIds(), STRING, "at least one id"),
        (types_pb2.EntityIds(string_ids=["a"], int64_ids=[1]), STRING, "only one of ['string_ids', 'int64_ids'] may be set"),
        (types_pb2.EntityIds(string_ids=["a"]), INT64, "string_ids are given, but the entity type's key is int64: set int64_ids"),
        (types_pb2.EntityIds(string_ids=["a"]), BOTH, "set composite_ids"),
        (message(("a", 1)), STRING, "set string_ids"),
        (types_pb2.EntityIds(string_ids=["a", ""]), STRING, "an id is empty"),
        (message(("a", 1), ("a",)), BOTH, "composite_ids[1] does not have the parts of 'sku': shop (string), number (int64)"),
        (message(("a", "1")), BOTH, "composite_ids[0] does not have the parts"),
        (message((1, 1)), BOTH, "composite_ids[0] does not have the parts"),
        (message(("a", 1, 1)), BOTH, "composite_ids[0] does not have the parts"),
        (message(()), BOTH, "composite_ids[0] does not have the parts"),
        (types_pb2.EntityIds(composite_ids=[{"parts": [{"string_part": "a"}, {}]}]), BOTH, "composite_ids[0] does not have the parts"),  # type: ignore[list-item]
    ],
)
def test_what_is_wrong_is_told_by_its_place(ids: Any, entity: Entity, words: str) -> None:
    _, problem = read_ids(ids, entity)
    assert words in problem


def test_others_are_what_they_are() -> None:
    assert read_ids(types_pb2.EntityIds(string_ids=["a", "b"]), STRING) == (["a", "b"], "")
    assert read_ids(types_pb2.EntityIds(int64_ids=[1, 0]), INT64) == ([1, 0], "")
    assert read_ids(message(("", 0)), BOTH) == ([("", 0)], "")
