"""The wire work that a well-behaved client does not show: who may stream, how far a producer runs ahead, what is left when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.servicer import FeatureRetrievalServicer
from feature_retrieval.servicing.writes import MAX_BATCHES, Window
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable, Violation, from_status
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, Snapshot
from plait.rpc import call
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait.telemetry.tracing import off

VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    features=(Feature(name="a", default=2, description="likes"), Feature(name="b", dtype="int64")),
    max_age_s=60,
)
SNAPSHOT = Snapshot(
    revision=5,
    feature_views={"stats": VIEW},
    feature_sets={
        "home": FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:b", "stats:a"), dtype="float64"),))
    },
)


class SlowWrites(Ingestion):
    """Writes wait until they are let through; `begun` and `tenants` say which came. `errors` are raised by batch."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.tenants: set[str] = set()
        self.errors: dict[str, Exception] = {}

    async def write(self, batch: Any, result: Any, call: Call) -> None:
        self.begun.append(batch.feature_view)
        self.tenants.add(call.tenant)
        try:
            await self.gate.wait()
        finally:
            self.ended.append(batch.feature_view)
        if batch.feature_view in self.errors:
            raise self.errors[batch.feature_view]
        result.applied = 1


def servicer_of(ingestion: Any = None) -> FeatureRetrievalServicer:
    plans = Plans(SNAPSHOT)
    unused: Any = None
    return FeatureRetrievalServicer(
        unused, ingestion, lambda: plans, explanation=unused, events=unused, max_in_flight=4, tracing=off(), upkeep=unused
    )


def enter(*, is_service: bool = False) -> None:
    call.enter(Call(method="test", tenant="shop", caller="key-1", is_service=is_service, deadline=Deadline.after(30)))


async def requests(count: int, taken: list[int]) -> AsyncIterator[Any]:
    for number in range(count):
        taken.append(number)
        yield pb.IngestFeaturesRequest(batch_id=number, batch=pb.FeatureBatch(feature_view=f"v{number}"))


async def settle() -> None:
    """Let everything run that can run."""
    for _ in range(200):
        await asyncio.sleep(0)


async def test_only_services_may_stream() -> None:
    enter()
    with pytest.raises(PermissionDenied, match="call GetFeatures") as caught:
        await servicer_of().StreamFeatures(requests(0, []), None)
    assert caught.value.reason == "SERVICE_TOKEN_MISSING"


async def test_a_fast_producer_is_held_back() -> None:
    enter()
    ingestion, taken = SlowWrites(), list[int]()
    acks = servicer_of(ingestion).IngestFeatures(requests(100, taken), None)
    first = asyncio.ensure_future(anext(acks))
    await settle()
    assert len(taken) == MAX_BATCHES + 1  # the last one waits at the door
    assert len(ingestion.begun) == MAX_BATCHES
    ingestion.gate.set()
    told = [await first, *[ack async for ack in acks]]
    assert [ack.batch_id for ack in told] == list(range(100))
    assert ingestion.tenants == {"shop"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 10), st.randoms())
def test_a_window_never_holds_more_than_it_may_and_lets_all_in(sizes: list[int], batches: int, size_bytes: int, random: Any) -> None:
    async def run() -> None:
        window, inside, entered = Window(batches, size_bytes), list[int](), list[int]()

        async def producer() -> None:
            for size in sizes:
                await window.enter(size)
                inside.append(size)
                entered.append(size)
                assert len(inside) <= batches
                assert len(inside) == 1 or sum(inside) <= size_bytes

        task = asyncio.create_task(producer())
        while not task.done() or inside:
            await settle()
            if inside:
                window.leave(inside.pop(random.randrange(len(inside))))
        await task
        assert entered == sizes
        assert repr(window) == f"<Window batches=0/{batches} bytes=0/{size_bytes}>"

    asyncio.run(run())


async def test_a_producer_that_leaves_ends_what_it_began() -> None:
    enter()
    ingestion = SlowWrites()
    acks: Any = servicer_of(ingestion).IngestFeatures(requests(100, []), None)
    first = asyncio.ensure_future(anext(acks))
    await settle()
    assert ingestion.begun
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await acks.aclose()
    await settle()
    assert sorted(ingestion.ended) == sorted(ingestion.begun)
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not [name for name in left if "batch" in name]


async def test_a_refused_batch_is_answered_with_all_that_is_wrong() -> None:
    enter()
    ingestion = SlowWrites()
    ingestion.gate.set()
    ingestion.errors = {
        "v0": InvalidArgument("does not fit", violations=[Violation("columns[0]", "unknown"), Violation("ids", "none")]),
        "v2": Unavailable("away", reason="STORE_UNAVAILABLE", retry_after_s=0.25),
        "v3": NotFound("no such view", reason="FEATURE_VIEW_NOT_FOUND"),
    }
    acks = [ack async for ack in servicer_of(ingestion).IngestFeatures(requests(5, []), None)]
    errors = {a.batch_id: from_status(a.status.code, a.status.message, a.status.status_details) for a in acks if a.HasField("status")}
    assert {number: (type(error), error.reason) for number, error in errors.items()} == {
        0: (InvalidArgument, "INVALID_ARGUMENT"),
        2: (Unavailable, "STORE_UNAVAILABLE"),
        3: (NotFound, "FEATURE_VIEW_NOT_FOUND"),
    }
    assert [v.field for v in errors[0].violations] == ["columns[0]", "ids"]
    assert errors[2].retry_after_s == 0.25
    assert [a.result.applied for a in acks] == [0, 1, 0, 0, 1]
    assert not any(a.HasField("result") for a in acks if a.HasField("status"))


async def test_a_message_that_cannot_be_read_ends_the_stream_with_its_error() -> None:
    enter()
    ingestion = SlowWrites()
    ingestion.gate.set()

    async def broken() -> AsyncIterator[Any]:
        yield pb.IngestFeaturesRequest(batch_id=1)
        raise ValueError("cut off")

    acks = servicer_of(ingestion).IngestFeatures(broken(), None)
    assert (await anext(acks)).batch_id == 1
    with pytest.raises(ValueError, match="cut off"):
        await anext(acks)


async def test_describe_tells_defaults_from_no_defaults() -> None:
    answer = await servicer_of().DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="home"), None)
    [item] = answer.inputs
    b, a = item.features
    assert (item.name, item.entity_type, item.dtype) == ("item", "item", 12)
    assert (a.feature, a.stored_dtype, a.default_value, a.max_age_s, a.description) == ("a", 11, 2.0, 60.0, "likes")
    assert (b.feature, b.stored_dtype) == ("b", 5)
    assert not b.HasField("default_value")
    assert answer.registry_revision == 5
