"""ModelInfer through a real router to a worker that speaks the real wire: names are resolved, bytes are not touched."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.foreign_server import ForeignServer
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import EXPIRED_KEY, KEY, NARROW_KEY, OTHER_KEY, SIGNATURE, RouterWorld, route, router_world, snapshot

from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import PlaitError, ResourceExhausted, from_rpc_error
from plait.registry.policies import Comparison, Condition, Rule, Stages
from plait.registry.records import FeatureSet, Model, Pool, PoolEndpoint, Quota, TensorSpec, Variant
from router.pass_through import row_bytes
from router.settings import AdmissionSettings

UNKNOWN = b"\xf8\x3f\x96\x01\xfa\x3f\x02hi"  # two fields that no version of the protocol has
AUTHORIZED = (("authorization", f"Bearer {KEY}"),)
NOBODY = "127.0.0.1:1"  # (feature-retrieval is not asked)


def request(model: str = "ranker", version: str = "", **more: Any) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name=model, model_version=version, **more)
    made.inputs.add(name="user", datatype="FP32", shape=[1, 2])
    made.inputs.add(name="item", datatype="FP32", shape=[2, 3])
    made.raw_input_contents.append(np.zeros((1, 2), "<f4").tobytes())
    made.raw_input_contents.append(np.arange(6, dtype="<f4").tobytes())
    made.parameters["mine"].string_param = "kept"
    return made


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[FakeModelWorker]:
    async with FakeModelWorker() as worker:
        yield worker


@pytest_asyncio.fixture
async def world(worker: FakeModelWorker) -> AsyncIterator[RouterWorld]:
    variants = (Variant(name="main", model="ranker", use="champion", weight=3), Variant(name="old", model="ranker", use="1", weight=1))
    routes = (
        route(variants=variants),
        route("closed", tenants=("other",)),
        route("broken", variants=(Variant(name="b", model="ranker", use="broken"),)),
        route("slow", timeout_s=0.05),
        route("staged", stages=Stages(rules="rules", filter=(Comparison(name="some", column="f0", at_least=0.0),))),
        route("ruled", variants=variants, rules=(Rule(name="staff", when=Condition(headers={"x-plait-unit": ("boss",)}), variant="old"),)),
    )
    registry = snapshot(*routes)
    plain = Model(name="plain", versions=registry.models["ranker"].versions[:2])  # no champion
    shadowed = Model(name="slow", versions=registry.models["ranker"].versions[:1])
    rules = FeatureSet(name="rules", inputs=registry.feature_sets["ranker"].inputs[1:])
    registry = replace(
        registry,
        models={**registry.models, "plain": plain, "slow": shadowed},
        feature_sets={**registry.feature_sets, "rules": rules},
    )
    async with router_world(NOBODY, worker.address, registry) as world:
        yield world


async def refused(call: Any) -> PlaitError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("name", "version", "reached"),
    [
        ("ranker", "", ("ranker", "2")),
        ("ranker", "2", ("ranker", "2")),
        ("ranker", "1", ("ranker", "1")),
        ("ranker", "champion", ("ranker", "2")),
        ("ranker", "-1", ("ranker", "-1")),
        ("plain", "", ("plain", "")),
        ("slow", "", ("ranker", "2")),  # a route's name goes before a model's
        ("home", "1", ("ranker", "1")),
        ("home", "2", ("ranker", "2")),
    ],
)
async def test_a_name_leads_to_a_version(
    world: RouterWorld, worker: FakeModelWorker, name: str, version: str, reached: tuple[str, str]
) -> None:
    sent = request(name, version, id="r-7")
    answer = await world.infer(sent, timeout_s=20)
    [seen] = worker.requests
    assert (seen.model_name, seen.model_version) == reached
    assert (answer.id, answer.model_name, answer.model_version) == ("r-7", *reached)
    assert worker.calls[0].tenant == "shop"
    sent.model_name, sent.model_version = reached
    assert seen == sent


async def test_what_is_named_exactly_passes_byte_by_byte_and_comes_back_so(world: RouterWorld, worker: FakeModelWorker) -> None:
    sent = UNKNOWN + request("ranker", "2", id="r").SerializeToString() + UNKNOWN
    raw = await world.infer(sent)
    [seen] = worker.requests
    assert seen.SerializeToString() == pb.ModelInferRequest.FromString(sent).SerializeToString()  # (what is unknown is kept by both)
    typed = await world.infer(pb.ModelInferRequest.FromString(sent))
    assert pb.ModelInferResponse.FromString(raw) == typed
    assert typed.raw_output_contents == [np.array([0, 3], "<f4").tobytes()]
    counted = world.metrics.registry.get_sample_value(
        "plait_router_inferences_total", {"route": "", "variant": "", "model": "ranker", "version": "2"}
    )
    assert counted == 2


async def test_a_routes_variant_sticks_to_the_unit_then_to_the_id(world: RouterWorld) -> None:
    async def version(unit: str, request_id: str) -> str:
        return str((await world.infer(request("home", id=request_id), unit=unit)).model_version)

    by_unit = [await version(f"u{n}", str(n)) for n in range(40)]
    assert [await version(f"u{n}", f"other {n}") for n in range(40)] == by_unit
    by_id = [await version("", f"u{n}") for n in range(40)]
    assert by_id == by_unit
    shares = Counter(by_unit)
    assert shares["2"] > shares["1"] > 0
    assert {await version("", "") for _ in range(40)} == {"1", "2"}


async def test_a_routes_rules_and_tenants_choose_as_they_do_for_rank(world: RouterWorld) -> None:
    assert (await world.infer(request("ruled"), unit="boss")).model_version == "1"
    others = [str((await world.infer(request("ruled"), unit=f"u{n}")).model_version) for n in range(10)]
    assert others == [str((await world.infer(request("ruled"), unit=f"u{n}")).model_version) for n in range(10)]
    assert "2" in others


@pytest.mark.parametrize(
    ("name", "version", "key", "code", "reason", "words"),
    [
        ("nobody", "", KEY, "NOT_FOUND", "MODEL_NOT_FOUND", "Request for unknown model: 'nobody'"),
        ("n" * 3000, "", KEY, "NOT_FOUND", "MODEL_NOT_FOUND", "n" * 80 + "'"),
        ("", "", KEY, "NOT_FOUND", "MODEL_NOT_FOUND", "its name is empty"),
        ("ranker", "9", KEY, "NOT_FOUND", "VERSION_NOT_FOUND", "newest first: 3, 2, 1"),
        ("home", "3", KEY, "NOT_FOUND", "VERSION_NOT_FOUND", "its variants are at 2, 1"),
        ("closed", "", KEY, "PERMISSION_DENIED", "ROUTE_NOT_OPEN", "not open"),
        ("staged", "", KEY, "FAILED_PRECONDITION", "ROUTE_NOT_RAW", "call Rank"),
        ("broken", "", KEY, "FAILED_PRECONDITION", "SIGNATURE_MISMATCH", "cannot serve"),
        ("ranker", "", NARROW_KEY, "PERMISSION_DENIED", "SCOPE_MISSING", "'infer'"),
        ("ranker", "", EXPIRED_KEY, "UNAUTHENTICATED", "API_KEY_EXPIRED", "expired"),
        ("ranker", "", None, "UNAUTHENTICATED", "API_KEY_MISSING", "no API key"),
    ],
)
async def test_what_cannot_be_asked_for_is_told_in_words(
    world: RouterWorld, worker: FakeModelWorker, name: str, version: str, key: str | None, code: str, reason: str, words: str
) -> None:
    error = await refused(world.infer(request(name, version), key=key))
    assert (error.code.name, error.reason) == (code, reason)
    assert words in error.message
    assert len(error.message) < 400
    assert not worker.requests


async def test_a_route_that_is_open_to_another_tenant_serves_it(world: RouterWorld, worker: FakeModelWorker) -> None:
    assert (await world.infer(request("closed"), key=OTHER_KEY)).model_version == "2"
    assert worker.calls[0].tenant == "other"


async def test_a_model_behind_closed_routes_alone_is_closed_by_its_name_too(worker: FakeModelWorker) -> None:
    registry = snapshot(route("closed", tenants=("other",)))
    async with router_world(NOBODY, worker.address, registry) as world:
        assert (await world.infer(request("ranker"), key=OTHER_KEY)).model_version == "2"
        error = await refused(world.infer(request("ranker")))
        assert (error.code.name, error.reason) == ("PERMISSION_DENIED", "MODEL_NOT_OPEN")
        assert len(worker.requests) == 1
    async with router_world(NOBODY, worker.address, snapshot(route("closed", tenants=("other",)), route("open"))) as world:
        assert (await world.infer(request("ranker"))).model_version == "2"
    async with router_world(NOBODY, worker.address, replace(registry, routes={})) as world:
        assert (await world.infer(request("ranker"))).model_version == "2"


async def test_a_routes_timeout_and_a_callers_going_reach_the_worker(world: RouterWorld, worker: FakeModelWorker) -> None:
    worker.gate = asyncio.Event()
    assert (await refused(world.infer(request("slow")))).code is grpc.StatusCode.DEADLINE_EXCEEDED
    worker.started.clear()
    gone = asyncio.ensure_future(world.infer(request("home", "2")))
    await asyncio.wait_for(worker.started.wait(), 20)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    while worker.cancelled < 2:
        await asyncio.sleep(0)
    assert worker.calls[1].deadline.remaining_s() < 20


async def test_what_the_worker_finds_wrong_is_the_callers_as_it_stands(world: RouterWorld, worker: FakeModelWorker) -> None:
    worker.error = ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=1.5)
    error = await refused(world.infer(request()))
    assert (error.reason, error.retry_after_s) == ("QUEUE_FULL", 1.5)


async def test_tensors_that_cannot_be_parsed_hurt_no_other_call(world: RouterWorld, worker: FakeModelWorker) -> None:
    worker.gate = asyncio.Event()
    held = asyncio.ensure_future(world.infer(request(id="held")))
    await asyncio.wait_for(worker.started.wait(), 20)
    broken = request().SerializeToString() + b"\x2a\x02\x0a\xff"  # an input that is cut off within
    errors = await asyncio.gather(*(refused(world.infer(broken)) for _ in range(3)))
    assert {(error.code.name, error.reason) for error in errors} == {("INVALID_ARGUMENT", "MALFORMED_MESSAGE")}
    worker.gate.set()
    assert (await held).id == "held"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=80), min_size=1, max_size=20))
def test_random_bytes_are_refused_with_a_typed_error(messages: list[bytes]) -> None:
    async def run() -> None:
        async with FakeModelWorker() as worker, router_world(NOBODY, worker.address) as world:
            answers = await asyncio.gather(*(world.infer(data) for data in messages), return_exceptions=True)
            for answer in answers:
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert answer.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            assert (await world.infer(request())).model_version == "2"

    asyncio.run(run())


async def test_it_waits_at_the_same_gate_as_others(worker: FakeModelWorker) -> None:
    worker.gate = asyncio.Event()
    async with router_world(NOBODY, worker.address, admission=AdmissionSettings(limit=1, queue=0)) as world:
        held = asyncio.ensure_future(world.infer(request()))
        await asyncio.wait_for(worker.started.wait(), 20)
        error = await refused(world.infer(request()))
        assert error.reason == "OVERLOADED"
        worker.gate.set()
        await held
        assert (await world.infer(request())).model_version == "2"


async def test_a_model_of_a_foreign_pool_is_served_there(worker: FakeModelWorker) -> None:
    async with ForeignServer(("ranker", "2")) as foreign:
        pool = Pool(name="triton", protocol="oip", endpoints=(PoolEndpoint(address=foreign.address),))
        registry = snapshot()
        ranker = replace(registry.models["ranker"], pool="triton")
        async with router_world(NOBODY, worker.address, replace(registry, models={"ranker": ranker}, pools={"triton": pool})) as world:
            for name in ("home", "ranker"):
                answer = await world.infer(request(name, id="r"))
                assert (answer.model_version, answer.id, answer.raw_output_contents[0]) == ("2", "r", np.array([0, 3], "<f4").tobytes())
            index = await world.inference.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=AUTHORIZED)
            assert [(one.name, one.version, one.state) for one in index.models] == [("ranker", "2", "READY")]
            foreign.fail = (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape")
            assert "unexpected shape" in (await refused(world.infer(request()))).message
        assert not worker.requests
        assert not any(name in metadata for metadata in foreign.metadata for name in ("authorization", "x-plait-service-token"))


def test_how_much_a_row_is() -> None:
    assert row_bytes(SIGNATURE) == 3 * 4
    words = TensorSpec(name="words", dtype="bytes", shape=(-1, 2))
    assert row_bytes(replace(SIGNATURE, inputs=(*SIGNATURE.inputs, words))) == 3 * 4 + 2 * 16
    assert row_bytes(replace(SIGNATURE, inputs=SIGNATURE.inputs[:1])) == 1


async def test_a_tenants_quota_holds_for_inferences_too(worker: FakeModelWorker) -> None:
    registry = snapshot()
    shop = replace(registry.tenants["shop"], quota=Quota(requests_per_s=0.001, burst=2))
    async with router_world(NOBODY, worker.address, replace(registry, tenants={**registry.tenants, "shop": shop})) as world:
        for _ in range(2):
            await world.infer(request())
        error = await refused(world.infer(request()))
        assert error.reason == "QUOTA_EXCEEDED"
        assert (await world.infer(request(), key=OTHER_KEY)).model_version == "2"


async def streamed(world: RouterWorld, *requests: Any, **more: Any) -> list[Any]:
    stream = world.inference.ModelStreamInfer(metadata=(*AUTHORIZED, *more.pop("headers", ())), **more)
    for one in requests:
        await stream.write(one)
    await stream.done_writing()
    return [answer async for answer in stream]


async def test_a_stream_is_answered_in_order_whatever_fails_in_between(world: RouterWorld) -> None:
    asked = [request("nobody" if n in (3, 17) else "home", "2", id=f"r{n}") for n in range(30)]  # more than it holds at once
    answers = await streamed(world, *asked, timeout=20)
    assert [answer.infer_response.id for answer in answers] == [f"r{n}" for n in range(30)]
    for n, answer in enumerate(answers):
        if n in (3, 17):
            assert "Request for unknown model: 'nobody'" in answer.error_message
        else:
            assert not answer.error_message
            assert answer.infer_response.raw_output_contents[0] == np.array([0, 3], "<f4").tobytes()
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            assert answer.infer_response.parameters["compute_us"].int64_param == 22


async def test_a_stream_ends_with_a_status_for_who_asks_for_that(world: RouterWorld) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await streamed(world, request("nobody"), headers=(("triton_grpc_error", "true"),), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
