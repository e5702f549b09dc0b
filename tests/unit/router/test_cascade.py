"""Stages around the model, on real connections: what is dropped is never scored, and what cannot be known holds nothing back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import DI, INPUTS, SIGNATURE, route, router_world, snapshot
from tests.unit.router.test_ranking import World, ask, rank, strings, tensor

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, Unavailable
from plait.registry import crosschecks
from plait.registry.policies import Comparison, Diversity, Retrieve, Stages, Tier
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Signature,
    Snapshot,
    TensorSpec,
)
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline

NAN = float("nan")
LISTING = FeatureView(name="listing", entity=Entity(type="item"), features=tuple(Feature(name=n) for n in ("sold", "promoted", "seller")))
RULES = FeatureSet(
    name="rules", inputs=(ModelInput(name="rules", entity="item", features=tuple(f"listing:{f.name}" for f in LISTING.features)),)
)
SOLD_OUT = Comparison(name="sold-out", column="sold", at_least=1)
PROMOTED = Comparison(name="promoted", column="listing:promoted", equals=1, multiply=10)
ONE_PER_SELLER = Diversity(name="seller", column="seller", at_most=1, within=2)


class Listings(FakeFeatureRetrieval):
    """Also answers the rules' set: [sold, promoted, seller] of each id, unknown where it is not listed."""

    def __init__(self, rows: Mapping[str, tuple[float, float, float]]) -> None:
        super().__init__(INPUTS)
        self.rows = dict(rows)
        self.lost = 0
        self.rules_error: Exception | None = None

    async def fill(self, request: Any, response: Any) -> None:
        if request.feature_set == "user-only":
            request.inputs.append("user")
        if request.feature_set != "rules":
            await super().fill(request, response)
            return
        if self.rules_error is not None:
            raise self.rules_error
        [entity] = request.entities
        assert (list(request.inputs), request.policy) == (["rules"], types_pb2.MISSING_POLICY_DEFAULT)
        block = np.array([self.rows.get(i, (NAN, NAN, NAN)) for i in entity.ids.string_ids], "<f4")
        response.tensors.add(name="rules", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=block.shape, data=block.tobytes())
        counts = [0] * 8
        counts[types_pb2.ROW_STATUS_UNAVAILABLE] = self.lost
        response.views.add(feature_view="listing", entity_type="item", statuses=bytes(len(block)), status_counts=counts)


def registry(stages: Stages, **fields: Any) -> Snapshot:
    found = snapshot(route(stages=stages, **fields))
    return replace(found, feature_views={**found.feature_views, "listing": LISTING}, feature_sets={**found.feature_sets, "rules": RULES})


@asynccontextmanager
async def staged(rows: Mapping[str, tuple[float, float, float]], *, rules: str = "rules", **stages: Any) -> AsyncIterator[World]:
    async with (
        Listings(rows) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry(Stages(rules=rules, **stages))) as router,
    ):
        yield World(router.ranking, features, worker)


async def items(world: World, request: pb.RankRequest) -> list[str]:
    return list((await ask(world.ranking, request)).item_ids.string_ids)


async def test_what_a_filter_drops_is_neither_scored_nor_answered() -> None:
    async with staged({"i1": (0, 0, 1), "i2": (1, 0, 1), "i3": (2, 0, 1)}, filter=(SOLD_OUT,)) as world:
        answer = await ask(world.ranking, rank(candidates=strings("i3", "i1", "i2", "i4")))  # of i4 nothing is known
        assert list(answer.item_ids.string_ids) == ["i4", "i1"]
        assert list(answer.scores) == [4, 1]
        assert list(answer.degraded_reasons) == []
        [request] = world.worker.requests
        assert {i.name: list(i.shape) for i in request.inputs} == {"user": [1, 2], "item": [2, DI]}


async def test_where_all_are_dropped_no_model_is_asked() -> None:
    async with staged({"i1": (1, 0, 1)}, filter=(SOLD_OUT,)) as world:
        answer = await ask(world.ranking, rank(candidates=strings("i1")))
        assert (len(answer.item_ids.string_ids), answer.variant, answer.tier) == (0, "main", "full")
        assert world.worker.requests == []


async def test_boosts_and_caps_change_the_order_and_scores_say_why() -> None:
    rows = {"i1": (0, 1, 1), "i2": (0, 0, 7), "i3": (0, 0, 7), "i4": (0, NAN, 7)}
    async with staged(rows, boost=(PROMOTED,), diversity=(ONE_PER_SELLER,)) as world:
        answer = await ask(world.ranking, rank(candidates=strings("i1", "i2", "i3", "i4")))
        assert list(answer.item_ids.string_ids) == ["i1", "i4", "i3", "i2"]
        assert list(answer.scores) == [10, 4, 3, 2]
        assert await items(world, rank(candidates=strings("i2", "i3", "i4"), top_k=2)) == ["i4", "i3"]
        assert await items(world, rank(candidates=strings("i2", "i3", "i1"), top_k=2)) == ["i1", "i3"]


async def test_an_explain_tells_what_each_stage_made_of_the_candidates() -> None:
    rows = {"i1": (0, 1, 1), "i2": (1, 0, 7), "i3": (0, 0, 7), "i4": (0, NAN, 7)}
    async with staged(rows, filter=(SOLD_OUT,), boost=(PROMOTED,), diversity=(ONE_PER_SELLER,)) as world:
        enter(Call(method="test", tenant="shop", deadline=Deadline.after(20)))
        told = await world.ranking.explain(pb.ExplainRequest(rank=rank(candidates=strings("i1", "i2", "i3", "i4"))))
        assert [(s.stage, s.candidates_in, s.candidates_out, dict(s.by_rule)) for s in told.stages] == [
            ("filter", 4, 3, {"sold-out": 1}),
            ("rank", 3, 3, {}),
            ("rerank", 3, 3, {"promoted": 1, "seller": 0}),
        ]
        assert list(told.rank.item_ids.string_ids) == ["i1", "i4", "i3"]


async def test_inline_features_are_filtered_with_their_rows() -> None:
    async with staged({"i2": (1, 0, 1)}, filter=(SOLD_OUT,)) as world:
        inline = tensor("item", 3, DI)
        inline.data = np.arange(3 * DI, dtype="<f4").tobytes()
        answer = await ask(world.ranking, rank(candidates=strings("i1", "i2", "i3"), inline_features=[inline]))
        assert list(answer.item_ids.string_ids) == ["i3", "i1"]
        assert list(answer.scores) == [2 * DI, 0]


@pytest.mark.parametrize("fault", ["error", "lost"])
async def test_without_the_rules_columns_nothing_is_filtered_and_that_is_told(fault: str) -> None:
    async with staged({"i1": (1, 0, 1), "i2": (1, 0, 1)}, filter=(SOLD_OUT,)) as world:
        features: Any = world.features
        features.rules_error = Unavailable("redis is away", reason="STORE_UNAVAILABLE") if fault == "error" else None
        features.lost = 1
        answer = await ask(world.ranking, rank(candidates=strings("i1", "i2")))
        assert list(answer.item_ids.string_ids) == ["i2", "i1"]
        assert list(answer.degraded_reasons) == ["rules_unavailable"]


async def test_without_a_model_nothing_is_shown_that_is_sold_out_either() -> None:
    ladder = (Tier(tier="popularity", feature="item-view:f0"),)
    stages = Stages(rules="rules", filter=(SOLD_OUT,))
    async with (
        Listings({"i3": (1, 0, 1)}) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry(stages, ladder=ladder)) as router,
    ):
        world = World(router.ranking, features, worker)
        worker.error = Unavailable("away")
        answer = await ask(world.ranking, rank(candidates=strings("i1", "i3", "i2")))
        assert (answer.tier, list(answer.item_ids.string_ids)) == ("popularity", ["i2", "i1"])
        assert list((await ask(world.ranking, rank(candidates=strings("i3")))).item_ids.string_ids) == []
        features.rules_error = Unavailable("redis is away", reason="STORE_UNAVAILABLE")
        answer = await ask(world.ranking, rank(candidates=strings("i1", "i3", "i2")))
        assert list(answer.item_ids.string_ids) == ["i3", "i2", "i1"]
        assert list(answer.degraded_reasons) == ["rules_unavailable", "tier_popularity"]


async def test_a_predict_has_no_order_to_change() -> None:
    async with staged({"i1": (1, 0, 1)}, filter=(SOLD_OUT,)) as world:
        rows = [types_pb2.EntityRows(entity_type=e, ids=strings(i)) for e, i in (("user", "u1"), ("item", "i1"))]
        answer = await ask(world.ranking, pb.PredictRequest(route="home", entities=rows))
        assert [tensor.name for tensor in answer.outputs] == ["score"]


async def test_a_set_that_lost_its_column_leaves_the_route_out_and_no_other() -> None:
    async with staged({}, filter=(SOLD_OUT,)) as world:
        broken = replace(RULES, inputs=(replace(RULES.inputs[0], features=("listing:seller",)),))
        found = registry(Stages(rules="rules", filter=(SOLD_OUT,)))
        world.ranking.adopt(replace(found, feature_sets={**found.feature_sets, "rules": broken}))
        with pytest.raises(FailedPrecondition) as caught:
            await ask(world.ranking, rank())
        assert caught.value.reason == "RULES_MISFIT"


@pytest.mark.parametrize(
    ("stages", "field", "phrase"),
    [
        (Stages(rules="gone", filter=(SOLD_OUT,)), "spec.stages.rules", "no feature set 'gone'"),
        (Stages(rules="ranker", filter=(SOLD_OUT,)), "spec.stages.rules", "exactly one"),
        (Stages(rules="rules", filter=(replace(SOLD_OUT, column="solt"),)), "spec.stages.filter[0].column", "did you mean 'sold'?"),
        (Stages(rules="rules", diversity=(replace(ONE_PER_SELLER, column="x"),)), "spec.stages.diversity[0].column", "it has sold"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_stored(stages: Stages, field: str, phrase: str) -> None:
    found = {problem.field: problem.message for problem in crosschecks.check(registry(stages))}
    assert phrase in found[field]


def test_what_fits_is_fine() -> None:
    stages = Stages(rules="rules", filter=(SOLD_OUT,), boost=(PROMOTED,), diversity=(ONE_PER_SELLER,))
    assert not [problem for problem in crosschecks.check(registry(stages)) if "stages" in problem.field]
    assert "Route home" in crosschecks.users_of(registry(stages), ("FeatureSet", "rules"))


class Retrieving(FakeModelWorker):
    """Also answers ids, for the model called "two-tower", which looks at the user alone."""

    ids: Any = np.array([3, 1, -1, 2, 3], "<i8")

    async def fill(self, request: Any, response: Any) -> None:
        if request.model_name != "two-tower":
            await super().fill(request, response)
            return
        assert ([i.name for i in request.inputs], [o.name for o in request.outputs]) == (["user"], ["ids"])
        if isinstance(self.ids, bytes):
            response.outputs.add(name="ids", datatype="BYTES", shape=[1])
            response.raw_output_contents.append(self.ids)
        else:
            response.outputs.add(name="ids", datatype="INT64", shape=self.ids.shape)
            response.raw_output_contents.append(self.ids.tobytes())


def with_retriever(key: Literal["string", "int64"], **stages: Any) -> Snapshot:
    found = registry(Stages(retrieve=Retrieve(model="two-tower", use="1", limit=3), **stages))
    found = replace(found, feature_views={**found.feature_views, "item-view": snapshot(item_key=key).feature_views["item-view"]})
    towers = Signature(
        inputs=(SIGNATURE.inputs[0],), outputs=(TensorSpec(name="ids", dtype="int64", shape=(-1,), per="request"),), feature_set="user-only"
    )
    users = FeatureSet(name="user-only", inputs=(found.feature_sets["ranker"].inputs[0],))
    model = Model(name="two-tower", versions=(ModelVersion(version="1", artifact="/m/t", digest="sha256:t", signature=towers),))
    return replace(found, feature_sets={**found.feature_sets, "user-only": users}, models={**found.models, "two-tower": model})


@asynccontextmanager
async def retrieving(key: Literal["string", "int64"]) -> AsyncIterator[World]:
    async with (
        Listings({}) as features,
        Retrieving() as worker,
        router_world(features.address, worker.address, with_retriever(key)) as router,
    ):
        yield World(router.ranking, features, worker)


async def test_candidates_come_from_a_model_where_the_caller_gives_none() -> None:
    async with retrieving("int64") as world:
        answer = await ask(world.ranking, rank(candidates=None))
        assert list(answer.item_ids.int64_ids) == [3, 2, 1]  # each once, without the padding
        given = types_pb2.EntityIds(int64_ids=[7, 9])
        assert list((await ask(world.ranking, rank(candidates=given))).item_ids.int64_ids) == [9, 7]
        worker: Any = world.worker
        worker.ids = np.array([-1], "<i8")
        assert not (await ask(world.ranking, rank(candidates=None))).item_ids.int64_ids
        worker.ids = np.arange(50, dtype="<i8")
        assert len((await ask(world.ranking, rank(candidates=None))).item_ids.int64_ids) == 3


async def test_retrieved_ids_may_be_texts_and_have_to_be_ones_of_candidates() -> None:
    async with retrieving("string") as world:
        worker: Any = world.worker
        worker.ids = b"".join(len(text).to_bytes(4, "little") + text for text in (b"i4", b"", b"i8"))
        assert list((await ask(world.ranking, rank(candidates=None))).item_ids.string_ids) == ["i8", "i4"]
        for wrong in (b"\x09\0\0\0i4", np.array([1], "<i8")):
            worker.ids = wrong
            with pytest.raises(FailedPrecondition) as caught:
                await ask(world.ranking, rank(candidates=None))
            assert caught.value.reason == "SIGNATURE_MISMATCH"


@pytest.mark.parametrize(
    ("retrieve", "phrase"),
    [
        (Retrieve(model="gone", use="1"), "no model 'gone'"),
        (Retrieve(model="two-tower", use="9"), "neither a version nor an alias '9'"),
        (Retrieve(model="two-tower", use="1", output="scores"), "no output 'scores' of ids"),
        (Retrieve(model="ranker", use="1", output="score"), "no output 'score' of ids"),
    ],
)
def test_a_retriever_that_can_give_no_ids_is_refused(retrieve: Retrieve, phrase: str) -> None:
    found = with_retriever("int64")
    bad = replace(found, routes={"home": route(stages=Stages(retrieve=retrieve))})
    assert phrase in next(problem.message for problem in crosschecks.check(bad) if problem.field == "spec.stages.retrieve")
    assert not [problem for problem in crosschecks.check(found) if "stages" in problem.field]
    assert "Route home" in crosschecks.users_of(found, ("Model", "two-tower"))


async def test_without_candidates_there_is_nothing_to_be_popular() -> None:
    found = with_retriever("int64")
    ladder = (Tier(tier="popularity", feature="item-view:f0"),)
    laddered = replace(found.routes["home"], ladder=ladder)
    async with retrieving("int64") as world:
        world.ranking.adopt(replace(found, routes={"home": laddered}))
        await world.worker.server.drain()
        with pytest.raises(Unavailable) as caught:
            await ask(world.ranking, rank(candidates=None))
        assert caught.value.reason == "WORKER_UNAVAILABLE"
        answer = await ask(world.ranking, rank(candidates=types_pb2.EntityIds(int64_ids=[1, 2])))
        assert (answer.tier, list(answer.item_ids.int64_ids)) == ("popularity", [2, 1])
