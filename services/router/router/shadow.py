"""Shadow traffic: what a variant would have answered, asked after the caller has its answer, compared with it and thrown away.

Nothing a shadow does reaches a caller: it runs in a task of its own, in its own time, beside the gate and only while there is room; what is
too much is dropped and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry import trace

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import DeadlineExceeded, PlaitError
from plait.registry.entity_ids import composites
from plait.rpc.deadline import Deadline
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing
from router.consulting import Consulting
from router.ordering import best_first
from router.question import TIER_FULL, Question, Response, Road
from router.route_table import ServingRoute, ServingShadow
from router.stopwatch import Stopwatch
from router.tensors import scores_of
from router.validation import Ids

log = get_logger(__name__)

BUSY: Final = 0.8  # of the gate's limit: beyond it the room is the callers'
_TOP: Final = 10
_SPAN: Final = 2.0**64
_SHARES: Final = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_DIFFERENCES: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


class Shadows:
    """Casts the shadows of routes. `load` says how much of the gate's limit is taken, 0 to 1."""

    def __init__(self, consulting: Consulting, load: Callable[[], float], metrics: Metrics, tracing: Tracing) -> None:
        self._consulting = consulting
        self._load = load
        self._tracing = tracing
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self._outcomes = metrics.counter(
            "plait_router_shadow",
            "requests put to a shadow: answered, failed, late, dropped_busy, dropped_full",
            ("route", "variant", "outcome"),
        )
        self._overlap = metrics.histogram(
            "plait_router_shadow_overlap", "share of the first ten that the shadow has among its first ten", ("route", "variant"), _SHARES
        )
        self._difference = metrics.histogram(
            "plait_router_shadow_difference", "largest difference of a score among the first ten", ("route", "variant"), _DIFFERENCES
        )

    def __repr__(self) -> str:
        return f"<Shadows in_flight={len(self._tasks)}>"

    async def close(self) -> None:
        """End what is under way: nobody waits for it."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def around(self, road: Road, route: ServingRoute) -> Road:
        """Return the road with the route's shadows behind it."""
        shadows = route.shadows

        async def shadowed(question: Question) -> Response:
            response = await road(question)
            if question.tier == TIER_FULL and question.trail is None:
                span = trace.get_current_span().get_span_context() if self._tracing.enabled else None
                asyncio.get_running_loop().call_soon(self._cast, shadows, question, response, span)
            return response

        return shadowed

    def _cast(self, shadows: tuple[ServingShadow, ...], question: Question, response: Response, span: trace.SpanContext | None) -> None:
        """The answer is on its way; the message of the request is held for `timeout_s` of the shadow at most."""
        for shadow in shadows:
            if shadow.arm is question.arm or not _sampled(shadow, question.request_id) or not question.suits(shadow.arm):
                continue
            key = (question.route.name, shadow.arm.name)
            if self._in_flight[key] >= shadow.max_in_flight:
                self._outcomes.labels(*key, "dropped_full").inc()
            elif self._load() > BUSY:
                self._outcomes.labels(*key, "dropped_busy").inc()
            else:
                self._in_flight[key] += 1
                running = self._run(shadow, question, response, key, span)
                task = asyncio.get_running_loop().create_task(running, name=f"shadow-{shadow.arm.name}", context=Context())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(
        self, shadow: ServingShadow, question: Question, response: Response, key: tuple[str, str], link: trace.SpanContext | None
    ) -> None:
        outcome = "failed"
        try:
            with trace.use_span(self._tracing.linked_span("router.shadow", [link]), end_on_exit=True, record_exception=False):
                async with asyncio.timeout(shadow.timeout_s):
                    await self._ask(shadow, question, response, key)
            outcome = "answered"
        except (DeadlineExceeded, TimeoutError):
            outcome = "late"
        except PlaitError as error:
            log.debug("a shadow failed", route=key[0], variant=key[1], code=error.code.name, reason=error.reason)
        except Exception:
            log.exception("a shadow failed by a fault of ours", route=key[0], variant=key[1])
        finally:
            self._in_flight[key] -= 1
            self._outcomes.labels(*key, outcome).inc()

    async def _ask(self, shadow: ServingShadow, question: Question, response: Response, key: tuple[str, str]) -> None:
        """Features that were read for the answer are looked at again, where the shadow takes the same."""
        asked = replace(question, arm=shadow.arm, deadline=Deadline.after(shadow.timeout_s), reasons=[], watch=Stopwatch())
        features = await self._consulting.features_of(asked)
        answer = await self._consulting.infer(asked, features)
        if isinstance(response, pb.RankResponse):
            scores = scores_of(answer, question.route.score, len(question.candidates))
            self._compare(key, question.candidates, response, scores)

    def _compare(self, key: tuple[str, str], candidates: Ids, response: pb.RankResponse, scores: NDArray[np.float32]) -> None:
        shown = _shown(response)
        if not shown:
            return
        best = map(candidates.__getitem__, best_first(scores, _TOP).tolist()[: len(shown)])
        self._overlap.labels(*key).observe(len(set(shown).intersection(best)) / len(shown))
        places = list(map(list(candidates).index, shown))
        difference = float(np.abs(scores[places] - np.array(response.scores[: len(shown)])).max())
        if math.isfinite(difference):
            self._difference.labels(*key).observe(difference)


def _shown(response: pb.RankResponse) -> Ids:
    """The first ids of an answer."""
    ids = response.item_ids
    return ids.string_ids[:_TOP] or ids.int64_ids[:_TOP] or composites(ids)[:_TOP]


def _sampled(shadow: ServingShadow, request_id: str) -> bool:
    if shadow.share >= 1:
        return True
    raw = hashlib.blake2b(b"\0".join((b"shadow", shadow.arm.name.encode(), request_id.encode())), digest_size=8).digest()
    return int.from_bytes(raw, "little") < shadow.share * _SPAN
