"""`plait outcome record` against a router that speaks the real wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.fakes.router import FakeRouter
from typer.testing import Result

Plait = Callable[..., Result]


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with FakeRouter() as fake:
        yield fake


async def run(plait: Plait, router: FakeRouter, *words: str) -> Result:
    return await asyncio.to_thread(plait, "outcome", "record", "--address", router.address, *words)


async def test_one_is_told(plait: Plait, router: FakeRouter) -> None:
    result = await run(plait, router, "--request", "r1", "--item", "7", "--int-ids", "--type", "rate", "--value", "4.5", "--id", "o")
    assert (result.exit_code, result.stdout) == (0, "counted\n"), result.output
    (request,) = router.requests
    (outcome,) = request.outcomes
    assert [*outcome.item.ids.int64_ids] == [7]
    assert (outcome.request_id, outcome.value, outcome.outcome_id) == ("r1", 4.5, "o")
    told: Any = json.loads((await run(plait, router, "--request", "r1", "--json")).stdout)
    assert told == {"accepted": 1, "duplicates": 0, "errors": []}


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--request", "bad"), 1, "REQUEST_ID_INVALID"),
        (("--request", "r1", "--type", "click"), 1, "expected one of view, like"),
        (("--request", "r1", "--item", "seven", "--int-ids"), 2, "whole number"),
    ],
)
async def test_what_is_wrong_is_told(plait: Plait, router: FakeRouter, words: tuple[str, ...], status: int, told: str) -> None:
    result = await run(plait, router, *words)
    assert result.exit_code == status
    assert told in result.output
