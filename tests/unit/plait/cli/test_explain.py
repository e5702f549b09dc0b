"""`plait explain` against a router that speaks the real wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.fakes.router import FakeRouter
from typer.testing import Result

from plait.errors import NotFound

Plait = Callable[..., Result]
HOME = ("explain", "--route", "home", "--user", "ann", "--items", "a,b", "--label", "country=de")


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with FakeRouter() as fake:
        yield fake


@pytest.fixture
def ask(plait: Plait, router: FakeRouter) -> Any:
    """Run the command while the router's loop goes on."""

    async def run(*words: object) -> Result:
        return await asyncio.to_thread(plait, *words, "--address", router.address)

    return run


async def test_the_story_as_a_tree(ask: Any, router: FakeRouter) -> None:
    result = await ask(*HOME)
    assert result.exit_code == 0
    [received] = router.requests
    lines = result.stdout.splitlines()
    assert lines[0] == "It is so."
    assert lines[1:] == [
        "answer",
        f"├─ variant champion, ranker version 7, tier full, request {received.request_id}",
        "├─ 1. b  1.000000",
        "└─ 2. a  0.000000",
        "rules",
        "├─ staff: headers.x-staff does not hold",
        "└─ all: matched",
        "experiments",
        "├─ in v4 (layer ranking, bucket 7): champion",
        "└─ not in v5: its bucket is not one of the experiment's, or an experiment before it decided",
        "cache",
        "└─ would have been a hit",
        "features",
        "├─ listing_stats version 2: median 1.5 s old, oldest 3 s",
        "└─ user_stats version 1: no row",
        "tiers",
        "└─ full: answered (250 ms left, 5 ms expected)",
        "stages",
        "└─ filter: 5 → 3 in 0.04 ms (sold-out 2)",
        "calls",
        "└─ model at 10.0.0.7:1 (first): OK in 1.23 ms",
    ]
    assert dict(received.labels) == {"country": "de"}


async def test_what_is_not_there_has_no_heading(ask: Any, router: FakeRouter) -> None:
    def bare(told: Any) -> None:
        for name in ("rules", "ages", "tiers", "stages", "attempts", "not_in", "cache_would_be"):
            if hasattr(told, "rank"):
                told.ClearField(name)
                told.rank.ClearField("assignments")

    router.change = bare
    lines = (await ask(*HOME)).stdout.splitlines()
    assert [line for line in lines[1:] if line[0] not in "├└"] == ["answer"]


async def test_the_story_as_json(ask: Any) -> None:
    document = json.loads((await ask(*HOME, "--json")).stdout)
    assert document["answer"]["assignments"] == [{"experiment": "v4", "layer": "ranking", "variant": "champion", "bucket": 7}]
    assert document["stages"][0]["by_rule"] == {"sold-out": 2}
    assert (document["cache_would_be"], document["not_in"]) == ("hit", {"v5": "layer"})


async def test_a_refusal_is_told(ask: Any, router: FakeRouter) -> None:
    router.errors = [NotFound("no route", reason="ROUTE_NOT_FOUND")]
    result = await ask(*HOME)
    assert (result.exit_code, "no route" in result.stderr) == (1, True)
