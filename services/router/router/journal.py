"""What the router writes down for experiments: who was shown which variant, and what came of it. It joins nothing; the controller does.

Redis streams, one of each kind per tenant: `x1{tenant}` for exposures and `o1{tenant}` for outcomes, each entry one message in the field `m`.
Exposures are written behind the answer, at least once; an answer never waits for them. Outcomes are written before they are acknowledged, and
each once: a script notes an outcome's fingerprint and appends it in one step, so that a repeat finds the note.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from plait.api.events.v1 import outcomes_pb2
from plait.errors import PlaitError, Unavailable
from plait.redis.commands import pack
from plait.redis.dispatch import Dispatch, all_here, late
from plait.redis.script import Script
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from router.settings import JournalSettings

log = get_logger(__name__)

_PAUSE_S: Final = 0.05  # exposures gather for so long
_BATCH: Final = 500
_RETRY_S: Final = 1.0
_CHUNK: Final = 200  # outcomes per run of the script, in which Redis does nothing else
_TIMEOUT_S: Final = 2.0

# KEYS: the stream, then a note per outcome. ARGV: for how long notes are kept (ms), how many entries the stream keeps, then the outcomes.
# Answers with a 1 for each that was new.
_KEEP: Final = Script(b"""
local new = {}
for i = 2, #KEYS do
  if redis.call('SET', KEYS[i], '', 'NX', 'PX', ARGV[1]) then
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'm', ARGV[i + 1])
    new[#new + 1] = 1
  else
    new[#new + 1] = 0
  end
end
return new
""")


class Journal:
    """Run `run` for as long as the process lives; `put` and `record` are for whoever has something to write down."""

    def __init__(self, dispatch: Dispatch, settings: JournalSettings, metrics: Metrics) -> None:
        self._dispatch = dispatch
        self._settings = settings
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        counted = metrics.counter("plait_router_journal", "exposures to be written down, by what became of them", ("outcome",))
        self._written, self._dropped = counted.labels("written"), counted.labels("dropped")
        metrics.gauge("plait_router_journal_waiting", "exposures that are not written yet").set_function(lambda: len(self._waiting))

    def __repr__(self) -> str:
        return f"<Journal waiting={len(self._waiting)}>"

    def put(self, exposure: outcomes_pb2.Exposure) -> bool:
        """Have an exposure written soon; say whether there was room for it. Costs its caller no waiting."""
        if len(self._waiting) >= self._settings.queue:
            self._dropped.inc()
            return False
        self._waiting.append((exposure.tenant, exposure.SerializeToString()))
        self._wake.set()
        return True

    async def record(self, tenant: str, outcomes: Sequence[outcomes_pb2.Outcome]) -> int:
        """Write outcomes down; return how many were new. Raises Unavailable; what was written until then is known when it comes again."""
        new = 0
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                for start in range(0, len(outcomes), _CHUNK):
                    new += await self._keep(tenant, outcomes[start : start + _CHUNK])
        except (TimeoutError, Unavailable) as error:
            raise Unavailable(
                "outcomes cannot be written down now: send them again", reason="JOURNAL_UNAVAILABLE", retry_after_s=0.5
            ) from error
        return new

    async def run(self) -> None:
        """Write exposures as they come, for ever. While Redis is away they wait, as many as there is room for."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_PAUSE_S)
            await self.flush()

    async def flush(self) -> None:
        """Write every exposure that waits now, however long that takes."""
        async with self._writing:
            await self._flush()

    async def close(self) -> None:
        """Write what waits, if that is possible at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self.flush()

    async def _flush(self) -> None:
        failures = 0
        while self._waiting:
            batch = [self._waiting[at] for at in range(min(_BATCH, len(self._waiting)))]
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._append(batch)
            except (TimeoutError, PlaitError) as error:
                failures += 1
                if failures == 1:
                    log.warning("exposures cannot be written now", waiting=len(self._waiting), error=str(error) or "too slow")
                await asyncio.sleep(_RETRY_S)
                continue
            for _ in batch:
                self._waiting.popleft()
            self._written.inc(len(batch))
        self._wake.clear()

    async def _append(self, batch: Sequence[tuple[str, bytes]]) -> None:
        keys = [b"x1{%b}" % tenant.encode() for tenant, _ in batch]
        most = b"%d" % self._settings.max_entries
        commands = [pack(b"XADD", [key, b"MAXLEN", b"~", most, b"*", b"m", data]) for key, (_, data) in zip(keys, batch, strict=True)]
        replies = late(len(batch))
        await self._dispatch.run(keys, commands, replies)
        all_here(replies)

    async def _keep(self, tenant: str, outcomes: Sequence[outcomes_pb2.Outcome]) -> int:
        stream = b"o1{%b}" % tenant.encode()
        keys = [stream, *(b"d1{%b}%b" % (tenant.encode(), fingerprint(outcome)) for outcome in outcomes)]
        kept_ms, most = b"%d" % int(self._settings.known_s * 1000), b"%d" % self._settings.max_entries
        replies = late(1)
        call = _KEEP.call(keys, [kept_ms, most, *(outcome.SerializeToString() for outcome in outcomes)])
        await self._dispatch.run([stream], [call], replies, script=_KEEP)
        all_here(replies)
        return sum(replies[0])


def fingerprint(outcome: outcomes_pb2.Outcome) -> bytes:
    """Return 16 bytes that are equal for outcomes that count once: of one answer, item, type and outcome_id, whatever else they say."""
    parts = (
        outcome.request_id.encode(),
        outcome.item.SerializeToString(deterministic=True),
        b"%d" % outcome.type,
        outcome.outcome_id.encode(),
    )
    return hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=16).digest()
