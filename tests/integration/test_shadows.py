"""Shadow traffic hurts nobody: whatever becomes of it, callers' answers are those without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.otlp_collector import OtlpCollector
from tests.fakes.registry_world import eventually
from tests.fakes.router_world import INPUTS, RouterWorld, route, router_world, snapshot
from tests.integration.test_router import ids

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import FailedPrecondition
from plait.registry.policies import Shadow
from plait.registry.records import Snapshot, Variant
from plait.settings import TelemetrySettings
from router.settings import AdmissionSettings

VARIANTS = (
    Variant(name="main", model="ranker", use="champion"),
    Variant(name="next", model="ranker", use="1", weight=0),
)


def rank(n: int = 0, **fields: Any) -> pb.RankRequest:
    items = ids(*(f"i{m}" for m in range(20)))
    return pb.RankRequest(**{"route": "home", "subject": ids("u1"), "candidates": items, "request_id": f"r{n}", **fields})


def shadowed(**fields: Any) -> Snapshot:
    return snapshot(route(variants=VARIANTS, shadow=(Shadow(**{"variant": "next", **fields}),)))


def counted(router: RouterWorld, outcome: str) -> float:
    labels = {"route": "home", "variant": "next", "outcome": outcome}
    return router.metrics.registry.get_sample_value("plait_router_shadow_total", labels) or 0.0


async def settled(router: RouterWorld) -> None:
    await eventually(lambda: repr(router.shadows) == "<Shadows in_flight=0>", 20)


def of_shadow(request: Any) -> bool:
    return bool(request.model_version == "1")


def fails(worker: FakeModelWorker) -> None:
    worker.refuse = lambda request: FailedPrecondition("no") if of_shadow(request) else None


def hangs(worker: FakeModelWorker) -> None:
    worker.gate = asyncio.Event()
    worker.let_pass = lambda request: not of_shadow(request)


def answers(worker: FakeModelWorker) -> None:
    pass


@pytest.mark.parametrize(("behaves", "outcome"), [(answers, "answered"), (fails, "failed"), (hangs, "late")])
async def test_answers_are_those_without_it_to_the_byte(behaves: Callable[[FakeModelWorker], None], outcome: str) -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker:
        async with router_world(features.address, worker.address, snapshot(route(variants=VARIANTS))) as router:
            without = [(await router.rank(rank(n, top_k=5))).SerializeToString(deterministic=True) for n in range(8)]
        behaves(worker)
        async with router_world(features.address, worker.address, shadowed(timeout_s=0.2)) as router:
            with_it = [(await router.rank(rank(n, top_k=5))).SerializeToString(deterministic=True) for n in range(8)]
            assert with_it == without
            await settled(router)
            assert counted(router, outcome) == 8
        assert len(features.calls) == 16  # features are read once


async def test_both_orders_and_scores_are_compared() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker:
        worker.score_of = lambda request: (lambda _, item: -item[:, 0]) if of_shadow(request) else worker.score
        async with router_world(features.address, worker.address, shadowed()) as router:
            await router.rank(rank())
            await settled(router)
            labels = {"route": "home", "variant": "next"}
            value = router.metrics.registry.get_sample_value
            assert value("plait_router_shadow_overlap_sum", labels) == 0.0  # of twenty, the first ten of one are the last of the other
            assert value("plait_router_shadow_difference_sum", labels) == pytest.approx(38.0)


async def test_what_is_too_much_is_dropped_and_counted() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker:
        hangs(worker)
        async with router_world(features.address, worker.address, shadowed(max_in_flight=2, timeout_s=30)) as router:
            for n in range(5):
                await router.rank(rank(n))
            assert counted(router, "dropped_full") == 3
            assert repr(router.shadows) == "<Shadows in_flight=2>"
            await eventually(lambda: len(worker.requests) == 7, 20)
        assert repr(router.shadows) == "<Shadows in_flight=0>"  # a drain waits for none of them
        await eventually(lambda: worker.cancelled == 2, 20)


async def test_a_router_that_is_nearly_full_casts_none() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, shadowed(), admission=AdmissionSettings(limit=2, queue=8, max_wait_s=10)) as router,
    ):
        worker.gate = asyncio.Event()
        busy = asyncio.gather(*(router.rank(rank(n)) for n in range(6)))
        await worker.started.wait()
        await eventually(lambda: "waiting=4/8" in repr(router.ranking), 20)
        worker.gate.set()
        await busy
        await settled(router)
        assert counted(router, "dropped_busy") > 0
        assert counted(router, "dropped_busy") + counted(router, "answered") == 6


async def test_a_share_is_sampled_by_the_request() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, shadowed(share=0.3)) as router,
    ):
        for n in range(100):
            await router.rank(rank(n))
        await settled(router)
        first = counted(router, "answered")
        assert first == pytest.approx(30, abs=15)
        for n in range(100):
            await router.rank(rank(n))
        await settled(router)
        assert counted(router, "answered") == 2 * first


async def test_explain_casts_none() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, shadowed()) as router,
    ):
        await router.explain(rank())
        await settled(router)
        assert len(worker.requests) == 1


async def test_its_span_is_of_its_own_trace_and_links_to_the_request() -> None:
    with OtlpCollector() as collector:
        telemetry = TelemetrySettings(trace_exporter="otlp", otlp_endpoint=collector.address, trace_sample_ratio=1.0)
        async with (
            FakeFeatureRetrieval(INPUTS) as features,
            FakeModelWorker() as worker,
            router_world(features.address, worker.address, shadowed(), telemetry=telemetry) as router,
        ):
            await router.rank(rank())
            await settled(router)
        spans = [span for _, span in collector.spans]
        [shadow] = [span for span in spans if span.name == "router.shadow"]
        [asked] = [span for span in spans if span.name.endswith("RouterService/Rank")]
        assert [link.trace_id for link in shadow.links] == [asked.trace_id]
        assert shadow.trace_id != asked.trace_id
