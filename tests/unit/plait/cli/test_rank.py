"""`plait rank` against a router that speaks the real wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.router import FakeRouter
from typer.testing import Result

from plait.api.router.v1 import explanation_pb2
from plait.errors import InvalidArgument, NotFound, Violation
from plait.local.endpoints import Endpoints

Plait = Callable[..., Result]
HOME = ("rank", "--route", "home", "--user", "ann", "--items", "a, b,,c")


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with FakeRouter() as fake:
        yield fake


@pytest.fixture
def ask(plait: Plait, router: FakeRouter) -> Any:
    """Run the command while the router's loop goes on."""

    async def run(*words: object, **options: Any) -> Result:
        return await asyncio.to_thread(plait, *words, "--address", router.address, **options)

    return run


async def test_the_answer_as_json(ask: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.degraded_reasons.append("features_stale")
    result = await ask(*HOME, "--top-k", "2", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (request,) = router.requests
    assert (request.route, list(request.subject.string_ids), list(request.candidates.string_ids)) == ("home", ["ann"], ["a", "b", "c"])
    assert json.loads(result.stdout) == {
        "items": [{"id": "c", "score": 2.0}, {"id": "b", "score": 1.0}],
        "model": "ranker",
        "model_version": "7",
        "variant": "champion",
        "tier": "full",
        "degraded_reasons": ["features_stale"],
        "request_id": request.request_id,
        "registry_revision": 3,
        "assignments": [],
    }


async def test_labels_are_sent(ask: Any, router: FakeRouter) -> None:
    assert (await ask(*HOME, "--label", "country=de", "-l", "note=a=b")).exit_code == 0
    assert dict(router.requests[0].labels) == {"country": "de", "note": "a=b"}
    assert "NAME=VALUE" in (await ask(*HOME, "--label", "country")).stderr


async def test_the_answer_as_a_table(ask: Any, router: FakeRouter) -> None:
    router.change = lambda answer: answer.degraded_reasons.append("features_stale")
    result = await ask(*HOME, "--explain")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[:4] == [["RANK", "ITEM", "SCORE"], ["1", "c", "2.000000"], ["2", "b", "1.000000"], ["3", "a", "0.000000"]]
    assert f"ranker version 7, variant champion, request {router.requests[0].request_id}" in result.stdout
    assert "degraded: features_stale" in result.stdout
    assert ["features", "0.003"] in lines
    assert ["listing_stats", "3", "2", "0", "0", "1", "0", "0", "0"] in lines


async def test_keys_of_several_parts_are_asked_and_shown(ask: Any, router: FakeRouter) -> None:
    result = await ask(*HOME[:-1], "shop-a/int:7,/int:-8,plain/part", "--parts")
    (request,) = router.requests
    assert list(request.subject.string_ids) == ["ann"]
    parts = [
        [part.string_part if part.HasField("string_part") else part.int64_part for part in key.parts]
        for key in request.candidates.composite_ids
    ]
    assert parts == [["shop-a", 7], ["", -8], ["plain", "part"]]
    items = [line.split()[1] for line in result.stdout.splitlines()[1:4]]
    assert items == ["plain/part", "/int:-8", "shop-a/int:7"]
    document = json.loads((await ask(*HOME[:-1], "shop-a/int:7", "--parts", "--json")).stdout)
    assert document["items"][0]["id"] == ["shop-a", 7]


async def test_explain_goes_into_json_too(ask: Any, router: FakeRouter) -> None:
    document = json.loads((await ask(*HOME, "--explain", "--json")).stdout)
    assert (document["timings"]["total_us"], document["timings"]["order_us"]) == (1, 8)
    assert document["feature_report"][0]["feature_view"] == "listing_stats"
    assert document["feature_report"][0]["stale"] == 0


async def test_ids_may_be_numbers(ask: Any, router: FakeRouter) -> None:
    result = await ask("rank", "-r", "home", "-u", "42", "-i", "7,8", "--int-ids", "--json")
    assert [item["id"] for item in json.loads(result.stdout)["items"]] == [8, 7]
    assert list(router.requests[0].subject.int64_ids) == [42]


async def test_the_key_comes_from_the_environment(ask: Any, router: FakeRouter) -> None:
    await ask(*HOME, env={"PLAIT_API_KEY": "plait_k"})
    await ask(*HOME)
    assert [received.metadata.get("authorization") for received in router.received] == ["Bearer plait_k", None]


async def test_the_local_mesh_is_found_by_its_state_folder(plait: Plait, router: FakeRouter) -> None:
    Endpoints(
        router=router.address, feature_retrieval="", model_worker="", postgres_dsn="", redis_url="", api_key="plait_local", service_token=""
    ).write(Path.cwd())
    for options in (("--state", "."), ("--state", ".", "--api-key", "plait_other")):
        assert (await asyncio.to_thread(plait, *HOME, *options)).exit_code == 0
    keys = [received.metadata["authorization"] for received in router.received]
    assert keys == ["Bearer plait_local", "Bearer plait_other"]


async def test_errors_of_the_router_are_told(ask: Any, router: FakeRouter) -> None:
    router.errors = [
        NotFound("there is no route home", reason="ROUTE_NOT_FOUND"),
        InvalidArgument("wrong", reason="BAD", violations=[Violation("candidates", "holds a twice")]),
    ]
    result = await ask(*HOME)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: there is no route home  [ROUTE_NOT_FOUND]\n")
    assert (await ask(*HOME, "--json")).stderr == "error: wrong  [BAD]\n  candidates: holds a twice\n"


async def test_a_slow_router_is_given_up(ask: Any, router: FakeRouter) -> None:
    router.gate = asyncio.Event()
    result = await ask(*HOME, "--timeout", "0.2")
    assert result.exit_code == 1
    assert "[DEADLINE_EXCEEDED]" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((*HOME,), 1, "plait up --state .state; or give --address and PLAIT_API_KEY  [MESH_NOT_RUNNING]"),
        ((*HOME, "--items", " , "), 2, "give at least one id"),
        ((*HOME, "--int-ids"), 2, "--int-ids needs whole numbers"),
        ((*HOME, "--items", "shop/int:x", "--parts"), 2, "a whole number after int:"),
        ((*HOME, "--top-k", "-1"), 2, "--top-k"),
        ((*HOME, "--timeout", "0"), 2, "--timeout"),
        ((*HOME, "--address", "rank.internal:80", "--api-key", "plait_k"), 1, "[API_KEY_EXPOSED]"),
        ((*HOME, "--address", "https://rank.internal"), 1, "give host:port"),
        ((*HOME, "--address", "localhost:1", "--ca", "no.pem"), 1, "no.pem cannot be read"),
        ((*HOME, "--address", "localhost:1", "--tls", "--insecure"), 1, "not both"),
    ],
)
def test_what_cannot_be_asked_says_what_to_do(plait: Plait, words: tuple[str, ...], code: int, says: str) -> None:
    result = plait(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert "plait_k" not in result.stderr


def test_a_router_that_is_not_there_is_told(plait: Plait) -> None:
    result = plait(*HOME, "--address", "unix:nobody.sock", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[UNAVAILABLE]" in result.stderr


async def test_it_says_what_came_from_the_cache(ask: Any, router: FakeRouter) -> None:
    def kept(answer: Any) -> None:
        answer.cache = explanation_pb2.CACHE_STATUS_STALE
        answer.age_us = 6_500_000

    router.change = kept
    assert "from the cache (stale), 6.5 s old" in (await ask(*HOME)).stdout
    document = json.loads((await ask(*HOME, "--json")).stdout)
    assert (document["cache"], document["age_s"]) == ("stale", 6.5)
