"""The loop that applies events: read, apply, make safe, acknowledge; whatever fails is tried again, and nothing is acknowledged before it is safe."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Final, Protocol

from opentelemetry.trace import Span, SpanKind

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.freshness import Freshness
from feature_retrieval.publishing import Settling
from feature_retrieval.sources import EventSource, Message
from plait.errors import PlaitError, Unavailable
from plait.redis.dispatch import Receipt
from plait.telemetry.logging import get_logger, without_words
from plait.telemetry.tracing import Tracing, off

log = get_logger(__name__)

_READ_S: Final = 1.0  # longest wait for events, after which new tenants and dead consumers are looked for
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0
# Events that are applied but not yet safe, before more are read: with an append-only file that is synced every second each waits for up to that,
# and those that come meanwhile must not.
_UNSAFE: Final = 50_000
_SAMPLED: Final = tuple("13579bdf")  # the last digit of a W3C traceparent, where its trace is recorded
_MAX_SPANS: Final = 32  # per batch


class Consumer:
    """Applies what one source delivers, batch after batch."""

    def __init__(
        self,
        source: EventSource,
        applying: Applying,
        acknowledging: Settling,
        freshness: Freshness,
        *,
        batch: int = 2000,
        tracing: Tracing | None = None,
    ) -> None:
        self._source = source
        self._applying = applying
        self._acknowledging = acknowledging
        self._freshness = freshness
        self._batch = batch
        self._tracing = tracing or off()
        self._finishing: dict[asyncio.Task[None], int] = {}  # how many events each acknowledges
        self._stopping = False
        self._idle = asyncio.Event()  # nothing is read any more, and all that was is acknowledged
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Consumer {self._source!r} unsafe={len(self._finishing)}>"

    async def run(self) -> None:
        """Consume until cancelled. What is then not acknowledged is delivered again, to whoever comes next."""
        pause = _Pause()
        self._idle.clear()
        try:
            while not self._stopping:
                try:
                    messages = await self._source.read(self._batch, _READ_S)
                except Unavailable as error:
                    await pause.after(error)
                    continue
                pause.reset()
                if messages:
                    spans = self._spans(messages)
                    finish = self._finish(messages, *await self._apply(messages))
                    task = asyncio.create_task(_traced(finish, spans), name="acknowledge events")
                    self._finishing[task] = len(messages)
                    task.add_done_callback(self._finished)
                while sum(self._finishing.values()) > _UNSAFE:
                    await asyncio.wait(self._finishing, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*self._finishing)
            self._idle.set()
            await asyncio.Event().wait()  # a loop that ends would be a fault
        except Exception as error:
            raise without_words(error) from None  # it ends the process, which logs it
        finally:
            for task in self._finishing:
                task.cancel()

    async def drain(self, timeout_s: float = 5.0) -> None:
        """Read no more, finish what was read, and leave the source; what takes too long is delivered again."""
        self._stopping = True
        with contextlib.suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                await self._source.close()

    def _spans(self, messages: Sequence[Message]) -> Sequence[Span]:
        """Return a span for each trace that is recorded and published some of these, child of that publishing: to be ended with the batch."""
        if not self._tracing.enabled:
            return ()
        recorded = Counter(message.traceparent for message in messages if message.traceparent[-1:] in _SAMPLED)
        return [
            self._tracing.started_span(
                "apply events",
                kind=SpanKind.CONSUMER,
                attributes={"plait.source": self._source.name, "plait.events": count, "plait.batch": len(messages)},
                traceparent=traceparent,
            )
            for traceparent, count in recorded.most_common(_MAX_SPANS)
        ]

    async def _apply(self, messages: Sequence[Message]) -> tuple[Receipt, Mapping[int, Refusal]]:
        """Apply a batch, however often it takes; return what has to be safe before it is acknowledged, and which messages were refused."""
        pause = _Pause()
        while True:
            receipt = Receipt()
            try:
                outcome = await self._applying.apply(messages, receipt)
            except Unavailable as error:
                await pause.after(error)
                continue
            for (tenant, view), newest_us in outcome.newest_us.items():
                self._freshness.wrote(tenant, view, newest_us)
            published = [message.published_us for at, message in enumerate(messages) if at not in outcome.refused]
            self._freshness.applied(self._source.name, published, unused=outcome.unused, retries=outcome.retries)
            return receipt, outcome.refused

    async def _finish(self, messages: Sequence[Message], receipt: Receipt, refused: Mapping[int, Refusal]) -> None:
        """Acknowledge a batch once it is safe. If it was lost again it is applied anew, which changes nothing where it was not.

        To be refused is to be acknowledged, and other views may have counted the event: those rows have to be safe first, too.
        """
        pause = _Pause()
        while True:
            try:
                await self._acknowledging.settle(receipt)
                for at, refusal in refused.items():
                    await self._source.refuse(messages[at], refusal)
                await self._source.acknowledge(messages)
            except Unavailable as error:
                await pause.after(error)
                receipt, refused = await self._apply(messages)
            else:
                for refusal in refused.values():
                    self._freshness.refused(self._source.name, refusal.reason)
                return

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._finishing[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch of events is not acknowledged and will be delivered again", exc_info=without_words(error))


async def _traced(work: Coroutine[None, None, None], spans: Sequence[Span]) -> None:
    try:
        await work
    finally:
        for span in spans:
            span.end()


class Known(Protocol):
    """Who knows which tenants there are, and which views events feed."""

    def tenants(self) -> Sequence[str]:
        """Return every tenant."""
        ...

    def views(self) -> Sequence[str]:
        """Return the names of the views."""
        ...


async def report(source: EventSource, known: Known, freshness: Freshness, every_s: float = 5.0) -> None:
    """Publish what waits in a source as metrics, again and again until cancelled."""
    while True:
        try:
            freshness.waits(source.name, {tenant: await source.backlog_of(tenant) for tenant in known.tenants()}, known.views())
        except Unavailable as error:
            freshness.unknown(source.name)
            log.info("the lag of events is not known", source=source.name, reason=error.reason)
        await asyncio.sleep(every_s)


class _Pause:
    """Waits longer after each failure in a row."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def reset(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    async def after(self, error: PlaitError) -> None:
        log.warning("events wait", reason=error.reason, pause_s=self._next_s)
        await asyncio.sleep(self._next_s)
        self._next_s = min(2 * self._next_s, _LONGEST_PAUSE_S)
