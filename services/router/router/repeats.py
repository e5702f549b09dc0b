"""Calls that are made again: a request id answers once, so that a client which lost the answer may ask again without having it made again.

Kept by who asked and under which id, not by what: the same id with another question is a mistake, and told as such.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import InvalidArgument
from plait.rpc.call import Call, current
from plait.telemetry.metrics import Metrics
from router.entries import Entries
from router.flights import Flights
from router.question import Question, Response, Road
from router.settings import RepeatsSettings

REPEATED: Final = explanation_pb.CACHE_STATUS_REPEATED
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """A signed answer, and the digest of what it answers."""

    asked: bytes
    data: bytes
    made_s: float


class Repeats:
    """Answers by request id, in this process, bounded by bytes. A failure is not kept: the next try runs."""

    def __init__(self, settings: RepeatsSettings, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: Entries[_Told] = Entries(settings.bytes)
        self._flights: Flights[_Told] = Flights()
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
                told, again = await self._flights.fly(key, partial(self._make, key, asked, question, road), question.deadline)
            if told.asked != asked:
                raise InvalidArgument(
                    "request_id was used for another question a moment ago: give each question an id of its own, and keep it for retries",
                    reason="REQUEST_ID_REUSED",
                )
            response = _read(told.data, request)
            if again:
                repeated.inc()
                response.cache = REPEATED
                response.age_us = int((self._clock() - told.made_s) * 1e6)
            return response

        return once

    async def close(self) -> None:
        """End what is under way."""
        await self._flights.close()

    async def _make(self, key: bytes, asked: bytes, question: Question, road: Road) -> _Told:
        response = await road(question)
        told = _Told(asked=asked, data=response.SerializeToString(), made_s=self._clock())
        self._told.put(key, told, len(told.data) + _DIGEST_BYTES)
        return told


def _key(call: Call, request: pb.RankRequest | pb.PredictRequest) -> bytes:
    parts = (call.tenant, call.caller, type(request).__name__, request.request_id)
    return hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in (t.encode() for t in parts)), digest_size=16).digest()


def _digest(request: pb.RankRequest | pb.PredictRequest) -> bytes:
    return hashlib.blake2b(request.SerializeToString(deterministic=True), digest_size=_DIGEST_BYTES).digest()


def _read(data: bytes, request: pb.RankRequest | pb.PredictRequest) -> Response:
    response: Response = pb.RankResponse() if isinstance(request, pb.RankRequest) else pb.PredictResponse()
    response.ParseFromString(data)
    return response
