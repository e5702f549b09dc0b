"""Stored rows as a batch again: encoding that batch gives the very same rows, whatever the types, nulls, times and ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.feature_retrieval.test_batch_encoding import encode_rows, send, tables

from feature_retrieval.batch_decoding import decode, put_ids
from feature_retrieval.batch_encoding import Encoder
from feature_retrieval.row_codec import RowCodec
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.entity_ids import composites
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView

ROW = st.tuples(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.booleans(), st.integers(0, 2**62))


@settings(max_examples=150, deadline=None)
@given(tables(), st.data())
def test_what_was_encoded_comes_back_byte_for_byte(made: tuple[FeatureView, list[list[Any]]], data: st.DataObject) -> None:
    view, rows = made
    heads = data.draw(st.lists(ROW, min_size=len(rows), max_size=len(rows)))
    times, sequences, deleted, expires = zip(*heads, strict=True)
    codec = RowCodec(FeatureSchema(id=3, features=view.features))
    ids = [f"i{n}" for n in range(len(rows))]
    batch = pb.FeatureBatch(feature_view="any", event_times_us=times, sequences=sequences, deleted=deleted, expires_at_us=expires)
    for at, feature in enumerate(view.features):
        send(batch, feature, [row[at] for row in rows])
    encoded = Encoder(view, codec).encode(batch, ids)
    stored = codec.pack(encoded.block, encoded.tails)
    again = decode(view, codec, ids, stored)
    assert again is not None
    assert list(again.ids.string_ids) == ids
    once_more = Encoder(view, codec).encode(again, ids)
    assert codec.pack(once_more.block, once_more.tails) == stored


def test_a_feature_the_schema_does_not_know_yet_is_left_out() -> None:
    old = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="a"),))
    new = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="a"), Feature(name="b")))
    codec, encoded = encode_rows(old, [[1.0], [2.0]])
    batch = decode(new, codec, ["x", "y"], codec.pack(encoded.block, encoded.tails))
    assert batch is not None
    assert [list(c.features) for c in batch.columns] == [["a"]]


def test_neighbours_of_one_type_travel_as_one_matrix() -> None:
    features = (Feature(name="a"), Feature(name="b"), Feature(name="n", dtype="int64"), Feature(name="c"))
    codec, encoded = encode_rows(FeatureView(name="any", entity=Entity(type="i"), features=features), [[1.0, 2.0, 3, 4.0]])
    batch = decode(FeatureView(name="any", entity=Entity(type="i"), features=features), codec, ["x"], codec.pack(encoded.block))
    assert batch is not None
    assert [list(c.features) for c in batch.columns] == [["a", "b"], ["n"], ["c"]]


@pytest.mark.parametrize("cut", [1, 8])
def test_rows_of_another_schema_are_not_guessed_at(cut: int) -> None:
    view = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="a"),))
    codec, encoded = encode_rows(view, [[1.0], [2.0]])
    one, other = codec.pack(encoded.block)
    assert decode(view, codec, ["x", "y"], [one, other[:-cut]]) is None


def test_ids_of_every_kind() -> None:
    for ids in (["a", ""], [1, -5], [("a", 1), ("b", 2)], []):
        message = types_pb2.EntityIds()
        put_ids(message, ids)  # type: ignore[arg-type]
        assert [*message.string_ids, *message.int64_ids, *composites(message)] == ids
