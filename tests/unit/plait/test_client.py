"""The client library against a router that speaks the real wire: the async and the sync one by the same tests."""

from __future__ import annotations

import array
import asyncio
import socket
import subprocess
import sys
import time
import types
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router import FakeRouter

from plait import client as client_module
from plait.api.types.v1 import types_pb2
from plait.client import (
    Assignment,
    FeatureReport,
    Outcome,
    Ranking,
    RankingClient,
    Recorded,
    SyncRankingClient,
    Tensor,
    Timings,
    TlsConfig,
    WrongOutcome,
    backoff_s,
)
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PlaitError,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Violation,
)

KEY = "plait_secret"
SERVER_NAME = "plait.test"


class InThread:
    """SyncRankingClient, awaited, so that one test drives either client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.client = SyncRankingClient(*args, **kwargs)

    async def __aenter__(self) -> InThread:
        self.client.__enter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self.client.__exit__, *error)

    async def rank(self, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(self.client.rank, *args, **kwargs)

    async def explain(self, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(self.client.explain, *args, **kwargs)

    async def predict(self, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(self.client.predict, *args, **kwargs)

    async def record_outcomes(self, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(self.client.record_outcomes, *args, **kwargs)

    async def close(self) -> None:
        await asyncio.to_thread(self.client.close)

    def __repr__(self) -> str:
        return repr(self.client)


Make = Callable[..., Any]


@pytest.fixture(params=[RankingClient, InThread], ids=["async", "sync"])
def make(request: pytest.FixtureRequest) -> Make:
    """What makes a client."""
    flavour: Make = request.param
    return flavour


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with FakeRouter() as fake:
        yield fake


@pytest.fixture
async def client(make: Make, router: FakeRouter) -> AsyncIterator[Any]:
    async with make(router.address) as made:
        yield made


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where connections are refused: the port is taken, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for plait.test, of an authority of its own, and its key; the first file also holds the authority's."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    made = authority.issue_cert(SERVER_NAME)
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in (*made.cert_chain_pems, authority.cert_pem)))
    key.write_bytes(made.private_key_pem.bytes())
    return cert, key


# --- questions and answers


async def test_outcomes_are_told_and_the_wrong_ones_named(client: Any, router: FakeRouter) -> None:
    told = [
        Outcome(request_id="r1", type="rate", item="listing-7", value=4.5, at_s=1.25, outcome_id="o", route="home"),
        Outcome(request_id="bad", type="view", item=("shop", 7), entity_type="offer"),
        Outcome(request_id="r2", type="like"),
    ]
    recorded = await client.record_outcomes(told)
    assert recorded == Recorded(accepted=2, duplicates=0, errors=(WrongOutcome(index=1, reason="REQUEST_ID_INVALID", message="bad"),))
    (request,) = router.requests
    first, second, third = request.outcomes
    assert (first.request_id, first.type, first.value, first.event_time.ToNanoseconds()) == ("r1", 7, 4.5, 1_250_000_000)
    assert (first.outcome_id, first.route, first.item.entity_type) == ("o", "home", "item")
    assert [*first.item.ids.string_ids] == ["listing-7"]
    assert (second.item.entity_type, [*second.item.ids.composite_ids[0].parts][1].int64_part) == ("offer", 7)
    assert not third.HasField("item")
    assert abs(third.event_time.ToSeconds() - time.time()) < 60
    with pytest.raises(InvalidArgument, match="expected one of view, like"):
        await client.record_outcomes([Outcome(request_id="r1", type="click")])


@pytest.mark.parametrize(("subject", "items"), [("ann", ["a", "b", "c"]), (-1, [1, 2, 2**63 - 1]), ("ann", [1, 2, 3])])
async def test_rank_asks_and_answers(client: Any, router: FakeRouter, subject: Any, items: list[Any]) -> None:
    ranking = await client.rank("home", subject, items, top_k=2, request_id="r1")

    (request,) = router.requests
    assert (request.route, request.top_k, request.request_id, request.explain) == ("home", 2, "r1", False)
    assert [*request.subject.string_ids, *request.subject.int64_ids] == [subject]
    assert [*request.candidates.string_ids, *request.candidates.int64_ids] == items
    assert ranking == Ranking(
        item_ids=items[:0:-1],
        scores=[2.0, 1.0],
        model="ranker",
        version="7",
        variant="champion",
        request_id="r1",
        degraded_reasons=(),
        tier="full",
        revision=3,
        timings=None,
        feature_report=(),
    )
    assert ranking.items == ((items[2], 2.0), (items[1], 1.0))


async def test_composite_ids_come_and_go_as_tuples(client: Any, router: FakeRouter) -> None:
    ranking = await client.rank("home", ("shop-a", 7), [("shop-a", 1), ("", -1)])
    (request,) = router.requests
    parts = [[part.WhichOneof("part") for part in key.parts] for key in (*request.subject.composite_ids, *request.candidates.composite_ids)]
    assert parts == [["string_part", "int64_part"]] * 3
    assert ranking.item_ids == [("", -1), ("shop-a", 1)]
    assert ranking.items[0] == (("", -1), ranking.scores[0])


@pytest.mark.parametrize("ids", [np.array([5, 6]), range(5, 7), (i for i in (5, 6)), {5: "", 6: ""}, array.array("q", [5, 6])])
async def test_ids_come_in_any_collection(router: FakeRouter, ids: Any) -> None:
    async with RankingClient(router.address) as client:
        assert (await client.rank("home", 1, ids)).item_ids == [6, 5]


async def test_degraded_answers_say_why(client: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.degraded_reasons.extend(["features_stale", "scores_not_finite"])
    assert (await client.rank("home", "ann", ["a"])).degraded_reasons == ("features_stale", "scores_not_finite")


async def test_labels_go_and_assignments_come(client: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.assignments.add(experiment="x", layer="l", variant="v", bucket=7)
    given = (Assignment(experiment="x", layer="l", variant="v", bucket=7),)
    assert (await client.rank("home", "ann", ["a"], labels={"country": "de"})).assignments == given
    assert (await client.predict("home", {}, labels={"country": "at"})).assignments == given
    assert [dict(request.labels) for request in router.requests] == [{"country": "de"}, {"country": "at"}]


async def test_an_explanation_holds_the_ranking_and_how_it_came_to_be(client: Any, router: FakeRouter) -> None:
    told = await client.explain("home", "ann", ["a", "b"], request_id="r1", labels={"country": "de"})
    assert (told.ranking.request_id, told.ranking.item_ids, told.summary) == ("r1", ["b", "a"], "It is so.")
    assert [(rule.rule, rule.matched) for rule in told.rules] == [("staff", False), ("all", True)]
    assert (told.cache, told.not_in, told.stages[0].by_rule) == ("hit", {"v5": "layer"}, {"sold-out": 2})
    assert (told.ages[0].oldest_us, told.tiers[0].reason, told.attempts[0].outcome) == (3_000_000, "answered", "OK")


async def test_explain_adds_timings_and_the_feature_report(client: Any, router: FakeRouter) -> None:
    timings = Timings(total_us=1, resolve_us=2, features_us=3, store_us=4, predict_us=5, queue_us=6, compute_us=7, order_us=8)
    report = FeatureReport(
        feature_view="listing_stats", rows=3, present=2, null=0, defaulted=0, not_found=1, stale=0, timed_out=0, unavailable=0
    )
    ranking = await client.rank("home", "ann", ["a"], explain=True)
    assert (ranking.timings, ranking.feature_report) == (timings, (report,))
    prediction = await client.predict("home", {}, explain=True)
    assert (prediction.timings, prediction.feature_report) == (timings, (report,))


async def test_predict_sends_rows_and_tensors(client: Any, router: FakeRouter) -> None:
    user = np.arange(6, dtype=np.float32).reshape(2, 3)
    prediction = await client.predict(
        "fraud",
        {"payment": [17, 18], "user": ["ann"]},
        inline_features=[Tensor.of("user", user)],
        outputs=["user"],
        request_id="r1",
    )
    (request,) = router.requests
    assert (request.route, list(request.outputs), request.request_id) == ("fraud", ["user"], "r1")
    rows = {row.entity_type: [*row.ids.string_ids, *row.ids.int64_ids] for row in request.entities}
    assert rows == {"payment": [17, 18], "user": ["ann"]}
    np.testing.assert_array_equal(np.asarray(prediction.outputs["user"]), user)
    assert (prediction.model, prediction.version, prediction.variant, prediction.revision) == ("ranker", "7", "champion", 3)
    assert (prediction.request_id, prediction.degraded_reasons, prediction.timings) == ("r1", (), None)


async def test_what_the_feature_set_wants_along_is_sent(client: Any, router: FakeRouter) -> None:
    along = [Tensor.of("hour", np.float32(9)), Tensor.of("km", np.array([1, 2], np.float32))]
    await client.rank("home", "ann", ["a", "b"], request_features=along)
    await client.predict("home", {"user": ["ann"]}, request_features=along)
    for request in router.requests:
        assert [(t.name, list(t.shape), t.data) for t in request.request_features] == [(t.name, list(t.shape), t.data) for t in along]
        assert [t.dtype for t in request.request_features] == [11, 11]


async def test_an_output_of_an_unknown_type_is_no_answer(client: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.outputs.add(name="score", dtype=99)
    with pytest.raises(Internal, match="update plait"):
        await client.predict("home", {})


async def test_each_call_gets_a_request_id(client: Any, router: FakeRouter) -> None:
    rankings = [await client.rank("home", "ann", ["a"]) for _ in range(2)]
    sent = [request.request_id for request in router.requests]
    assert [ranking.request_id for ranking in rankings] == sent
    assert len({uuid.UUID(text) for text in sent}) == 2


async def test_the_api_key_goes_as_a_bearer_token(make: Make, router: FakeRouter) -> None:
    async with make(router.address, api_key=KEY) as client, make(router.address) as stranger:
        await client.rank("home", "ann", ["a"])
        await client.predict("home", {})
        await stranger.rank("home", "ann", ["a"])
    assert [received.metadata.get("authorization") for received in router.received] == [f"Bearer {KEY}"] * 2 + [None]


# --- failures


async def test_a_call_that_a_stopping_server_cancelled_is_tried_again(client: Any, make: Make, router: FakeRouter) -> None:
    router.errors = [Cancelled("the server shuts down")]
    assert (await client.rank("home", "ann", ["a"])).model == "ranker"
    assert len(router.requests) == 2
    router.errors = [Cancelled("the server shuts down")]
    async with make(router.address, retries=0) as once:
        with pytest.raises(Unavailable) as caught:
            await once.rank("home", "ann", ["a"])
    assert caught.value.reason == "CONNECTION_LOST"


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("no such thing", reason="BAD", violations=[Violation("candidates", "is empty"), Violation("top_k", "is negative")]),
        NotFound("no such route", reason="ROUTE_NOT_FOUND", metadata={"route": "home"}),
        FailedPrecondition("the model failed", reason="MODEL_FAILED"),
        Unauthenticated("who are you", reason="API_KEY_MISSING"),
        PermissionDenied("not you", reason="SCOPE_MISSING"),
        ResourceExhausted("too much", reason="OVERLOAD", retry_after_s=0.25),
        DeadlineExceeded("cannot suffice", reason="BUDGET_TOO_SMALL"),
        Internal("oh dear"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_arrive_typed_and_are_not_tried_again(client: Any, router: FakeRouter, error: PlaitError) -> None:
    router.errors = [error]
    with pytest.raises(type(error)) as caught:
        await client.rank("home", "ann", ["a"])
    got = caught.value
    assert (got.message, got.reason, dict(got.metadata)) == (error.message, error.reason, dict(error.metadata))
    assert (got.violations, got.retry_after_s) == (error.violations, error.retry_after_s)
    assert len(router.received) == 1


@pytest.mark.parametrize("method", ["rank", "predict"])
async def test_unavailable_is_tried_again_with_the_same_request_id(client: Any, router: FakeRouter, method: str) -> None:
    router.errors = [Unavailable("away", retry_after_s=0.01), Unavailable("still away")]
    if method == "rank":
        answer = await client.rank("home", "ann", ["a"])
    else:
        answer = await client.predict("home", {})
    assert [request.request_id for request in router.requests] == [answer.request_id] * 3
    assert router.requests[0] == router.requests[2]


@pytest.mark.parametrize("retries", [0, 3])
async def test_tries_are_counted(make: Make, router: FakeRouter, retries: int) -> None:
    router.errors = [Unavailable(f"away {number}", reason="WORKER_AWAY") for number in range(9)]
    async with make(router.address, retries=retries) as client:
        with pytest.raises(Unavailable, match=f"away {retries}") as caught:
            await client.rank("home", "ann", ["a"])
    assert caught.value.reason == "WORKER_AWAY"
    assert len(router.received) == retries + 1


async def test_a_pause_that_does_not_fit_the_budget_is_not_waited_for(client: Any, router: FakeRouter) -> None:
    router.errors = [Unavailable("away", retry_after_s=3600)]
    with pytest.raises(Unavailable) as caught:
        await client.rank("home", "ann", ["a"])
    assert caught.value.retry_after_s == 3600
    assert len(router.received) == 1


async def test_one_budget_bounds_all_tries(make: Make, router: FakeRouter) -> None:
    router.errors = [Unavailable("away") for _ in range(10_000)]
    async with make(router.address, retries=10_000) as client:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.rank("home", "ann", ["a"], timeout_s=0.4)
    assert len(router.received) < 10_000


@pytest.mark.parametrize("options", [{"timeout_s": 0.2}, {}])
async def test_a_slow_router_costs_the_budget_and_no_more(make: Make, router: FakeRouter, options: dict[str, float]) -> None:
    router.gate = asyncio.Event()
    async with make(router.address, timeout_s=60 if options else 0.2) as client:
        with pytest.raises(DeadlineExceeded):
            await client.rank("home", "ann", ["a"], **options)
    assert len(router.received) == 1
    assert router.received[0].left_s < 1


async def test_nobody_there_is_unavailable(make: Make, nobody: str) -> None:
    async with make(nobody, retries=1) as client:
        with pytest.raises(Unavailable, match="connect"):
            await client.rank("home", "ann", ["a"])


async def test_a_router_that_comes_back_is_found_again(make: Make) -> None:
    async with FakeRouter() as first:
        client = make(first.address, retries=1000, timeout_s=60)
        await client.rank("home", "ann", ["a"])
    async with client:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.rank("home", "ann", ["a"], timeout_s=0.2)
        async with FakeRouter(port=first.port) as second:
            await client.rank("home", "ann", ["a"])
    assert (len(first.received), len(second.received)) == (1, 1)


async def test_a_message_over_the_limit_is_refused_here(make: Make, router: FakeRouter) -> None:
    async with make(router.address, max_message_bytes=1000) as client:
        with pytest.raises(ResourceExhausted):
            await client.rank("home", "ann", ["a" * 1000])
    assert router.received == []


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"candidates": ["a", 1]}, "candidates"),
    ({"candidates": [1, "a"]}, "candidates"),
    ({"candidates": ["a", None]}, "candidates"),
    ({"candidates": [1.5]}, "candidates"),
    ({"candidates": [2**63]}, "candidates"),
    ({"candidates": ["\ud800"]}, "candidates"),
    ({"candidates": "abc"}, "candidates"),
    ({"candidates": [("a", 1.5)]}, "candidates"),
    ({"candidates": [("a", None)]}, "candidates"),
    ({"candidates": [("a", True)]}, "candidates"),
    ({"candidates": [("a", 1), "a"]}, "candidates"),
    ({"subject": ("a", 2**63)}, "subject"),
    ({"candidates": 7}, "candidates"),
    ({"subject": None}, "subject"),
    ({"subject": True}, "subject"),
    ({"subject": [1]}, "subject"),
    ({"route": 7}, "cannot be sent"),
    ({"top_k": 2**31}, "cannot be sent"),
    ({"inline_features": [Tensor("x", "complex64", (1,), b"12345678")]}, "complex64"),
    ({"request_features": [Tensor("x", "complex64", (1,), b"12345678")]}, "complex64"),
    ({"timeout_s": -1}, "timeout_s"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"timeout_s": float("nan")}, "timeout_s"),
    ({"timeout_s": float("inf")}, "timeout_s"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD_CALLS, ids=[repr(wrong).encode("ascii", "replace").decode() for wrong, _ in BAD_CALLS])
async def test_what_cannot_be_sent_is_refused_here(client: Any, router: FakeRouter, wrong: dict[str, Any], says: str) -> None:
    call = {"route": "home", "subject": "ann", "candidates": ["a"], **wrong}
    with pytest.raises(InvalidArgument, match=says):
        await client.rank(**call)
    assert router.received == []
    assert repr(client).endswith("in_flight=0>")


async def test_rows_that_cannot_be_sent_are_named(client: Any, router: FakeRouter) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.predict("home", {"listing": ["a"], "payment": [1, "a"]})
    assert [violation.field for violation in caught.value.violations] == ["entities['payment']"]
    assert router.received == []


# --- its life


async def test_repr_says_where_and_how_much(make: Make, router: FakeRouter) -> None:
    router.gate = asyncio.Event()
    async with make(router.address, api_key=KEY) as client:
        assert repr(client).endswith(f"RankingClient {router.address} plaintext in_flight=0>")
        call = asyncio.create_task(client.rank("home", "ann", ["a"]))
        await router.started.wait()
        assert repr(client).endswith("in_flight=1>")
        router.gate.set()
        await call
        assert repr(client).endswith("in_flight=0>")
        assert KEY not in repr(client)


async def test_a_closed_client_refuses_calls(make: Make, router: FakeRouter) -> None:
    used, unused = make(router.address), make(router.address)
    await used.rank("home", "ann", ["a"])
    for client in (used, unused):
        await client.close()
        await client.close()
        with pytest.raises(FailedPrecondition) as caught:
            await client.rank("home", "ann", ["a"])
        assert caught.value.reason == "CLIENT_CLOSED"
    assert len(router.received) == 1


async def test_closing_ends_calls_under_way(make: Make, router: FakeRouter) -> None:
    router.gate = asyncio.Event()
    client = make(router.address)
    call = asyncio.create_task(client.rank("home", "ann", ["a"]))
    await router.started.wait()
    await client.close()
    with pytest.raises(Cancelled) as caught:
        await call
    assert caught.value.reason == "CLIENT_CLOSED"
    assert not call.cancelled()
    assert repr(client).endswith("in_flight=0>")


async def test_closing_ends_pauses_between_tries(make: Make, router: FakeRouter) -> None:
    router.errors = [Unavailable("away", retry_after_s=0.3)]
    client = make(router.address)
    call = asyncio.create_task(client.rank("home", "ann", ["a"]))
    await router.started.wait()
    await client.close()
    with pytest.raises((Cancelled, FailedPrecondition)) as caught:
        await call
    assert caught.value.reason == "CLIENT_CLOSED"
    assert len(router.received) == 1


async def test_who_is_cancelled_stays_cancelled(router: FakeRouter) -> None:
    router.gate = asyncio.Event()
    async with RankingClient(router.address) as client:
        call = asyncio.create_task(client.rank("home", "ann", ["a"]))
        await router.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert repr(client).endswith("in_flight=0>")


async def test_many_callers_share_one_client(client: Any, router: FakeRouter) -> None:
    rankings = await asyncio.gather(*(client.rank("home", number, range(number + 1)) for number in range(32)))
    assert [ranking.item_ids[0] for ranking in rankings] == list(range(32))
    assert repr(client).endswith("in_flight=0>")


async def test_it_runs_under_uvloop(router: FakeRouter) -> None:
    program = """
import sys, uvloop
from plait.client import RankingClient
from plait.errors import NotFound
async def main():
    async with RankingClient(sys.argv[1]) as client:
        print((await client.rank("home", 1, [1, 2, 3])).item_ids)
        try:
            await client.rank("home", 1, [1])
        except NotFound as error:
            print(error.reason)
uvloop.run(main())
"""
    router.errors = [Unavailable("away"), None, NotFound("no route", reason="ROUTE_NOT_FOUND")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, router.address, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert (out.decode().splitlines(), err.decode()) == (["[3, 2, 1]", "ROUTE_NOT_FOUND"], "")


def test_importing_it_brings_neither_stubs_nor_frameworks() -> None:
    program = "import sys, plait.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "plait.client" in loaded
    forbidden = ("numpy", "pydantic", "structlog", "opentelemetry", "yaml", "rich", "typer", "redis", "asyncpg", "torch")
    assert {name for name in loaded if name.split(".")[0] in forbidden} == set()
    ours = {
        name
        for name in loaded
        if name.startswith("plait.") and not name.startswith(("plait.api.router", "plait.api.types", "plait.api.events"))
    }
    assert ours == {"plait.api", "plait.client", "plait.dtypes", "plait.errors"}


# --- security


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"address": ""}, "host:port"),
        ({"address": "https://rank.internal:443"}, "without http://"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"retries": -1}, "retries"),
        ({"max_message_bytes": 0}, "max_message_bytes"),
        ({"address": "rank.internal:80"}, "plain text"),
        ({"api_key": f"{KEY}\n"}, "line feed"),
        ({"api_key": "ключ"}, "cannot be sent"),
        ({"tls": True, "insecure": True}, "not both"),
        ({"tls": TlsConfig(cert=b"x")}, "both cert and key"),
        ({"tls": TlsConfig(root_ca="missing/ca.pem")}, "missing/ca.pem"),
    ],
    ids=repr,
)
def test_a_client_that_cannot_work_is_not_made(make: Make, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        make(**{"address": "localhost:1", "api_key": KEY, **options})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("options", [{"insecure": True}, {"tls": True}, {"api_key": ""}])
def test_a_key_leaves_the_machine_only_if_it_may(make: Make, options: dict[str, Any]) -> None:
    client = make("rank.internal:443", **{"api_key": KEY, **options})
    assert KEY not in repr(client)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("localhost:1", True),
        ("localhost", True),
        ("router.localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("dns:localhost:1", True),
        ("dns:///localhost:1", True),
        ("dns://8.8.8.8/localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/plait.sock", True),
        ("rank.internal:1", False),
        ("dns:///rank.internal:1", False),
        ("dns://localhost/rank.internal:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("[2001:db8::1]:1", False),
        ("localhost.evil.example:1", False),
        ("127.0.0.1.evil.example:1", False),
        ("xds:///localhost", False),
    ],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert client_module._is_loopback(address) is loopback


async def test_what_stays_on_the_machine_takes_no_proxy(
    make: Make, router: FakeRouter, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", f"http://{nobody}")
    async with make(router.address, api_key=KEY) as client:
        await client.rank("home", "ann", ["a"])


async def test_tls_by_path_and_by_bytes(make: Make, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    async with FakeRouter(credentials=credentials) as router:
        for root_ca in (cert, str(cert), cert.read_bytes()):
            async with make(router.address, api_key=KEY, tls=TlsConfig(root_ca=root_ca, server_name=SERVER_NAME)) as client:
                await client.rank("home", "ann", ["a"])
                assert " tls " in repr(client)
        for tls in (True, TlsConfig(root_ca=cert), None):  # an unknown root, a wrong name, no TLS at all
            async with make(router.address, api_key=KEY, tls=tls, retries=0) as client:
                with pytest.raises(Unavailable):
                    await client.rank("home", "ann", ["a"])
    assert [received.metadata["authorization"] for received in router.received] == [f"Bearer {KEY}"] * 3


async def test_mutual_tls(make: Make, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    pair = (key.read_bytes(), cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], root_certificates=cert.read_bytes(), require_client_auth=True)
    async with FakeRouter(credentials=credentials) as router:
        known = TlsConfig(root_ca=cert, cert=cert, key=key.read_bytes(), server_name=SERVER_NAME)
        async with make(router.address, tls=known) as client:
            await client.rank("home", "ann", ["a"])
        async with make(router.address, tls=TlsConfig(root_ca=cert, server_name=SERVER_NAME), retries=0) as stranger:
            with pytest.raises(Unavailable):
                await stranger.rank("home", "ann", ["a"])
    assert len(router.received) == 1
    assert "PRIVATE" not in repr(known)


# --- pure parts


@given(failed=st.integers(1, 1000), retry_after_s=st.none() | st.floats(0, 100), chance=st.floats(0, 1, exclude_max=True))
def test_the_pause_is_what_the_server_asks_and_bounded_jitter(failed: int, retry_after_s: float | None, chance: float) -> None:
    pause = backoff_s(failed, retry_after_s, chance)
    assert (retry_after_s or 0.0) <= pause <= (retry_after_s or 0.0) + min(1.0, 0.05 * 2.0 ** (failed - 1))
    assert backoff_s(failed, retry_after_s, 0.0) == (retry_after_s or 0.0)


def test_ceilings_double_up_to_a_second() -> None:
    assert [backoff_s(failed, None, 1.0) for failed in range(1, 8)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_tries_spend_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(client_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(client_module, "random", types.SimpleNamespace(random=lambda: 0.0))
    tries = client_module._Tries(10.0, retries=5)
    asked = Unavailable("away", retry_after_s=4.0)
    assert (tries.left_s(), tries.pause_s(asked)) == (10.0, 4.0)
    now[0] += 4.0
    assert (tries.left_s(), tries.pause_s(asked)) == (6.0, 4.0)
    now[0] += 4.0
    assert (tries.left_s(), tries.pause_s(asked)) == (2.0, None)
    now[0] += 4.0
    assert tries.left_s() == 0.0


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)])
def test_tensors_meet_numpy_without_a_copy(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.ones(shape, dtype)
    tensor = Tensor.of("x", values)
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.data) == ("x", dtype, shape, values.tobytes())
    back = np.asarray(tensor)
    np.testing.assert_array_equal(back, values)
    assert back.dtype == values.dtype
    assert not back.flags.writeable
    assert client_module._tensor(client_module._tensor_message(tensor)) == tensor


def test_tensors_are_packed_row_by_row() -> None:
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert Tensor.of("x", values.T).data == values.T.tobytes()
    assert Tensor.of("x", values[:, ::2]).data == np.ascontiguousarray(values[:, ::2]).tobytes()
    assert Tensor.of("x", array.array("d", [1.0, 2.0])) == Tensor("x", "float64", (2,), np.array([1.0, 2.0]).tobytes())


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0], 1.0, "text", np.ones(2, ">f4"), np.array(["a"]), np.array([object()]), np.ones(1, "complex64"), np.ones(1, "M8[s]")],
)
def test_what_is_no_tensor_is_refused(values: Any) -> None:
    with pytest.raises(InvalidArgument, match="tensor 'x'"):
        Tensor.of("x", values)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)])
def test_bfloat16_goes_in_and_out_with_ml_dtypes(shape: tuple[int, ...]) -> None:
    values = np.full(shape, -1.5, ml_dtypes.bfloat16)
    tensor = Tensor.of("x", values)
    assert (tensor.dtype, tensor.shape, tensor.data) == ("bfloat16", shape, values.tobytes())
    np.testing.assert_array_equal(np.asarray(tensor).view(ml_dtypes.bfloat16), values)


async def test_an_output_of_bfloat16_is_never_taken_for_numbers(client: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.outputs.add(name="score", dtype=14, shape=[2], data=b"\x80\x3f\x20\xc0")
    score = (await client.predict("home", {})).outputs["score"]
    assert score == Tensor("score", "bfloat16", (2,), b"\x80\x3f\x20\xc0")
    bits = np.asarray(score)
    assert (bits.dtype, bits.shape, bits.flags.writeable) == (np.dtype("V2"), (2,), False)
    with pytest.raises(TypeError):
        bits + 1
    with pytest.raises(ValueError, match="setting an array element"):
        np.asarray(score, np.float32)
    assert bits.view(ml_dtypes.bfloat16).tolist() == [1.0, -2.5]


def test_bfloat16_needs_nothing_but_numpy_to_be_an_array() -> None:
    script = (
        "import sys, numpy; from plait.client import Tensor; tensor = Tensor('x', 'bfloat16', (1,), bytes((0x80, 0x3f)));"
        "print(numpy.asarray(tensor).dtype.str, numpy.asarray(tensor).tobytes().hex(), 'ml_dtypes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["|V2", "803f", "False"]


def test_tensors_of_texts_are_bytes_and_no_array() -> None:
    tensor = client_module._tensor(types_pb2.Tensor(name="titles", dtype=types_pb2.DATA_TYPE_BYTES, shape=[1], data=b"\1\0\0\0a"))
    assert (tensor.dtype, tensor.data) == ("bytes", b"\1\0\0\0a")
    with pytest.raises(TypeError, match="variable length"):
        np.asarray(tensor)
