"""Calls that are made again: a request id answers once, so that a client which lost the answer may ask again without having it made again.

Kept by who asked and under which id, not by what: the same id with another question is a mistake, and told as such.

Routers that share a Redis answer for each other: the first one claims the id there for as long as its call may take, the others wait for what it
writes. A claim that ran out is taken over, so a call may run twice where its router died or was cut off; calls only read.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import Aborted, InvalidArgument, Unavailable
from plait.rpc.call import Call, current
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router.entries import Entries
from router.flights import Flights
from router.question import Question, Response, Road
from router.redis_level import RedisLevel
from router.settings import RepeatsSettings

REPEATED: Final = explanation_pb.CACHE_STATUS_REPEATED
_DIGEST_BYTES: Final = 16
_PREFIX: Final = b"i1"
_CLAIM: Final = b"p1"  # then the digest of the question, and whose claim it is
_DONE: Final = b"d1"  # then the digest of the question, and the answer
_GRACE_S: Final = 1.0  # beyond the deadline, before a claim may be taken over
_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.05
_RETRY_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """A signed answer, and the digest of what it answers; `elsewhere`: another router gave it."""

    asked: bytes
    data: bytes
    made_s: float
    elsewhere: bool = False


@dataclass(slots=True)
class _Boarding:
    """How many wait for the answer to a question under way."""

    asked: bytes
    callers: int = 0


class Repeats:
    """Answers by request id, in this process, bounded by bytes, and in what routers share, if there is such a `level`.

    A failure is not kept: the next try runs.
    """

    def __init__(
        self,
        settings: RepeatsSettings,
        metrics: Metrics,
        level: RedisLevel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._level = level
        self._told: Entries[_Told] = Entries(settings.bytes)
        self._flights: Flights[_Told] = Flights()
        self._boarding: dict[bytes, _Boarding] = {}
        self._count = metrics.counter("plait_router_repeats", "calls answered by the answer to an earlier one", ("route",))

    def __repr__(self) -> str:
        return f"<Repeats {self._told!r} {self._flights!r}>"

    def around(self, road: Road, route: str, window_s: float) -> Road:
        """Return the road, which makes signed answers, taken once per request id within the window; without an id it is taken at once."""
        repeated = self._count.labels(route)

        async def once(question: Question) -> Response:
            request = question.request
            if not request.request_id or question.trail is not None:  # (an Explain tells what happens now)
                return await road(question)
            key, asked = _key(current(), request), _digest(request)
            told = self._told.get(key)
            again = told is not None and self._clock() - told.made_s <= window_s
            if told is None or not again:
                make = partial(self._make, key, asked, question, road, window_s)
                told, again = await self._fly(key, asked, make, question.deadline)
            if told.asked != asked:
                raise _reused()
            response = _read(told.data, request)
            if again or told.elsewhere:
                repeated.inc()
                response.cache = REPEATED
                response.age_us = int((self._clock() - told.made_s) * 1e6)
            return response

        return once

    async def close(self) -> None:
        """End what is under way."""
        await self._flights.close()

    async def _fly(self, key: bytes, asked: bytes, make: Callable[[], Awaitable[_Told]], deadline: Deadline) -> tuple[_Told, bool]:
        """Share a flight with those who ask the same under this id; another question is refused at once, and so spoils nobody's flight."""
        boarding = self._boarding.setdefault(key, _Boarding(asked))
        if boarding.asked != asked:
            raise _reused()
        boarding.callers += 1
        try:
            return await self._flights.fly(key, make, deadline)
        finally:
            boarding.callers -= 1
            if not boarding.callers:
                del self._boarding[key]

    async def _make(self, key: bytes, asked: bytes, question: Question, road: Road, window_s: float) -> _Told:
        if self._level is None:
            told = await self._run(asked, question, road)
        else:
            told = await self._run_once(self._level, _PREFIX + key, asked, question, road, window_s)
        self._told.put(key, told, len(told.data) + _DIGEST_BYTES)
        return told

    async def _run(self, asked: bytes, question: Question, road: Road) -> _Told:
        response = await road(question)
        return _Told(asked=asked, data=response.SerializeToString(), made_s=self._clock())

    async def _run_once(self, level: RedisLevel, key: bytes, asked: bytes, question: Question, road: Road, window_s: float) -> _Told:
        """Run, unless another router does or did: then wait for its answer."""
        claim, pause_s = _CLAIM + asked + secrets.token_bytes(_DIGEST_BYTES), _FIRST_PAUSE_S
        while True:
            try:
                found = await level.claim(key, claim, max(0.0, question.deadline.remaining_s()) + _GRACE_S)
            except Unavailable:
                return await self._run(asked, question, road)
            if found is None:
                return await self._run_claimed(level, key, claim, asked, question, road, window_s)
            if found[:2] not in (_CLAIM, _DONE):
                return await self._run(asked, question, road)  # of a version that we do not know
            if found[2 : 2 + _DIGEST_BYTES] != asked:
                raise _reused()
            held = await level.get(key) if found.startswith(_DONE) else None
            if held is not None and held[0].startswith(_DONE + asked):
                value, left_s = held
                made_s = self._clock() - max(0.0, window_s - left_s)
                return _Told(asked=asked, data=value[2 + _DIGEST_BYTES :], made_s=made_s, elsewhere=True)
            if question.deadline.remaining_s() < 2 * pause_s:
                message = "the first call with this request_id is still under way on another router: retry with the same id"
                raise Aborted(message, reason="REQUEST_IN_PROGRESS", retry_after_s=_RETRY_S)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_claimed(
        self, level: RedisLevel, key: bytes, claim: bytes, asked: bytes, question: Question, road: Road, window_s: float
    ) -> _Told:
        try:
            told = await self._run(asked, question, road)
        except BaseException:  # cancelled, too: whoever tries again need not wait for the claim to run out
            level.release(key, claim)
            raise
        level.put(key, _DONE + asked + told.data, window_s)
        return told


def _reused() -> InvalidArgument:
    message = "request_id was used for another question a moment ago: give each question an id of its own, and keep it for retries"
    return InvalidArgument(message, reason="REQUEST_ID_REUSED")


def _key(call: Call, request: pb.RankRequest | pb.PredictRequest) -> bytes:
    parts = (call.tenant, call.caller, type(request).__name__, request.request_id)
    return hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in (t.encode() for t in parts)), digest_size=16).digest()


def _digest(request: pb.RankRequest | pb.PredictRequest) -> bytes:
    return hashlib.blake2b(request.SerializeToString(deterministic=True), digest_size=_DIGEST_BYTES).digest()


def _read(data: bytes, request: pb.RankRequest | pb.PredictRequest) -> Response:
    response: Response = pb.RankResponse() if isinstance(request, pb.RankRequest) else pb.PredictResponse()
    response.ParseFromString(data)
    return response
