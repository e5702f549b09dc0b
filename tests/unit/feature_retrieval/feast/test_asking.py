"""Feast's questions in our terms: what is settled by names, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from feature_retrieval.feast.asking import Questions, asked_rows
from feature_retrieval.views import Plans
from plait.api.feast.serving import serving_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry.records import (
    Entity,
    FeastSource,
    Feature,
    FeatureSchema,
    FeatureSet,
    FeatureView,
    KeyPart,
    ModelInput,
    PastVersion,
    RequestFeature,
    Snapshot,
)

ITEM = Entity(type="item")
PAIR = Entity(type="pair", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64")))
NEW, OLD = (Feature(name="n", dtype="int64"), Feature(name="x")), (Feature(name="x"),)
STATS = FeatureView(
    name="stats",
    entity=ITEM,
    features=NEW,
    version=2,
    versions=(PastVersion(version=1, entity=ITEM, schemas=(FeatureSchema(id=1, features=OLD),)),),
)
VIEWS = (
    STATS,
    FeatureView(name="pairs", entity=PAIR, features=(Feature(name="p", dtype="timestamp"),)),
    FeatureView(
        name="drivers",
        entity=Entity(type="driver", key="int64"),
        features=(Feature(name="d"),),
        feast=FeastSource(project="p", view="v", join_keys=("driver_nr",)),
    ),
)
SETS = (
    FeatureSet(
        name="both",
        inputs=(ModelInput(name="a", entity="item", features=("stats:x",)), ModelInput(name="b", entity="pair", features=("pairs:p",))),
    ),
    FeatureSet(
        name="sent",
        inputs=(ModelInput(name="a", entity="item", features=("stats:x", "$request:hour")),),
        request=(RequestFeature(name="hour"),),
    ),
)
PLANS = Plans(Snapshot(feature_views={v.name: v for v in VIEWS}, feature_sets={s.name: s for s in SETS}))


def request(features: Any = (), service: str = "", **entities: list[Any]) -> pb.GetOnlineFeaturesRequest:
    made = pb.GetOnlineFeaturesRequest(feature_service=service) if service else pb.GetOnlineFeaturesRequest()
    if not service:
        made.features.val.extend(features)
    for name, values in entities.items():
        column = made.entities[name].val
        for value in values:
            kind = "string_val" if isinstance(value, str) else "double_val" if isinstance(value, float) else "int64_val"
            column.add(**{kind: value})
    return made


def ids_of(asked: pb.GetOnlineFeaturesRequest) -> dict[str, Any]:
    ours, rows = asked_rows(asked, Questions().get(asked, PLANS))
    found: dict[str, Any] = {}
    for entity in ours.entities:
        keys = [tuple(part.string_part or part.int64_part for part in key.parts) for key in entity.ids.composite_ids]
        found[entity.entity_type] = list(entity.ids.string_ids) or list(entity.ids.int64_ids) or keys
        assert len(found[entity.entity_type]) == rows
    return found


def test_columns_find_their_entity_by_name() -> None:
    both = request(["stats:x", "pairs:p"], item=["i", "j"], sku=[1, 2], shop=["a", "b"])
    assert ids_of(both) == {"item": ["i", "j"], "pair": [("a", 1), ("b", 2)]}
    assert ids_of(request(["stats:x", "drivers:d"], item_id=["i"], driver_nr=[7])) == {"item": ["i"], "driver": [7]}
    assert ids_of(request(["stats:x"], whatever=["i"])) == {"item": ["i"]}


def test_a_feature_set_is_a_feature_service() -> None:
    question = Questions().get(request(service="both"), PLANS)
    assert [one.name(full=True) for one in question.wanted] == ["stats__x", "pairs__p"]
    assert [(i.name, i.dtype) for i in question.plan.inputs] == [("item-float32", "float32"), ("pair-int64", "int64")]


def test_versions_can_be_pinned() -> None:
    question = Questions().get(request(["stats@1:x", "stats:n"]), PLANS)
    assert [one.view.version for one in question.wanted] == [1, 2]
    with pytest.raises(NotFound, match="stats@1:n"):
        Questions().get(request(["stats@1:n"]), PLANS)


def test_a_question_is_compiled_once_per_snapshot() -> None:
    questions = Questions()
    one = questions.get(request(["stats:x"]), PLANS)
    assert questions.get(request(["stats:x"]), PLANS) is one
    assert questions.get(request(["stats:x"]), Plans(PLANS.snapshot)) is not one


@pytest.mark.parametrize(
    ("asked", "error", "reason", "words"),
    [
        (request(service="bot"), NotFound, "FEATURE_SET_NOT_FOUND", "both"),
        (request(service="sent"), FailedPrecondition, "FEAST_UNSUPPORTED", "call GetFeatures"),
        (request([]), InvalidArgument, "INVALID_ARGUMENT", "1 to 1000"),
        (request(["x"]), InvalidArgument, "INVALID_ARGUMENT", "view:feature"),
        (request(["none:x"]), NotFound, "FEATURE_NOT_FOUND", "none:x"),
        (request(["stats:x"]), InvalidArgument, "INVALID_ARGUMENT", "one length"),
        (request(["stats:x"], item=[]), InvalidArgument, "INVALID_ARGUMENT", "not empty"),
        (request(["stats:x"], item=["a"], other=["a", "b"]), InvalidArgument, "INVALID_ARGUMENT", "one length"),
        (request(["stats:x"], a=["a"], b=["b"]), InvalidArgument, "INVALID_ARGUMENT", "'item' or 'item_id'"),
        (request(["pairs:p"], shop=["a"]), InvalidArgument, "INVALID_ARGUMENT", "'sku'"),
        (request(["stats:x"], item=[1]), InvalidArgument, "INVALID_ARGUMENT", "declared type, string"),
        (request(["stats:x"], item=[1.5]), InvalidArgument, "INVALID_ARGUMENT", "a string or an integer"),
    ],
)
def test_what_cannot_be_asked(asked: Any, error: type[Exception], reason: str, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        asked_rows(asked, Questions().get(asked, PLANS))
    assert caught.value.reason == reason  # type: ignore[attr-defined]


def test_no_id_is_in_a_message() -> None:
    asked = request(["stats:x"], item=["4711-secret"], shop=[4711])
    with pytest.raises(InvalidArgument) as caught:
        asked_rows(request(["pairs:p"], item=["4711-secret"], shop=["4711"]), Questions().get(request(["pairs:p"]), PLANS))
    assert "4711" not in str(caught.value)
    assert asked_rows(asked, Questions().get(asked, PLANS))[0].entities[0].ids == types_pb2.EntityIds(string_ids=["4711-secret"])
