"""The router on a real gRPC server, with features and workers that speak the real wire: answers, and every bad request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import DI, DU, EXPIRED_KEY, INPUTS, NARROW_KEY, OTHER_KEY, RouterWorld, route, router_world, snapshot

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import PlaitError, from_rpc_error
from plait.registry.records import Variant

ROUTES = (
    route(),
    route("private", tenants=("other",)),
    route("broken", variants=(Variant(name="main", model="ranker", use="broken"),)),
    route("half", variants=(Variant(name="bad", model="ranker", use="broken"), Variant(name="good", model="ranker", use="1"))),
    route("small", max_candidates=2),
    route("ab", variants=(Variant(name="a", model="ranker", use="1"), Variant(name="b", model="ranker", use="2"))),
    route("strict", on_missing="fail", max_defaulted_share=0.0),
)


class World:
    def __init__(self, router: RouterWorld, features: FakeFeatureRetrieval, worker: FakeModelWorker) -> None:
        self.router = router
        self.features = features
        self.worker = worker

    async def refused(self, request: Any, **how: Any) -> PlaitError:
        """Return the typed error of a request, and see that the router lives on."""
        call = self.router.rank if isinstance(request, pb.RankRequest) else self.router.predict
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, **how)
        await self.router.rank(rank())
        return from_rpc_error(caught.value)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, snapshot(*ROUTES)) as router,
    ):
        yield World(router, features, worker)


def ids(*values: str | int) -> types_pb2.EntityIds:
    strings = [v for v in values if isinstance(v, str)]
    return types_pb2.EntityIds(string_ids=strings, int64_ids=[v for v in values if isinstance(v, int)])


def rank(
    name: str = "home", candidates: tuple[str | int, ...] = ("i3", "i1", "i2"), user: str | int = "u1", **fields: Any
) -> pb.RankRequest:
    return pb.RankRequest(route=name, subject=ids(user), candidates=ids(*candidates), **fields)


def tensor(name: str, rows: int, columns: int, **changes: Any) -> types_pb2.Tensor:
    fields: dict[str, Any] = {"name": name, "dtype": types_pb2.DATA_TYPE_FLOAT32, "shape": [rows, columns]}
    fields["data"] = np.arange(rows * columns, dtype="<f4").tobytes()
    return types_pb2.Tensor(**{**fields, **changes})


def fields_of(error: PlaitError) -> set[str]:
    return {v.field for v in error.violations}


async def test_rank_orders_by_the_models_score_and_says_who_answered(world: World) -> None:
    answer = await world.router.rank(rank(request_id="r-1"))
    assert list(answer.item_ids.string_ids) == ["i3", "i2", "i1"]
    assert list(answer.scores) == [3.0, 2.0, 1.0]
    assert (answer.model, answer.model_version, answer.variant) == ("ranker", "2", "main")
    assert (answer.request_id, answer.tier, answer.registry_revision) == ("r-1", "full", 7)
    assert not answer.degraded_reasons
    assert not answer.HasField("timings")
    assert not answer.feature_report


async def test_what_is_asked_behind_is_what_the_route_says(world: World) -> None:
    await world.router.rank(rank("strict", request_id="r-9"), timeout_s=5.0)
    [asked], [call] = world.features.requests, world.features.calls
    assert asked.feature_set == "ranker"
    assert asked.policy == types_pb2.MISSING_POLICY_FAIL
    assert 0 < asked.max_defaulted_share < 1e-6  # none at all
    assert {e.entity_type: list(e.ids.string_ids) for e in asked.entities} == {"user": ["u1"], "item": ["i3", "i1", "i2"]}
    assert (call.tenant, call.request_id, call.is_service) == ("shop", "r-9", True)
    [infer], [worker_call] = world.worker.requests, world.worker.calls
    assert (infer.model_name, infer.model_version, infer.id) == ("ranker", "2", "r-9")
    assert [(i.name, i.datatype, list(i.shape)) for i in infer.inputs] == [("user", "FP32", [1, DU]), ("item", "FP32", [3, DI])]
    assert [o.name for o in infer.outputs] == ["score"]
    assert worker_call.tenant == "shop"
    assert call.deadline.at_s < worker_call.deadline.at_s + 0.5  # each hop sees what is left
    assert worker_call.deadline.remaining_s() < 5.1  # gRPC rounds a timeout up on the wire


async def test_the_routes_timeout_caps_the_callers(world: World) -> None:
    world.router.ranking.adopt(snapshot(route(timeout_s=0.5)))
    await world.router.rank(rank(), timeout_s=60.0)
    assert world.worker.calls[0].deadline.remaining_s() < 0.5


async def test_top_k_explain_and_a_generated_request_id(world: World) -> None:
    many = tuple(f"i{n}" for n in range(500))
    answer = await world.router.rank(rank(candidates=many, top_k=3, explain=True))
    assert list(answer.item_ids.string_ids) == ["i499", "i498", "i497"]
    assert len(answer.request_id) == 32
    timings = answer.timings
    assert (timings.store_us, timings.queue_us, timings.compute_us) == (321, 11, 22)
    assert timings.total_us >= timings.features_us + timings.predict_us + timings.resolve_us
    assert [(r.feature_view, r.rows, r.present) for r in answer.feature_report] == [("user-view", 1, 1), ("item-view", 500, 500)]


async def test_equal_scores_keep_the_callers_order_and_nan_comes_last(world: World) -> None:
    world.worker.score = lambda user, item: np.where(item[:, 0] == 1, np.nan, 5.0)
    answer = await world.router.rank(rank(candidates=("i1", "i9", "i3", "i7")))
    assert list(answer.item_ids.string_ids) == ["i9", "i3", "i7", "i1"]
    assert np.isnan(answer.scores[3])
    assert list(answer.degraded_reasons) == ["scores_not_finite"]


async def test_degraded_reasons_say_what_the_features_were(world: World) -> None:
    world.features.statuses = {3: 1, 5: 1}
    answer = await world.router.rank(rank(explain=True))
    assert list(answer.degraded_reasons) == ["features_defaulted", "features_stale"]
    assert (answer.feature_report[1].defaulted, answer.feature_report[1].stale, answer.feature_report[1].present) == (1, 1, 1)
    world.features.statuses = {6: 1, 7: 1, 4: 1}
    answer = await world.router.rank(rank())
    assert list(answer.degraded_reasons) == ["features_defaulted", "features_timed_out", "features_unavailable"]
    metrics = world.router.metrics.registry
    assert metrics.get_sample_value("plait_router_degraded_total", {"route": "home", "reason": "features_stale"}) == 1


async def test_a_subject_stays_on_its_variant(world: World) -> None:
    variants = [{(await world.router.rank(rank("ab", user=f"u{n}"))).variant for _ in range(3)} for n in range(12)]
    assert all(len(seen) == 1 for seen in variants)
    assert {name for seen in variants for name in seen} == {"a", "b"}


async def test_int64_ids_come_back_as_int64() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, snapshot(item_key="int64")) as router,
    ):
        answer = await router.rank(rank(candidates=(5, -7, 9)))
        assert list(answer.item_ids.int64_ids) == [9, 5, -7]


async def test_inline_features_replace_an_input_and_are_not_read(world: World) -> None:
    given = tensor("item", 3, DI)
    answer = await world.router.rank(rank(inline_features=[given]))
    assert list(answer.scores) == [6.0, 3.0, 0.0]
    [asked] = world.features.requests
    assert (list(asked.inputs), [e.entity_type for e in asked.entities]) == (["user"], ["user"])
    assert world.worker.requests[0].raw_input_contents[1] == given.data
    await world.router.rank(rank(inline_features=[given, tensor("user", 1, DU)]))
    assert len(world.features.requests) == 1  # nothing left to read


async def test_predict_answers_named_tensors(world: World) -> None:
    rows = [types_pb2.EntityRows(entity_type="user", ids=ids("u1")), types_pb2.EntityRows(entity_type="item", ids=ids("i4", "i4", "i2"))]
    answer = await world.router.predict(pb.PredictRequest(route="home", entities=rows, outputs=["score"], explain=True))
    [output] = answer.outputs
    assert (output.name, output.dtype, list(output.shape)) == ("score", types_pb2.DATA_TYPE_FLOAT32, [3])
    assert np.frombuffer(output.data, "<f4").tolist() == [4.0, 4.0, 2.0]
    assert (answer.model_version, answer.variant, answer.registry_revision) == ("2", "main", 7)
    assert answer.timings.total_us > 0
    inline = [tensor("user", 1, DU), tensor("item", 2, DI)]
    answer = await world.router.predict(pb.PredictRequest(route="home", inline_features=inline))
    assert np.frombuffer(answer.outputs[0].data, "<f4").tolist() == [0.0, 3.0]


async def test_missing_wrong_expired_and_narrow_keys(world: World) -> None:
    for key, reason in ((None, "API_KEY_MISSING"), ("plait_wrong", "API_KEY_INVALID"), (EXPIRED_KEY, "API_KEY_EXPIRED")):
        error = await world.refused(rank(), key=key)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    error = await world.refused(rank(), key=NARROW_KEY)
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")


async def test_unknown_and_closed_routes(world: World) -> None:
    error = await world.refused(rank("nowhere"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "ROUTE_NOT_FOUND")
    assert "plait get" in error.message
    assert "private" not in error.message
    error = await world.refused(rank("private"))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROUTE_NOT_OPEN")
    assert "other" not in error.message
    assert (await world.router.rank(rank("private"), key=OTHER_KEY)).variant == "main"


async def test_a_model_that_does_not_fit_hurts_its_own_route_only(world: World) -> None:
    error = await world.refused(rank("broken"))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SIGNATURE_MISMATCH")
    assert "columns" in error.message
    assert {(await world.router.rank(rank("half", user=f"u{n}"))).variant for n in range(8)} == {"good"}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (rank(candidates=()), "candidates"),
        (rank(candidates=tuple(f"i{n}" for n in range(10_001))), "candidates"),
        (rank("small"), "candidates"),
        (rank(candidates=("i1", "i2", "i1")), "candidates[2]"),
        (rank(candidates=("i1", "")), "candidates.string_ids[1]"),
        (rank(candidates=("i1", "x" * 257)), "candidates.string_ids[1]"),
        (rank(candidates=(1, 2)), "candidates"),
        (rank(candidates=("1", 1)), "candidates"),
        (rank(user=1), "subject"),
        (rank(user=""), "subject.string_ids[0]"),
        (pb.RankRequest(route="home", candidates=ids("i1")), "subject"),
        (pb.RankRequest(route="home", candidates=ids("i1"), subject=ids("a", "b")), "subject"),
        (rank(top_k=-1), "top_k"),
        (rank(request_id="é" * 65), "request_id"),
        (rank("r" * 64), "route"),
        (rank(inline_features=[tensor("item", 3, DI, dtype=types_pb2.DATA_TYPE_FLOAT64)]), "inline_features[0].dtype"),
        (rank(inline_features=[tensor("item", 3, DI, dtype=99)]), "inline_features[0].dtype"),
        (rank(inline_features=[tensor("item", 2, DI)]), "inline_features[0].shape"),
        (rank(inline_features=[tensor("item", 3, DI, shape=[-3, -DI])]), "inline_features[0].shape"),
        (rank(inline_features=[tensor("item", 3, DI, shape=[])]), "inline_features[0].shape"),
        (rank(inline_features=[tensor("item", 3, DI, data=b"abc")]), "inline_features[0].data"),
        (rank(inline_features=[tensor("nope", 3, DI)]), "inline_features[0].name"),
        (rank(inline_features=[tensor("user", 1, DU), tensor("user", 1, DU)]), "inline_features[1].name"),
    ],
)
async def test_each_bad_rank_is_told_by_field(world: World, request_: pb.RankRequest, field: str) -> None:
    error = await world.refused(request_)
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in fields_of(error), str(error)


async def test_all_violations_are_told_at_once_but_not_without_end(world: World) -> None:
    error = await world.refused(pb.RankRequest(top_k=-1))
    assert fields_of(error) == {"route", "subject", "top_k"}  # (a route may retrieve candidates)
    error = await world.refused(rank(candidates=(1, 1), user=1, top_k=-1, inline_features=[tensor("x", 1, 1)]))
    assert fields_of(error) == {"candidates[1]", "top_k", "subject", "candidates", "inline_features[0].name"}
    error = await world.refused(rank(candidates=("",) * 5000))
    assert len(error.violations) == 21
    assert error.violations[-1].description.startswith("and ")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.PredictRequest(route="home"), "entities"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="user", ids=ids("u1"))]), "entities"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="seller", ids=ids("s"))]), "entities[0].entity_type"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="user", ids=ids("u"))] * 2), "entities[1].entity_type"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="user", ids=ids(1))]), "entities[0].ids"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="user")]), "entities[0].ids"),
        (pb.PredictRequest(route="home", entities=[types_pb2.EntityRows(entity_type="user", ids=ids("a", "b"))]), "entities"),
        (pb.PredictRequest(route="home", outputs=["nope"]), "outputs[0]"),
        (pb.PredictRequest(route="home", outputs=["score", "score"]), "outputs"),
        (pb.PredictRequest(route="home", inline_features=[tensor("user", 2, DU)]), "inline_features[0].shape"),
    ],
)
async def test_each_bad_predict_is_told_by_field(world: World, request_: pb.PredictRequest, field: str) -> None:
    error = await world.refused(request_)
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in fields_of(error), str(error)


async def test_an_expired_deadline_is_refused_before_any_work(world: World) -> None:
    error = await world.refused(rank(), timeout_s=0.000_01)
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_messages_that_are_too_large_are_refused() -> None:
    registry = snapshot(columns=1000)
    async with (
        FakeFeatureRetrieval({"user": ("user", DU), "item": ("item", 1000)}) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry, max_message_bytes=1 << 20) as router,
    ):
        w = World(router, features, worker)
        error = await w.refused(rank(candidates=tuple(f"i{n}" for n in range(500))))  # 2 MB of features
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert error.retry_after_s is None
        error = await w.refused(rank(candidates=tuple(f"{n:0250d}" for n in range(8000))))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
