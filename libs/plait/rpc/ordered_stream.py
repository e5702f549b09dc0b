"""Many requests of one stream computed side by side and answered in the order they came, one task each.

Triton answers a stream in order unless a model is decoupled, and its clients depend on it: what their callbacks get of a failed request
holds no id. So an answer waits for those before it, and at most `max_in_flight` requests are held at once: beyond that the client is held
back by HTTP/2's flow control, not refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final

_END: Final = None


async def answers(
    requests: AsyncIterator[Any], answer: Callable[[Any], Awaitable[Any]], *, max_in_flight: int
) -> AsyncGenerator[Any, None]:
    """Yield `await answer(request)` for each request, in order. What `requests` raises is raised after the answers before it.

    Closing the iterator cancels what is under way.
    """
    room = asyncio.Semaphore(max_in_flight)
    held: asyncio.Queue[asyncio.Future[Any] | None] = asyncio.Queue()
    tasks: set[asyncio.Future[Any]] = set()

    async def read() -> None:
        try:
            async for request in requests:
                await room.acquire()
                task = asyncio.ensure_future(answer(request))
                tasks.add(task)
                held.put_nowait(task)
        finally:
            held.put_nowait(_END)

    reader = asyncio.create_task(read(), name="read stream")
    try:
        while (task := await held.get()) is not _END:
            yield await task
            tasks.discard(task)
            room.release()
        await reader
    finally:
        left = (reader, *tasks)
        for unfinished in left:
            unfinished.cancel()
        await asyncio.gather(*left, return_exceptions=True)
