"""What routes do beyond one model: rules, experiments and what is told of them, on a real gRPC server."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import INPUTS, KEY, OPERATING_KEY, OTHER_KEY, route, router_world, snapshot
from tests.integration.test_router import ids

from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import from_rpc_error
from plait.registry.policies import Buckets, CachePolicy, Condition, ExperimentArm, Range, Rule, Tier
from plait.registry.records import Experiment, Variant
from router.settings import AdmissionSettings

VARIANTS = (
    Variant(name="main", model="ranker", use="champion"),
    Variant(name="canary", model="ranker", use="1", weight=0),
)


def rank(user: str = "u1", **fields: Any) -> pb.RankRequest:
    return pb.RankRequest(**{"route": "home", "subject": ids(user), "candidates": ids("i1", "i2"), **fields})


async def test_a_canary_is_reached_by_header_label_tenant_and_size_and_by_nobody_else() -> None:
    rules = (
        Rule(name="staff", variant="canary", when=Condition(headers={"x-staff": ("1",)})),
        Rule(name="austria", variant="canary", when=Condition(labels={"country": ("at",)})),
        Rule(name="other", variant="canary", when=Condition(tenants=("other",), fields={"candidates": Range(at_least=2)})),
    )
    registry = snapshot(route(variants=VARIANTS, rules=rules))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        assert {(await router.rank(rank(f"u{n}"))).variant for n in range(30)} == {"main"}
        assert (await router.rank(rank(), headers={"x-staff": "1"})).variant == "canary"
        assert (await router.rank(rank(labels={"country": "at"}))).variant == "canary"
        assert (await router.rank(rank(labels={"country": "de"}), headers={"x-staff": "0"})).variant == "main"
        assert (await router.rank(rank(), key=OTHER_KEY)).variant == "canary"
        assert (await router.rank(rank(candidates=ids("i1")), key=OTHER_KEY)).variant == "main"
        asked = types_pb2.EntityRows(entity_type="user", ids=ids("u1")), types_pb2.EntityRows(entity_type="item", ids=ids("i1"))
        predicted = await router.predict(pb.PredictRequest(route="home", entities=asked, labels={"country": "at"}))
        assert (predicted.variant, predicted.model_version) == ("canary", "1")


async def test_an_experiment_is_sticky_over_a_restart_and_told_in_the_answer() -> None:
    arms = (ExperimentArm(variant="main"), ExperimentArm(variant="canary"))
    experiment = Experiment(name="v4", route="home", layer="ranking", arms=arms, buckets=Buckets(count=5000))
    registry = replace(snapshot(route(variants=VARIANTS)), experiments={"v4": experiment})
    seen: list[dict[str, tuple[str, int]]] = []
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker:
        for _ in range(2):
            async with router_world(features.address, worker.address, registry) as router:
                answers = {f"u{n}": await router.rank(rank(f"u{n}")) for n in range(60)}
                seen.append({user: (a.variant, a.assignments[0].bucket) for user, a in answers.items() if a.assignments})
                assert all(a.assignments[0].variant == a.variant for a in answers.values() if a.assignments)
                assert {a.variant for a in answers.values() if not a.assignments} == {"main"}
    assert seen[0] == seen[1]
    assert all(bucket < 5000 for _, bucket in seen[0].values())
    assert set(Counter(variant for variant, _ in seen[0].values())) == {"main", "canary"}
    assert 0 < len(seen[0]) < 60


LADDER = (Tier(tier="light", variant="canary"), Tier(tier="popularity", feature="item-view:f0"))


async def test_with_every_worker_gone_candidates_come_by_popularity_and_it_is_told() -> None:
    registry = snapshot(route(variants=VARIANTS, ladder=LADDER))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker(lambda _, item: -item[:, 0]) as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        asked = rank(candidates=ids("i2", "i9", "i5"))
        full = await router.rank(asked)
        assert (full.tier, list(full.item_ids.string_ids), list(full.degraded_reasons)) == ("full", ["i2", "i5", "i9"], [])
        await worker.server.drain()
        answer = await router.rank(asked)
        assert (answer.tier, list(answer.item_ids.string_ids)) == ("popularity", ["i9", "i5", "i2"])
        assert (list(answer.degraded_reasons), answer.model, answer.variant) == (["tier_popularity"], "", "main")
        assert len(features.calls) == 2  # what was read for the model is what it is ordered by
        await features.server.drain()
        answer = await router.rank(asked)
        assert (answer.tier, list(answer.item_ids.string_ids)) == ("popularity", ["i2", "i9", "i5"])
        assert list(answer.degraded_reasons) == ["features_unavailable", "tier_popularity"]


async def test_a_model_that_hangs_leaves_time_for_the_light_one() -> None:
    registry = snapshot(route(variants=VARIANTS, ladder=LADDER, timeout_s=1.0))
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker:
        worker.gate = asyncio.Event()
        worker.let_pass = lambda request: request.model_version == "1"
        async with router_world(features.address, worker.address, registry) as router:
            answer = await router.rank(rank())
            assert (answer.tier, answer.variant, answer.model_version) == ("light", "canary", "1")
            assert list(answer.degraded_reasons) == ["tier_light"]
            worker.let_pass = lambda request: False
            assert (await router.rank(rank())).tier == "popularity"


async def test_where_the_router_is_full_popularity_answers_but_not_beyond_the_queue() -> None:
    registry = snapshot(route(variants=VARIANTS[:1], ladder=LADDER[1:]))
    admission = AdmissionSettings(limit=1, queue=1, max_wait_s=0.01)
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry, admission=admission) as router,
    ):
        worker.gate = asyncio.Event()
        first = asyncio.create_task(router.rank(rank()))
        await worker.started.wait()
        answer = await router.rank(rank(candidates=ids("i1", "i7")))
        assert (answer.tier, list(answer.item_ids.string_ids)) == ("popularity", ["i7", "i1"])
        worker.gate.set()
        assert (await first).tier == "full"


async def test_explain_tells_what_is_true_of_the_very_same_answer() -> None:
    rules = (
        Rule(name="staff", variant="canary", when=Condition(headers={"x-staff": ("1",)})),
        Rule(name="austria", variant="canary", when=Condition(labels={"country": ("at",)})),
    )
    arms = (ExperimentArm(variant="main"), ExperimentArm(variant="canary"))
    registry = snapshot(route(variants=VARIANTS, rules=rules, ladder=LADDER))
    registry = replace(registry, experiments={"v4": Experiment(name="v4", route="home", arms=arms, layer="ranking")})
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        asked = rank(labels={"country": "at"}, request_id="r1", candidates=ids("i2", "i9", "i5"))
        answer, told = await router.rank(asked), await router.explain(asked)
        for name in ("item_ids", "scores", "variant", "model_version", "tier", "request_id", "registry_revision"):
            assert getattr(told.rank, name) == getattr(answer, name)
        assert told.rank.timings.total_us > 0
        assert [(r.rule, r.matched, r.failed_condition) for r in told.rules] == [("staff", False, "headers.x-staff"), ("austria", True, "")]
        assert dict(told.not_in) == {"v4": "rule"}
        assert [(a.feature_view, a.view_version, a.oldest_us, a.median_us) for a in told.ages] == [
            ("user-view", 1, 2_000_000, 2_000_000), ("item-view", 1, 2_000_000, 2_000_000),
        ]  # fmt: skip
        assert next((t.tier, t.answered, t.reason) for t in told.tiers) == ("full", True, "answered")
        assert [(a.what, a.kind, a.outcome) for a in told.attempts] == [("features", "first", "OK"), ("model", "first", "OK")]
        operators = await router.explain(asked, key=OPERATING_KEY)
        assert [a.endpoint for a in operators.attempts] == [features.address, worker.address]
        assert told.summary == "Variant 'canary' (ranker version 1) answered, by rule 'austria'."
        assert "experiment 'v4' (bucket " in (await router.explain(rank())).summary
        await worker.server.drain()
        told = await router.explain(asked)
        tried = [(a.what, a.kind, a.outcome) for a in told.attempts]
        lost = "UNAVAILABLE CONNECTION_LOST"
        assert tried == [("features", "first", "OK"), ("model", "first", lost), ("model", "retry", lost)]
        assert {a.endpoint for a in told.attempts} == {""}, "where services live is for operators"
        assert "popularity of the candidates answered" in told.summary
        assert "on tier popularity, because full failed" in told.summary


async def test_an_explain_is_no_exposure_and_reads_no_ages_for_others() -> None:
    arms = (ExperimentArm(variant="main"), ExperimentArm(variant="canary"))
    registry = replace(snapshot(route(variants=VARIANTS)), experiments={"v4": Experiment(name="v4", route="home", arms=arms)})
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        variant = (await router.explain(rank())).rank.variant
        exposures = router.metrics.registry.get_sample_value
        labels = {"experiment": "v4", "variant": variant}
        assert exposures("plait_router_exposures_total", labels) is None
        assert (await router.rank(rank())).variant == variant
        assert exposures("plait_router_exposures_total", labels) == 1
        assert [request.include_ages for request in features.requests] == [True, False]


async def test_a_predict_is_explained_too_and_nothing_is_refused() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        asked = types_pb2.EntityRows(entity_type="user", ids=ids("u1")), types_pb2.EntityRows(entity_type="item", ids=ids("i1"))
        told = await router.explain(pb.PredictRequest(route="home", entities=asked))
        assert told.predict.outputs[0].name == "score"
        assert "as the route's only variant with a weight" in told.summary
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Explain(pb.ExplainRequest(), metadata=(("x-api-key", KEY),), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_explain_looks_at_the_cache_and_uses_none() -> None:
    registry = snapshot(route(cache=CachePolicy(ttl_s=60), repeat_window_s=60))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        assert (await router.explain(rank(request_id="r1"))).cache_would_be == explanation_pb2.CACHE_STATUS_MISS
        assert (await router.rank(rank(request_id="r1"))).cache == explanation_pb2.CACHE_STATUS_MISS
        told = await router.explain(rank(request_id="r1"))
        assert (told.cache_would_be, told.rank.cache) == (explanation_pb2.CACHE_STATUS_HIT, explanation_pb2.CACHE_STATUS_UNSPECIFIED)
        assert len(worker.requests) == 3
        assert (await router.rank(rank(request_id="r2"))).cache == explanation_pb2.CACHE_STATUS_HIT


@pytest.mark.parametrize("on_missing", ["default", "stale_ok", "fail"])
async def test_a_view_that_is_required_is_whatever_the_policy_says(on_missing: str) -> None:
    registry = snapshot(route(on_missing=on_missing, required_views=("item-view",)), route("lenient", on_missing=on_missing))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        features.statuses = {types_pb2.ROW_STATUS_NULL: 1}
        assert (await router.rank(rank())).tier == "full"
        for status in (types_pb2.ROW_STATUS_STALE, types_pb2.ROW_STATUS_NOT_FOUND, types_pb2.ROW_STATUS_UNAVAILABLE):
            features.statuses = {status: 1}
            assert (await router.rank(rank(route="lenient"))).tier == "full"  # (the fake leaves the policy to the router)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.rank(rank())
            error = from_rpc_error(caught.value)
            assert (error.reason, "1 of 2 rows of feature view 'item-view'" in str(error)) == ("FEATURES_MISSING", True)
        await features.server.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.rank(rank())
        assert from_rpc_error(caught.value).reason == "FEATURES_UNAVAILABLE"


async def test_a_weight_never_goes_to_a_version_that_no_worker_holds() -> None:
    held = {("ranker", "1")}
    registry = snapshot(route(variants=(Variant(name="old", model="ranker", use="1"), Variant(name="new", model="ranker", use="2"))))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        worker.held = held
        seen = {(await router.rank(rank(f"u{n}"))).variant for n in range(30)}
        assert seen == {"old", "new"}, "until workers were asked, all count as held"
        await router.workers.look()
        answers = [await router.rank(rank(f"u{n}")) for n in range(30)]
        assert {answer.variant for answer in answers} == {"old"}
        assert {tuple(answer.degraded_reasons) for answer in answers} == {(), ("variant_not_ready",)}
        held.add(("ranker", "2"))
        await router.workers.look()
        assert {(await router.rank(rank(f"u{n}"))).variant for n in range(30)} == {"old", "new"}


async def test_known_scores_answer_before_popularity_does() -> None:
    ladder = (Tier(tier="cached", max_age_s=60), Tier(tier="popularity", feature="item-view:f0"))
    registry = snapshot(route(variants=VARIANTS[:1], ladder=ladder, cache=CachePolicy(scores_ttl_s=0.001)))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker(lambda _, item: -item[:, 0]) as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        asked = rank(candidates=ids("i2", "i9", "i5"))
        assert (await router.rank(asked)).tier == "full"
        await worker.server.drain()
        answer = await router.rank(asked)
        assert (answer.tier, list(answer.item_ids.string_ids)) == ("cached", ["i2", "i5", "i9"])
        told = await router.explain(rank("another", candidates=ids("i2", "i9")))
        assert [(t.tier, t.reason) for t in told.tiers] == [("full", "failed"), ("cached", "nothing_cached"), ("popularity", "answered")]
        assert "because full failed and cached knew too little" in told.summary


async def test_what_rules_look_at_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    when = Condition(headers={"x-staff": ("a-header-value",)}, labels={"country": ("a-label-value",)})
    registry = snapshot(route(variants=VARIANTS, rules=(Rule(name="r", variant="canary", when=when),), sticky="label:country"))
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, registry) as router,
    ):
        with caplog.at_level("DEBUG"), capture_logs() as logs:
            asked = rank(labels={"country": "a-label-value"})
            assert (await router.rank(asked, headers={"x-staff": "a-header-value"})).variant == "canary"
            told = await router.explain(asked, headers={"x-staff": "another-header-value"})
            too_long = rank(labels={"country": "a-label-value" * 30})
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.rank(too_long)
    assert any(line["event"] == "answered" for line in logs)
    for text in (str(logs), caplog.text, str(told.rules), told.summary, str(caught.value.details())):
        assert "header-value" not in text
        assert "label-value" not in text
