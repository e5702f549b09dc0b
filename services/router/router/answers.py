"""The response cache: a step of a route's road that answers what was answered lately, and has the rest made once for all who ask.

    key → kept and good? → answer, made anew beside it where its time is up → else one flight → keep → answer

What is kept is the unsigned answer, in bytes: no caller's request id, timings or assignments are in it. Only the best possible answers are
kept: of tier full and with nothing degraded.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

from google.protobuf.message import DecodeError

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.registry.policies import CachePolicy
from plait.registry.records import Snapshot
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router import shared_answer
from router.cache_key import Keys
from router.entries import Entries, Entry, standing
from router.flights import Flights
from router.invalidation import Invalidations, Named, ids_of
from router.question import TIER_FULL, Question, Response, Road
from router.redis_level import RedisLevel
from router.route_table import Arm, ServingRoute
from router.settings import CacheSettings
from router.stopwatch import Stopwatch

MISS: Final = explanation_pb.CACHE_STATUS_MISS
HIT: Final = explanation_pb.CACHE_STATUS_HIT
STALE: Final = explanation_pb.CACHE_STATUS_STALE
SHARED: Final = explanation_pb.CACHE_STATUS_SHARED
PARTIAL: Final = explanation_pb.CACHE_STATUS_PARTIAL
_SAME_S: Final = 0.001  # an answer that is no newer than this is the one that is known already


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """An answer that a flight brought, and what the road learnt on its way; when it was begun by the clock, and by the log of invalidations."""

    response: Response  # the first caller's, who signs it; for everybody else there is
    data: bytes
    arm: Arm
    tier: str
    reasons: Sequence[str]
    began_s: float
    position: int
    from_redis: bool = False

    def answer_to(self, question: Question, *, shared: bool) -> Response:
        """Return the answer as a message of the caller's own."""
        return _read(self.data, question) if shared else self.response


class Answers:
    """Keeps answers in this process, bounded by bytes, and fresh ones in what routers share, if there is such a `level`; routes say for how long."""

    def __init__(
        self,
        settings: CacheSettings,
        invalidations: Invalidations,
        metrics: Metrics,
        level: RedisLevel | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._invalidations = invalidations
        self._level = level
        self._clock = clock
        self._chance = chance
        self._keys = Keys()
        self._entries: Entries[Entry] = Entries(settings.bytes)
        self._flights: Flights[_Made] = Flights()
        self._outcomes = metrics.counter(
            "plait_router_cache", "questions to routes with a cache, by how they were answered", ("route", "outcome")
        )
        size = metrics.gauge("plait_router_cache_bytes", "bytes of answers kept in memory")
        size.set_function(lambda: self._entries.size_bytes)

    def __repr__(self) -> str:
        return f"<Answers {self._entries!r} {self._flights!r} {self._invalidations!r}>"

    def adopt(self, snapshot: Snapshot) -> None:
        """Tell questions apart by a new snapshot from now on: what was kept under an old one is not found where it differs."""
        self._keys.adopt(snapshot)

    def around(self, road: Road, route: ServingRoute, policy: CachePolicy) -> Road:
        """Return the road that is only taken for what is not kept. A request that asks to explain is neither answered from here nor kept."""
        count = {
            status: self._outcomes.labels(route.name, word)
            for status, word in ((MISS, "miss"), (HIT, "hit"), (STALE, "stale"), (SHARED, "shared"), (PARTIAL, "partial"))
        }

        async def cached(question: Question) -> Response:
            if question.trail is not None:
                question.trail.cache = self._would_be(question, policy)
                return await road(question)
            if question.request.explain:
                return await road(question)
            key = self._keys.of(question)
            response = self._kept(key, question, road, policy)
            if response is None:
                response = await self._shared(key, question, road, policy)
            count[response.cache].inc()
            return response

        return cached

    async def close(self) -> None:
        """End what is being made for nobody in particular."""
        await self._flights.close()

    def _kept(self, key: bytes, question: Question, road: Road, policy: CachePolicy) -> Response | None:
        """Return what is kept, where it is good enough; where somebody should make it anew, that begins."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age_s = self._clock() - entry.made_s
        found = standing(age_s, entry.took_s, policy, 1 - self._chance())
        response = None if found == "gone" else self._untouched(entry, question)
        if response is None:
            self._entries.drop(key)
            return None
        if found != "fresh":
            self._flights.refresh(key, partial(self._make, key, self._keys.snapshot, _anew(question), road, policy, entry.made_s))
        response.cache = STALE if found == "stale" else HIT
        response.age_us += int(age_s * 1e6)  # of scores that were known when it was made
        return response

    def _would_be(self, question: Question, policy: CachePolicy) -> explanation_pb.CacheStatus.ValueType:
        """Return how a question would be answered, and leave everything as it is."""
        key = self._keys.of(question)
        entry = self._entries.get(key)
        found = "gone" if entry is None else standing(self._clock() - entry.made_s, entry.took_s, policy, 1.0)
        if entry is None or found == "gone" or self._untouched(entry, question) is None:
            return SHARED if key in self._flights else MISS
        return STALE if found == "stale" else HIT

    async def _shared(self, key: bytes, question: Question, road: Road, policy: CachePolicy) -> Response:
        make = partial(self._make, key, self._keys.snapshot, question, road, policy, -math.inf)
        made, shared = await self._flights.fly(key, make, question.deadline)
        response = made.answer_to(question, shared=shared)
        aged = self._clock() - made.began_s > policy.ttl_s + policy.stale_s
        if shared and (aged or self._invalidations.touched(made.position, _named(question, response))):
            # Begun before something was told to be forgotten, of which this caller may know, or too long ago. The next flight begins now.
            made, shared = await self._flights.fly(key, make, question.deadline)
            response = made.answer_to(question, shared=shared)
        if shared:
            question.arm, question.tier = made.arm, made.tier
            question.reasons += made.reasons
        if shared or made.from_redis or not response.cache:  # (else scores were known)
            response.cache = HIT if made.from_redis else SHARED if shared else MISS
        if made.from_redis:
            response.age_us = int((self._clock() - made.began_s) * 1e6)
        return response

    async def _make(self, key: bytes, world: Snapshot, question: Question, road: Road, policy: CachePolicy, after_s: float) -> _Made:
        """Make an answer to a key of this world, unless another router made one after `after_s` that is still fresh."""
        if self._level is not None:
            made = await self._from_redis(self._level, key, question, policy, after_s)
            if made is not None:
                return made
        began_s, position = self._clock(), self._invalidations.position
        known = len(question.reasons)  # of its choice, which is each caller's own
        response = await road(question)
        made_s = self._clock()
        made = _Made(
            response=response,
            data=response.SerializeToString(),
            arm=question.arm,
            tier=question.tier,
            reasons=question.reasons[known:],
            began_s=began_s,
            position=position,
        )
        if made.tier == TIER_FULL and not made.reasons and self._keys.snapshot is world:  # (the registry may have changed meanwhile)
            # Its age counts from when it was begun: that is when its features were read.
            entry = Entry(data=made.data, made_s=began_s, took_s=made_s - began_s, position=position)
            self._entries.put(key, entry, len(made.data))
            if self._level is not None:
                lives_s = policy.ttl_s - entry.took_s
                if lives_s > 0:
                    value = shared_answer.write(made.data, entry.took_s, lives_s, Invalidations.heard_at(position))
                    self._level.put(shared_answer.key(key), value, lives_s)
        return made

    async def _from_redis(self, level: RedisLevel, key: bytes, question: Question, policy: CachePolicy, after_s: float) -> _Made | None:
        held = await level.get(shared_answer.key(key))
        found = shared_answer.read(*held) if held else None
        if found is None or found.age_s > policy.ttl_s:
            return None
        began_s, position = self._clock() - found.age_s, Invalidations.since(found.heard)
        entry = Entry(data=found.data, made_s=began_s, took_s=found.took_s, position=position)
        try:
            if began_s <= after_s + _SAME_S or self._untouched(entry, question) is None:
                return None
        except DecodeError:  # somebody else wrote it
            return None
        self._entries.put(key, entry, len(found.data))
        return _Made(
            response=_read(found.data, question),
            data=found.data,
            arm=question.arm,
            tier=TIER_FULL,
            reasons=(),
            began_s=began_s,
            position=entry.position,
            from_redis=True,
        )

    def _untouched(self, entry: Entry, question: Question) -> Response | None:
        """Return the answer of an entry, None where something in it was told to be forgotten since it was begun."""
        response = _read(entry.data, question)
        if self._invalidations.touched(entry.position, _named(question, response)):
            return None
        entry.position = max(entry.position, self._invalidations.position)
        return response


def _read(data: bytes, question: Question) -> Response:
    response: Response = pb.RankResponse() if isinstance(question.request, pb.RankRequest) else pb.PredictResponse()
    response.ParseFromString(data)
    return response


def _anew(question: Question) -> Question:
    """Return the same question in nobody's time but the route's own."""
    again = copy.copy(question)
    again.deadline = Deadline.after(question.route.timeout_s)
    again.watch, again.reasons, again.by_rule = Stopwatch(), [], {}
    again.features = again.features_for = None
    return again


def _named(question: Question, response: Response) -> Iterator[Named]:
    """Yield what makes an answer go when it is told to be forgotten: its route, its model, and whom it is about."""
    tenant, route = question.tenant, question.route
    yield (tenant, "route", ""), (route.name,)
    yield (tenant, "model", ""), (question.arm.model,)
    for entity_type, ids in question.ids.items():
        returned = entity_type == route.candidate and isinstance(response, pb.RankResponse)
        # Candidates that were not returned may well be sold: nobody sees them.
        yield (tenant, "entity", entity_type), ids_of(cast("pb.RankResponse", response).item_ids if returned else ids)
