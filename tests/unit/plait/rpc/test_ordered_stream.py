"""A stream's answers: in order, side by side, bounded, and cancelled with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from tests.fakes.registry_world import eventually

from plait.rpc.ordered_stream import answers


class Work:
    """Answers request n with -n once told to finish it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self._done: dict[int, asyncio.Event] = {}

    async def answer(self, request: int) -> int:
        self.begun.append(request)
        try:
            await self._done.setdefault(request, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        return -request

    def finish(self, *requests: int) -> None:
        for request in requests:
            self._done.setdefault(request, asyncio.Event()).set()


async def asked(*requests: int, error: Exception | None = None) -> AsyncIterator[int]:
    for request in requests:
        yield request
    if error is not None:
        raise error


async def test_requests_run_side_by_side_and_are_answered_in_order() -> None:
    work = Work()
    found = answers(asked(1, 2, 3), work.answer, max_in_flight=8)
    first: asyncio.Task[Any] = asyncio.ensure_future(anext(found))  # type: ignore[arg-type]
    await eventually(lambda: work.begun == [1, 2, 3])
    work.finish(3, 2)
    await asyncio.sleep(0)
    assert not first.done()
    work.finish(1)
    assert [await first, *[answer async for answer in found]] == [-1, -2, -3]


async def test_no_more_are_under_way_than_allowed() -> None:
    work = Work()
    found = answers(asked(1, 2, 3, 4), work.answer, max_in_flight=2)
    first: asyncio.Task[Any] = asyncio.ensure_future(anext(found))  # type: ignore[arg-type]
    await eventually(lambda: work.begun == [1, 2])
    work.finish(1, 2, 3, 4)
    assert await first == -1
    assert work.begun == [1, 2]
    assert [answer async for answer in found] == [-2, -3, -4]


async def test_what_was_asked_before_a_fault_of_the_stream_is_answered() -> None:
    work = Work()
    work.finish(1, 2)
    found = answers(asked(1, 2, error=ValueError("broken")), work.answer, max_in_flight=2)
    assert [await anext(found), await anext(found)] == [-1, -2]
    with pytest.raises(ValueError, match="broken"):
        await anext(found)


@pytest.mark.parametrize("max_in_flight", [1, 8])
async def test_closing_cancels_what_is_under_way(max_in_flight: int) -> None:
    work = Work()
    work.finish(1)
    async with aclosing(answers(asked(1, 2, 3), work.answer, max_in_flight=max_in_flight)) as found:
        assert await anext(found) == -1
        await eventually(lambda: work.begun[-1] == (3 if max_in_flight > 1 else 1))
    assert sorted(work.cancelled) == ([2, 3] if max_in_flight > 1 else [])
