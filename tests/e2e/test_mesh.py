"""The whole mesh over its public API: real processes, real stores, a real model; good answers, bad input, one tree of spans."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from tests.fakes import small_ranker
from tests.fakes.otlp_collector import OtlpCollector
from tests.fakes.small_mesh import ROUTE, USER, SmallMesh, small_mesh

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as features_grpc
from plait.api.inference.v2 import inference_pb2 as inference_pb
from plait.api.inference.v2 import inference_pb2_grpc as inference_grpc
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, PlaitError, from_rpc_error
from plait.registry.manifests import pin_artifacts
from plait.registry.store import Store

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def collector() -> Any:
    with OtlpCollector() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, collector: OtlpCollector) -> AsyncIterator[SmallMesh]:
    environment = {}
    for service in ("ROUTER", "FEATURE_RETRIEVAL", "MODEL_WORKER"):
        environment[f"PLAIT_{service}_TELEMETRY__TRACE_EXPORTER"] = "otlp"
        environment[f"PLAIT_{service}_TELEMETRY__OTLP_ENDPOINT"] = collector.address
        environment[f"PLAIT_{service}_TELEMETRY__TRACE_SAMPLE_RATIO"] = "1"
    environment["OTEL_BSP_SCHEDULE_DELAY"] = "100"
    async with small_mesh(tmp_path_factory.mktemp("mesh"), environment) as world:
        yield world


async def test_online_scores_are_the_offline_scores(mesh: SmallMesh) -> None:
    ids = list(mesh.items)
    async with mesh.client() as client:
        ranking = await client.rank(ROUTE, "u1", ids, explain=True)
    expected = small_ranker.offline_scores(mesh.artifact, [USER["age"], USER["active"]], [mesh.items[i] for i in ids])
    found = dict(ranking.items)
    np.testing.assert_allclose([found[i] for i in ids], expected, rtol=1e-5, atol=1e-6)
    assert [score for _, score in ranking.items] == sorted(found.values(), reverse=True)
    assert (ranking.model, ranking.version, ranking.variant, ranking.tier) == ("ranker", "1", "main", "full")
    assert ranking.degraded_reasons == ()
    assert ranking.timings is not None
    assert 0 < ranking.timings.compute_us < ranking.timings.predict_us < ranking.timings.total_us
    assert {report.feature_view: report.present for report in ranking.feature_report} == {"user-profile": 1, "item-stats": len(ids)}


async def test_top_k_and_unknown_entities_are_answered_with_defaults_and_say_so(mesh: SmallMesh) -> None:
    async with mesh.client() as client:
        ranking = await client.rank(ROUTE, "nobody", ["never-seen", *list(mesh.items)[:9]], top_k=3)
    assert len(ranking.items) == 3
    assert ranking.degraded_reasons == ("features_defaulted",)


async def test_the_largest_request_is_answered(mesh: SmallMesh) -> None:
    ids = [*mesh.items, *(f"never-seen-{n}" for n in range(10_000 - len(mesh.items)))]
    async with mesh.client() as client:
        ranking = await client.rank(ROUTE, "u1", ids, timeout_s=20)
    assert sorted(item for item, _ in ranking.items) == sorted(ids)


async def test_many_callers_at_once_get_each_their_own_answer(mesh: SmallMesh) -> None:
    """Batches mix callers; nobody gets somebody else's rows."""
    ids = list(mesh.items)
    slices = [ids[n : n + 7] for n in range(0, 420, 7)]
    async with mesh.client() as client:
        rankings = await asyncio.gather(*(client.rank(ROUTE, "u1", chosen, timeout_s=20) for chosen in slices))
    for chosen, ranking in zip(slices, rankings, strict=True):
        expected = small_ranker.offline_scores(mesh.artifact, [USER["age"], USER["active"]], [mesh.items[i] for i in chosen])
        found = dict(ranking.items)
        np.testing.assert_allclose([found[i] for i in chosen], expected, rtol=1e-4, atol=1e-5)


async def test_a_write_is_seen_by_the_next_rank_at_the_latest_after_its_invalidation(mesh: SmallMesh) -> None:
    async with mesh.client() as client:
        before = dict((await client.rank(ROUTE, "u1", ["i7", "i8"])).items)
        await mesh.write("item-stats", ["i7"], [{"price": 50.0, "views": -3.0, "sold": 9.0}])
        try:
            await mesh.rank_until(client, lambda ranking: dict(ranking.items)["i7"] != before["i7"])
        finally:
            await mesh.write("item-stats", ["i7"], [dict(zip(("price", "views", "sold"), mesh.items["i7"], strict=True))])
        await mesh.rank_until(client, lambda ranking: dict(ranking.items)["i7"] == pytest.approx(before["i7"], rel=1e-5))


async def test_predict_answers_the_outputs_of_the_model(mesh: SmallMesh) -> None:
    async with mesh.client() as client:
        prediction = await client.predict(ROUTE, {"user": ["u1"], "item": ["i1", "i2"]})
    output = prediction.outputs["score"]
    expected = small_ranker.offline_scores(mesh.artifact, [USER["age"], USER["active"]], [mesh.items["i1"], mesh.items["i2"]])
    np.testing.assert_allclose(np.asarray(output), expected, rtol=1e-5)


def rank_request(**changes: Any) -> pb.RankRequest:
    request = pb.RankRequest(route=ROUTE)
    request.subject.string_ids.append("u1")
    request.candidates.string_ids.extend(["i1", "i2"])
    for name, value in changes.items():
        request.ClearField(name)  # type: ignore[arg-type]
        if name == "route":
            request.route = value
        elif name == "inline_features":
            request.inline_features.append(value)
        elif value and isinstance(value[0], int):
            getattr(request, name).int64_ids.extend(value)
        else:
            getattr(request, name).string_ids.extend(value)
    return request


def tensor(name: str, dtype: Any, shape: list[int], size_bytes: int) -> types_pb2.Tensor:
    return types_pb2.Tensor(name=name, dtype=dtype, shape=shape, data=bytes(size_bytes))


F32, F64 = types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_FLOAT64
BAD_REQUESTS: dict[str, tuple[pb.RankRequest, str, str]] = {
    "unknown route": (rank_request(route="nowhere"), "NOT_FOUND", "ROUTE_NOT_FOUND"),
    "no route": (rank_request(route=""), "INVALID_ARGUMENT", ""),
    "no candidates": (rank_request(candidates=[]), "INVALID_ARGUMENT", ""),
    "10 001 candidates": (rank_request(candidates=[f"i{n}" for n in range(10_001)]), "INVALID_ARGUMENT", ""),
    "duplicate candidates": (rank_request(candidates=["i1", "i2", "i1"]), "INVALID_ARGUMENT", ""),
    "an empty candidate": (rank_request(candidates=["i1", ""]), "INVALID_ARGUMENT", ""),
    "candidates of the wrong kind": (rank_request(candidates=[1, 2]), "INVALID_ARGUMENT", ""),
    "no subject": (rank_request(subject=[]), "INVALID_ARGUMENT", ""),
    "two subjects": (rank_request(subject=["u1", "u2"]), "INVALID_ARGUMENT", ""),
    "a tensor of the wrong dtype": (rank_request(inline_features=tensor("user", F64, [1, 2], 16)), "INVALID_ARGUMENT", ""),
    "a tensor of the wrong shape": (rank_request(inline_features=tensor("user", F32, [1, 3], 12)), "INVALID_ARGUMENT", ""),
    "a tensor of the wrong size": (rank_request(inline_features=tensor("user", F32, [1, 2], 7)), "INVALID_ARGUMENT", ""),
    "a tensor nobody knows": (rank_request(inline_features=tensor("nose", F32, [1, 2], 8)), "INVALID_ARGUMENT", ""),
}


async def refusal(mesh: SmallMesh, request: Any, *, key: str | None = None, timeout_s: float = 10, method: str = "Rank") -> PlaitError:
    """Send it as it is, without the help of our client; return the error, and show that the next good request is answered."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(mesh.endpoints.router, options=options) as channel:
        stub: Any = pb_grpc.RouterServiceStub(channel)
        metadata = (("authorization", f"Bearer {mesh.endpoints.api_key if key is None else key}"),) if key != "" else ()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request, metadata=metadata, timeout=timeout_s)
    async with mesh.client() as client:
        assert len((await client.rank(ROUTE, "u1", ["i1", "i2"])).items) == 2
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_is_refused_clearly(mesh: SmallMesh, case: str) -> None:
    request, code, reason = BAD_REQUESTS[case]
    error = await refusal(mesh, request)
    assert error.code.name == code, error
    assert not reason or error.reason == reason
    assert error.violations or code != "INVALID_ARGUMENT"
    assert "u1" not in str(error)


@pytest.mark.parametrize(("key", "code"), [("", "UNAUTHENTICATED"), ("plait_wrong", "UNAUTHENTICATED")])
async def test_without_a_right_key_nobody_is_let_in(mesh: SmallMesh, key: str, code: str) -> None:
    assert (await refusal(mesh, rank_request(), key=key)).code.name == code


async def test_a_message_over_the_limit_is_refused(mesh: SmallMesh) -> None:
    error = await refusal(mesh, rank_request(inline_features=tensor("user", F32, [1, 2], 17 << 20)))
    assert error.code.name == "RESOURCE_EXHAUSTED"


async def test_an_expired_deadline_is_said_so(mesh: SmallMesh) -> None:
    assert (await refusal(mesh, rank_request(), timeout_s=0.000_001)).code.name == "DEADLINE_EXCEEDED"


async def test_a_message_that_is_none_is_refused(mesh: SmallMesh) -> None:
    async with grpc.aio.insecure_channel(mesh.endpoints.router) as channel:
        call = channel.unary_unary("/plait.api.router.v1.RouterService/Rank", lambda raw: raw, lambda raw: raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff", metadata=(("x-api-key", mesh.endpoints.api_key),), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_that_does_not_fit_its_feature_set_is_not_let_in(mesh: SmallMesh, tmp_path: Path) -> None:
    folder = small_ranker.publish(tmp_path / "misfit", item_width=4)
    records = small_ranker.manifests(small_ranker.model("misfit", folder), small_ranker.route("misfit", "misfit"))
    async with await Store.open(mesh.endpoints.postgres_dsn) as store:
        with pytest.raises(FailedPrecondition, match="item") as caught:
            await store.apply(pin_artifacts(records), actor="test", reason="")
    assert caught.value.violations


async def test_a_corrupt_artifact_never_serves_and_says_why(mesh: SmallMesh, tmp_path: Path) -> None:
    incomplete = small_ranker.publish(tmp_path / "incomplete", seed=4)
    (incomplete / "model.pt").unlink()
    with pytest.raises(FailedPrecondition, match=r"model\.pt"):  # already seen when it is applied
        await mesh.apply(small_ranker.model("incomplete", incomplete))
    folder = small_ranker.publish(tmp_path / "later", seed=5)
    pinned = pin_artifacts(small_ranker.manifests(small_ranker.model("later", folder), small_ranker.route("later", "later")))
    damaged = bytearray((folder / "model.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "model.pt").write_bytes(damaged)
    async with await Store.open(mesh.endpoints.postgres_dsn) as store:
        await store.apply(pinned, actor="test", reason="")
    async with mesh.client() as client:
        error = await mesh.error_until(client, lambda e: e.reason == "MODEL_FAILED", route="later")
        assert isinstance(error, FailedPrecondition)
        assert "ARTIFACT_CORRUPT" in str(error)
        assert (await client.rank(ROUTE, "u1", ["i1"])).version == "1"


async def test_the_spans_of_one_rank_form_one_tree(mesh: SmallMesh, collector: OtlpCollector) -> None:
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with grpc.aio.insecure_channel(mesh.endpoints.router) as channel:
        stub: Any = pb_grpc.RouterServiceStub(channel)
        metadata = (("x-api-key", mesh.endpoints.api_key), ("traceparent", f"00-{trace_id}-{span_id}-01"))
        await stub.Rank(rank_request(), metadata=metadata, timeout=10)

    def of_this_rank(spans: list[Any]) -> list[Any]:
        return [(service, span) for service, span in spans if span.trace_id.hex() == trace_id]

    def complete(spans: list[Any]) -> bool:
        return len(of_this_rank(spans)) >= 5

    spans = of_this_rank(await asyncio.to_thread(collector.wait, complete))
    by_id = {span.span_id: service for service, span in spans}
    tree = sorted((by_id.get(span.parent_span_id, "caller"), service, span.name.rpartition("/")[2]) for service, span in spans)
    assert tree == [
        ("caller", "router", "Rank"),
        ("router", "feature-retrieval", "GetFeatures"),
        ("router", "model-worker", "ModelInfer"),
        ("router", "router", "GetFeatures"),
        ("router", "router", "ModelInfer"),
    ]
    assert [span.parent_span_id.hex() for _, span in spans if span.parent_span_id not in by_id] == [span_id]
    assert "u1" not in str(spans)


async def test_logs_hold_neither_ids_nor_keys(mesh: SmallMesh) -> None:
    marked = f"person-{time.time_ns()}"
    async with mesh.client() as client:
        await client.rank(ROUTE, marked, ["i1"])
    for log in (mesh.folder / "state" / "logs").glob("*.log"):
        text = log.read_text(encoding="utf-8", errors="replace")
        assert marked not in text
        assert mesh.endpoints.api_key not in text
        assert "Traceback" not in text, text


async def test_credentials_are_repeated_nowhere(mesh: SmallMesh, collector: OtlpCollector) -> None:
    mark = f"canary{time.time_ns()}"
    token = ".".join((f"{mark}head", f"{mark}body", f"{mark}sign"))
    sent = [
        ("x-api-key", f"plait_{mark}"),
        ("authorization", f"Bearer {token}"),
        ("authorization", f"Basic {mark}"),
        ("x-plait-service-token", mark),
        ("x-forwarded-client-cert", f"URI=spiffe://td/{mark}"),
    ]
    metrics = []
    trace_id = f"{time.time_ns():032x}"
    traced = ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01")
    async with grpc.aio.insecure_channel(mesh.endpoints.router) as channel:
        stub: Any = pb_grpc.RouterServiceStub(channel)
        for header in sent:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Rank(pb.RankRequest(), metadata=(header, traced), timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert mark not in str(caught.value)
    for address in mesh.endpoints.metrics.values():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            metrics.append(answer.read().decode())
    logs = [log.read_text(encoding="utf-8", errors="replace") for log in (mesh.folder / "state" / "logs").glob("*.log")]
    spans = await asyncio.to_thread(collector.wait, lambda found: sum(span.trace_id.hex() == trace_id for _, span in found) >= len(sent))
    for told in (*logs, *metrics, str(spans)):
        assert mark not in told


async def test_a_revoked_key_is_refused_by_every_service_and_its_streams_end(mesh: SmallMesh) -> None:
    async with (
        await Store.open(mesh.endpoints.postgres_dsn) as store,
        grpc.aio.insecure_channel(mesh.endpoints.router) as router,
        grpc.aio.insecure_channel(mesh.endpoints.feature_retrieval) as features,
        grpc.aio.insecure_channel(mesh.endpoints.model_worker) as worker,
    ):
        key, secret = await store.create_key("default", ("rank", "infer", "read", "publish"), actor="test")
        metadata = (("x-api-key", secret),)

        async def refused() -> list[str]:
            """Call each service with a request that it refuses for itself where it lets the caller in."""
            routing: Any = pb_grpc.RouterServiceStub(router)
            reading: Any = features_grpc.FeatureRetrievalServiceStub(features)
            inferring: Any = inference_grpc.GRPCInferenceServiceStub(worker)
            calls = (
                routing.Rank(pb.RankRequest(), metadata=metadata, timeout=20),
                reading.GetFeatures(features_pb.GetFeaturesRequest(), metadata=metadata, timeout=20),
                inferring.ModelInfer(inference_pb.ModelInferRequest(), metadata=metadata, timeout=20),
            )
            found = await asyncio.gather(*calls, return_exceptions=True)
            return [from_rpc_error(error).reason for error in found if isinstance(error, grpc.aio.AioRpcError)]

        async def until(holds: Any) -> None:
            async with asyncio.timeout(20):
                while not holds(await refused()):
                    await asyncio.sleep(0.02)

        await until(lambda reasons: len(reasons) == 3 and "API_KEY_INVALID" not in reasons)
        ingesting: Any = features_grpc.FeatureRetrievalServiceStub(features)
        stream = ingesting.IngestFeatures(metadata=metadata)
        await stream.write(features_pb.IngestFeaturesRequest(batch_id=1))
        assert (await stream.read()).batch_id == 1
        await store.revoke_key(key.id, actor="test")
        await until(lambda reasons: reasons == ["API_KEY_INVALID"] * 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(stream.read(), 20)
        assert from_rpc_error(caught.value).reason == "API_KEY_INVALID"
