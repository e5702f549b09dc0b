"""How features are asked for, and what their failures mean to a caller of the router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.router_world import INPUTS, route, snapshot

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PlaitError,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Violation,
)
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.feature_client import FeatureClient, Unreachable
from router.route_table import compile_table
from router.settings import FeaturesSettings

HOME = compile_table(snapshot(route(on_missing="stale_ok", max_defaulted_share=0.25))).find("home", "shop")
IDS = [("user", types_pb2.EntityIds(string_ids=["u1"])), ("item", types_pb2.EntityIds(string_ids=["i2", "i1"]))]


@asynccontextmanager
async def client(*addresses: str) -> AsyncIterator[FeatureClient]:
    settings = FeaturesSettings(addresses=",".join(addresses))
    made = FeatureClient(settings, ChannelSettings(service_token="the-token"))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        await made.close()


async def get(
    features: FeatureClient, entities: Sequence[tuple[str, types_pb2.EntityIds]] = IDS, inputs: Sequence[str] = ()
) -> pb.GetFeaturesResponse:
    return await features.get(
        HOME, HOME.weighted[0].feature_set, entities, inputs, deadline=Deadline.after(20), tenant="shop", request_id="r"
    )


async def test_what_is_asked_is_what_the_route_says() -> None:
    async with FakeFeatureRetrieval(INPUTS) as behind, client(behind.address) as features:
        answer = await get(features)
        assert [t.name for t in answer.tensors] == ["user", "item"]
        await get(features, IDS[1:], ["item"])
        whole, part = behind.requests
        assert (whole.feature_set, whole.policy, whole.max_defaulted_share) == ("ranker", types_pb2.MISSING_POLICY_STALE_OK, 0.25)
        assert [(e.entity_type, list(e.ids.string_ids)) for e in whole.entities] == [("user", ["u1"]), ("item", ["i2", "i1"])]
        assert (list(whole.inputs), list(part.inputs)) == ([], ["item"])
        assert [e.entity_type for e in part.entities] == ["item"]
        assert behind.calls[0].tenant == "shop"
        assert behind.address in repr(features)


async def test_what_the_caller_sent_along_is_passed_on_and_its_faults_come_back_whole() -> None:
    along = types_pb2.Tensor(name="hour", dtype=types_pb2.DATA_TYPE_FLOAT32, data=b"\0\0\0\0")
    wrong = [Violation("request_features[0]", "'hour' holds a value above the maximum 23")]
    async with FakeFeatureRetrieval(INPUTS) as behind, client(behind.address) as features:
        behind.error = InvalidArgument("they do not fit", reason="REQUEST_FEATURE_INVALID", violations=wrong)
        with pytest.raises(InvalidArgument, match=r"^they do not fit") as caught:
            await features.get(
                HOME,
                HOME.weighted[0].feature_set,
                IDS,
                (),
                request_features=[along],
                deadline=Deadline.after(20),
                tenant="shop",
                request_id="r",
            )
        assert (caught.value.reason, list(caught.value.violations)) == ("REQUEST_FEATURE_INVALID", wrong)
        assert list(behind.requests[0].request_features) == [along]


@pytest.mark.parametrize(
    ("raised", "expected", "reason", "retry"),
    [
        (Unauthenticated("who?"), Unreachable, "FEATURES_UNAVAILABLE", True),
        (Cancelled("going down"), Unreachable, "FEATURES_UNAVAILABLE", True),
        (NotFound("no set", reason="FEATURE_SET_NOT_FOUND"), Unavailable, "FEATURES_UNAVAILABLE", True),
        (Unavailable("redis", reason="STORE_UNAVAILABLE", retry_after_s=0.1), Unavailable, "STORE_UNAVAILABLE", True),
        (FailedPrecondition("missing", reason="FEATURES_MISSING"), FailedPrecondition, "FEATURES_MISSING", False),
        (FailedPrecondition("broken", reason="FEATURE_SET_BROKEN"), FailedPrecondition, "FEATURE_SET_BROKEN", False),
        (InvalidArgument("an id", reason="ID_INVALID"), InvalidArgument, "ID_INVALID", False),
        (ResourceExhausted("full", reason="OVERLOADED", retry_after_s=0.1), ResourceExhausted, "OVERLOADED", True),
        (DeadlineExceeded("late"), DeadlineExceeded, "DEADLINE_EXCEEDED", False),
    ],
)
async def test_failures_in_the_callers_terms(raised: PlaitError, expected: type[PlaitError], reason: str, retry: bool) -> None:
    async with FakeFeatureRetrieval(INPUTS) as behind, client(behind.address) as features:
        behind.error = raised
        with pytest.raises(expected) as caught:
            await get(features)
        assert type(caught.value) is expected
        assert caught.value.reason == reason
        assert (caught.value.retry_after_s is not None) is retry
        behind.error = None
        await get(features)


async def test_a_replica_that_lags_is_passed_over_where_there_is_another() -> None:
    async with FakeFeatureRetrieval(INPUTS) as lagging, FakeFeatureRetrieval(INPUTS) as good:
        lagging.error = NotFound("no set", reason="FEATURE_SET_NOT_FOUND")
        async with client(lagging.address, good.address) as features:
            for _ in range(12):
                await get(features)
            assert len(good.calls) == 12


async def test_nobody_there_is_unreachable() -> None:
    async with FakeFeatureRetrieval(INPUTS) as gone:
        address = gone.address
    async with client(address) as features:
        with pytest.raises(Unreachable) as caught:
            await get(features)
    assert (caught.value.reason, caught.value.retry_after_s) == ("FEATURES_UNAVAILABLE", 0.25)
    assert address not in caught.value.message
