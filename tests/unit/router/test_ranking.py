"""The page itself, without a server in front: one world per request, what is asked for, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from structlog.testing import capture_logs
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import DI, DU, INPUTS, route, router_world, snapshot

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, NotFound, PlaitError, ResourceExhausted
from plait.registry.records import Entity, KeyPart, Variant
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline
from router.ranking import Ranking


class World:
    def __init__(self, ranking: Ranking, features: FakeFeatureRetrieval, worker: FakeModelWorker) -> None:
        self.ranking = ranking
        self.features = features
        self.worker = worker

    @property
    def idle(self) -> bool:
        return "in_flight=0/" in repr(self.ranking)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        yield World(router.ranking, features, worker)


def strings(*values: str) -> types_pb2.EntityIds:
    return types_pb2.EntityIds(string_ids=values)


def rank(name: str = "home", **fields: Any) -> pb.RankRequest:
    return pb.RankRequest(**{"route": name, "subject": strings("u1"), "candidates": strings("i1", "i3", "i2"), **fields})


def tensor(name: str, rows: int, columns: int) -> types_pb2.Tensor:
    return types_pb2.Tensor(name=name, dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[rows, columns], data=bytes(4 * rows * columns))


async def ask(ranking: Ranking, request: Any, *, timeout_s: float = 20.0, tenant: str = "shop", request_id: str = "") -> Any:
    """Ask as the server's interceptor would."""
    enter(Call(method="test", tenant=tenant, request_id=request_id, deadline=Deadline.after(timeout_s)))
    return await (ranking.rank(request) if isinstance(request, pb.RankRequest) else ranking.predict(request))


async def test_a_request_sees_one_world_although_another_comes_meanwhile(world: World) -> None:
    world.worker.gate = asyncio.Event()
    asked = asyncio.create_task(ask(world.ranking, rank()))
    await asyncio.wait_for(world.worker.started.wait(), 20)
    world.ranking.adopt(snapshot(route(variants=(Variant(name="new", model="ranker", use="1"),)), revision=8))
    world.worker.gate.set()
    answer = await asked
    assert (answer.registry_revision, answer.variant, answer.model_version) == (7, "main", "2")
    answer = await ask(world.ranking, rank())
    assert (answer.registry_revision, answer.variant, answer.model_version) == (8, "new", "1")


async def test_adopting_a_snapshot_says_which_variants_cannot_serve(world: World) -> None:
    broken = Variant(name="bad", model="ranker", use="broken")
    with capture_logs() as logs:
        world.ranking.adopt(snapshot(route("half", variants=(broken, Variant(name="good", model="ranker", use="1")))))
    [line] = logs
    assert (line["route"], line["variant"], line["reason"]) == ("half", "bad", "SIGNATURE_MISMATCH")
    assert "routes=1 faulty=0" in repr(world.ranking)
    world.ranking.adopt(replace(snapshot(), routes={}))
    with pytest.raises(NotFound):
        await ask(world.ranking, rank())


@pytest.mark.parametrize(
    ("asked", "called", "expected"),
    [("mine", "theirs", "mine"), ("", "theirs", "theirs")],
)
async def test_the_request_id_is_the_callers_or_the_calls(world: World, asked: str, called: str, expected: str) -> None:
    answer = await ask(world.ranking, rank(request_id=asked), request_id=called)
    assert answer.request_id == expected
    assert world.worker.requests[0].id == expected
    assert world.features.calls[0].request_id == expected


async def test_an_error_gives_the_place_back(world: World) -> None:
    for request, error in ((rank("nowhere"), NotFound), (rank(candidates=None), PlaitError), (pb.PredictRequest(route="x"), NotFound)):
        with pytest.raises(error):
            await ask(world.ranking, request)
        assert world.idle
    world.worker.error = FailedPrecondition("did not load", reason="MODEL_FAILED")
    with pytest.raises(FailedPrecondition):
        await ask(world.ranking, rank())
    assert world.idle


async def test_a_budget_that_is_spent_reaches_nobody(world: World) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await ask(world.ranking, rank(), timeout_s=0)
    assert caught.value.reason == "BUDGET_TOO_SMALL"
    assert not world.features.calls
    assert world.idle


async def test_features_get_their_share_of_the_budget_and_the_model_all_that_is_left(world: World) -> None:
    await ask(world.ranking, rank(), timeout_s=5.0)
    [features], [worker] = world.features.calls, world.worker.calls
    assert features.deadline.remaining_s() <= 4.0 < worker.deadline.remaining_s() <= 5.0


async def test_only_inputs_that_are_not_inline_are_read(world: World) -> None:
    user, item = tensor("user", 1, DU), tensor("item", 3, DI)
    await ask(world.ranking, rank(inline_features=[user]))
    assert (list(world.features.requests[-1].inputs), [e.entity_type for e in world.features.requests[-1].entities]) == (["item"], ["item"])
    await ask(world.ranking, rank(inline_features=[user, item]))
    assert len(world.features.requests) == 1
    assert list(world.worker.requests[-1].raw_input_contents) == [user.data, item.data]


async def test_what_is_sent_along_reaches_the_features(world: World) -> None:
    hour = types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_FLOAT32, data=b"\0\0\0\0")
    await ask(world.ranking, rank(request_features=[hour]))
    entities = [{"entity_type": "user", "ids": strings("u1")}, {"entity_type": "item", "ids": strings("i1")}]
    await ask(world.ranking, pb.PredictRequest(route="home", entities=entities, request_features=[hour]))
    assert [list(request.request_features) for request in world.features.requests] == [[hour], [hour]]


async def test_inputs_that_would_not_fit_into_a_message_are_refused_before_they_are_read(world: World) -> None:
    wide = 1000
    world.ranking.adopt(snapshot(columns=wide))
    many = strings(*(f"i{n}" for n in range(5000)))
    for request in (
        rank(candidates=many),
        pb.PredictRequest(
            route="home",
            entities=[
                types_pb2.EntityRows(entity_type="user", ids=strings("u")),
                types_pb2.EntityRows(entity_type="item", ids=many),
            ],
        ),
    ):
        with pytest.raises(ResourceExhausted, match=f"{5000 * wide * 4 + DU * 4} bytes") as caught:
            await ask(world.ranking, request)
        assert (caught.value.reason, caught.value.retry_after_s) == ("MESSAGE_TOO_LARGE", None)
    assert not world.features.calls


async def test_a_predict_without_one_subject_is_split_by_its_request_id(world: World) -> None:
    two = (Variant(name="a", model="ranker", use="1"), Variant(name="b", model="ranker", use="2"))
    world.ranking.adopt(snapshot(route(variants=two)))
    inline = [tensor("user", 1, DU), tensor("item", 2, DI)]

    async def variant(request_id: str) -> str:
        answer = await ask(world.ranking, pb.PredictRequest(route="home", inline_features=inline, request_id=request_id))
        return str(answer.variant)

    once = [await variant(f"r{n}") for n in range(20)]
    assert set(once) == {"a", "b"}
    assert once == [await variant(f"r{n}") for n in range(20)]


async def test_a_predict_about_one_subject_gets_the_variant_its_rank_gets(world: World) -> None:
    two = (Variant(name="a", model="ranker", use="1"), Variant(name="b", model="ranker", use="2"))
    world.ranking.adopt(snapshot(route(variants=two)))
    for n in range(12):
        subject = strings(f"u{n}")
        entities = [types_pb2.EntityRows(entity_type="user", ids=subject), types_pb2.EntityRows(entity_type="item", ids=strings("i1"))]
        predicted = await ask(world.ranking, pb.PredictRequest(route="home", entities=entities))
        ranked = await ask(world.ranking, rank(subject=subject))
        assert predicted.variant == ranked.variant


async def test_predict_says_what_was_degraded_too(world: World) -> None:
    world.features.statuses = {types_pb2.ROW_STATUS_STALE: 1}
    entities = [types_pb2.EntityRows(entity_type=name, ids=strings("x1")) for name in ("user", "item")]
    answer = await ask(world.ranking, pb.PredictRequest(route="home", entities=entities, explain=True))
    assert list(answer.degraded_reasons) == ["features_stale"]
    assert [r.stale for r in answer.feature_report] == [1, 1]
    await world.features.server.drain()
    answer = await ask(world.ranking, pb.PredictRequest(route="home", entities=entities))
    assert list(answer.degraded_reasons) == ["features_unavailable"]


async def test_scores_that_are_no_numbers_are_told(world: World) -> None:
    for bad in (np.nan, np.inf):
        world.worker.score = lambda user, item, bad=bad: np.full(len(item), bad)  # type: ignore[misc]
        answer = await ask(world.ranking, rank())
        assert list(answer.degraded_reasons) == ["scores_not_finite"]
        assert list(answer.item_ids.string_ids) == ["i1", "i3", "i2"]


async def test_repr_says_load_and_state_in_one_line(world: World) -> None:
    text = repr(world.ranking)
    assert "\n" not in text
    assert text.startswith("<Ranking <RouteTable revision=7 routes=1 faulty=0> <Gate <Admission in_flight=0/64 waiting=0/1024>>")
    assert "<Consulting <FeatureClient " in text


async def test_composite_candidates_are_ranked_and_come_back_as_they_were_sent(world: World) -> None:
    registry = snapshot()
    sku = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="number", type="int64")))
    view = replace(registry.feature_views["item-view"], entity=sku)
    world.ranking.adopt(replace(registry, feature_views={**registry.feature_views, "item-view": view}))
    request = rank(candidates=None)
    for shop, number in (("a", 2), ("", 9), ("a|b", 5)):
        request.candidates.composite_ids.add(parts=[{"string_part": shop}, {"int64_part": number}])
    answer = await ask(world.ranking, request)
    assert not answer.item_ids.string_ids
    found = [(key.parts[0].string_part, key.parts[1].int64_part) for key in answer.item_ids.composite_ids]
    assert found == [("", 9), ("a|b", 5), ("a", 2)]
    assert list(answer.scores) == sorted(answer.scores, reverse=True)
