"""Sees to it that Redis knows every erasure before it takes a write: a Redis that was lost, or an older replica, has forgotten some.

Each primary holds the number of the last erasure whose mark it has, at `m1`. Where that is missing or behind, all later erasures are
applied again from Postgres first. While Postgres is away a Redis that lost them takes no writes; reads go on, because what is in it was
written under its marks.
"""

from __future__ import annotations

import asyncio
from typing import Final

from feature_retrieval.erasing import Registry, remove
from feature_retrieval.store.redis import RedisStore
from plait.errors import PlaitError, Unavailable
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

LOADED_KEY: Final = b"m1"
_PAGE: Final = 200
_RETRY_AFTER_S: Final = 1.0


class ErasureGuard:
    """`await loaded()` before every write; `run()` completes what others left half done, every `poll_s` seconds."""

    def __init__(self, store: RedisStore, registry: Registry, *, poll_s: float = 30.0) -> None:
        self._store = store
        self._registry = registry
        self._poll_s = poll_s
        self._known = 0  # the highest number this process saw applied: a Redis that says less has lost some
        self._loading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ErasureGuard loaded={self._known} loading={self._loading is not None}>"

    async def loaded(self) -> None:
        """Return once Redis knows every erasure that this process knows of. Raises Unavailable (ERASURES_NOT_LOADED, STORE_UNAVAILABLE)."""
        there = await self._there()
        if there is not None and there >= self._known:
            self._known = there
            return
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self.catch_up(), name="load erasures")
            self._loading.add_done_callback(_seen)
        await asyncio.shield(self._loading)  # shared: a caller that leaves does not end it for the others

    async def catch_up(self) -> None:
        """Apply every erasure that Redis does not know, oldest first. Raises Unavailable."""
        try:
            position = await self._there()
            if position is None or position < self._known:
                log.info("redis does not know every erasure: loading them before it takes writes", known=self._known, there=position)
                position = 0
            while erasures := await self._registry.erasures_after(position, _PAGE):
                await remove(self._store, self._registry, erasures)
                position = erasures[-1].id
        except PlaitError as error:
            if error.reason.startswith("REGISTRY_"):
                raise Unavailable(
                    "Redis does not know every erasure and Postgres, which does, cannot be asked: bring the registry's Postgres back, and writes are taken again",
                    reason="ERASURES_NOT_LOADED",
                    retry_after_s=_RETRY_AFTER_S,
                ) from error
            raise
        await self._store.note(LOADED_KEY, b"%d" % position)
        self._known = max(self._known, position)

    async def run(self) -> None:
        """Complete, now and then, what a process left half done that died during an erasure. Runs until cancelled."""
        while True:
            try:
                await self.catch_up()
            except PlaitError as error:
                log.info("erasures cannot be completed now", reason=error.reason)
            await asyncio.sleep(self._poll_s)

    async def _there(self) -> int | None:
        """Return up to which number every primary knows them, None where one knows nothing."""
        notes = await self._store.notes(LOADED_KEY)
        return None if None in notes else min(int(note) for note in notes if note is not None)


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # everybody who waited may have left
