"""`plait cache` against a router that speaks the real wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.fakes.router import FakeRouter
from typer.testing import Result

from plait.errors import Unavailable

Plait = Callable[..., Result]


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with FakeRouter() as fake:
        yield fake


@pytest.fixture
def ask(plait: Plait, router: FakeRouter) -> Any:
    """Run the command while the router's loop goes on."""

    async def run(*words: object) -> Result:
        return await asyncio.to_thread(plait, "cache", "invalidate", *words, "--address", router.address)

    return run


async def test_items_go_by_their_type(ask: Any, router: FakeRouter) -> None:
    result = await ask("--item", "item:7", "-i", "user:ann", "-i", "item:a:b", "--route", "home")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "forgotten" in result.stderr
    first, *rest = router.requests
    assert (first.route, first.model, first.HasField("items")) == ("home", "", False)
    assert [(r.items.entity_type, list(r.items.ids.string_ids)) for r in rest] == [("item", ["7", "a:b"]), ("user", ["ann"])]


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (("-i", "item:7", "--int-ids"), "int64_ids", [7]),
        (("-i", "item:shop/int:7", "--parts"), "composite_ids", None),
        (("--model", "ranker"), "string_ids", []),
    ],
)
async def test_kinds_of_ids(ask: Any, router: FakeRouter, words: tuple[str, ...], kind: str, expected: list[Any] | None) -> None:
    assert (await ask(*words)).exit_code == 0
    (request,) = router.requests
    found = getattr(request.items.ids, kind)
    if expected is None:
        assert [(part.string_part, part.int64_part) for part in found[0].parts] == [("shop", 0), ("", 7)]
    else:
        assert list(found) == expected


@pytest.mark.parametrize("words", [(), ("-i", "7"), ("-i", "item:"), ("-i", "item:x", "--int-ids")])
async def test_what_cannot_be_meant_is_wrong_usage(ask: Any, router: FakeRouter, words: tuple[str, ...]) -> None:
    assert (await ask(*words)).exit_code == 2
    assert not router.requests


async def test_a_router_that_could_not_tell_the_others_is_a_failure(ask: Any, router: FakeRouter) -> None:
    router.errors = [Unavailable("the others could not be told: retry", reason="INVALIDATION_NOT_SHARED")] * 3
    result = await ask("--route", "home")
    assert result.exit_code == 1
    assert "INVALIDATION_NOT_SHARED" in result.stderr
