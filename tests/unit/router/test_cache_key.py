"""Two questions have one key only where one answer is right for both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.questions import ask, strings
from tests.fakes.router_world import SIGNATURE, route, snapshot

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.records import Epochs, Feature, ModelVersion, Snapshot
from router.cache_key import Keys

ids = st.lists(st.sampled_from(["a", "b", "ab", "i1", "\x01"]), min_size=1, max_size=4, unique=True)
hours = st.lists(st.binary(min_size=8, max_size=8), max_size=1)


def request(subject: str, candidates: list[str], top_k: int, hour: list[bytes]) -> pb.RankRequest:
    features = [types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_INT64, data=data) for data in hour]
    return pb.RankRequest(route="home", subject=strings(subject), candidates=strings(*candidates), top_k=top_k, request_features=features)


asked = st.tuples(st.sampled_from(["a", "ab"]), ids, st.integers(0, 2), hours, st.sampled_from(["shop", "other"]))


@given(asked, asked)
def test_keys_are_equal_exactly_where_the_questions_are(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    registry, keys = snapshot(), Keys()
    keys.adopt(registry)
    found = [keys.of(ask(registry, request(*parts), tenant=tenant)) for *parts, tenant in (one, other)]
    assert (found[0] == found[1]) == (one == other)


def _changed(registry: Snapshot) -> list[Snapshot]:
    view, feature_set, model = registry.feature_views["item-view"], registry.feature_sets["ranker"], registry.models["ranker"]
    item = feature_set.inputs[1]
    swapped = replace(item, features=(item.features[1], item.features[0], *item.features[2:]))
    at = ("shop", "item-view", 1)
    return [
        replace(registry, models={"ranker": replace(model, aliases={"champion": "1"})}),
        replace(registry, epochs={at: Epochs(serving=3, newest=3)}),
        replace(registry, feature_views={**registry.feature_views, "item-view": replace(view, max_age_s=9)}),
        replace(registry, feature_views={**registry.feature_views, "item-view": replace(view, features=(
            Feature(name="f0", default=7.0), *view.features[1:],
        ))}),
        replace(registry, feature_sets={"ranker": replace(feature_set, inputs=(feature_set.inputs[0], swapped))}),
        snapshot(route(on_missing="fail")),
        snapshot(route(variants=(replace(route().variants[0], name="renamed"),))),
        replace(registry, models={"ranker": replace(
            model, versions=(*model.versions, ModelVersion(version="9", artifact="/m/9", digest="sha256:9", signature=SIGNATURE)),
            aliases={"champion": "9"},
        )}),
    ]  # fmt: skip


def test_whatever_the_registry_changes_about_an_answer_is_another_key() -> None:
    """A shared cache once served one model's answer for another's (MLServer 1.7.1 keys by the request alone)."""
    registry, keys, seen = snapshot(), Keys(), []
    question = request("u1", ["i1"], 0, [])
    for world in (registry, *_changed(registry)):
        keys.adopt(world)
        seen.append(keys.of(ask(world, question)))
    assert len(set(seen)) == len(seen)


def test_epochs_of_another_tenant_are_not_looked_at() -> None:
    registry, keys, seen = snapshot(), Keys(), set()
    for world in (registry, replace(registry, epochs={("other", "item-view", 1): Epochs(serving=3, newest=3)})):
        keys.adopt(world)
        seen.add(keys.of(ask(world, request("u1", ["i1"], 0, []))))
    assert len(seen) == 1


def test_predict_and_rank_are_apart() -> None:
    registry, keys = snapshot(), Keys()
    keys.adopt(registry)
    rows = [types_pb2.EntityRows(entity_type=kind, ids=strings(id_)) for kind, id_ in (("user", "u1"), ("item", "i1"))]
    predict = keys.of(ask(registry, pb.PredictRequest(route="home", entities=rows)))
    narrow = keys.of(ask(registry, pb.PredictRequest(route="home", entities=rows, outputs=["score"])))
    assert len({predict, narrow, keys.of(ask(registry, request("u1", ["i1"], 0, [])))}) == 3
