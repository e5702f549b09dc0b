"""A batching worker and its callers on a clock of their own: what the router's admission makes of a load, without waiting for it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plait.errors import ResourceExhausted
from router.admission import Admission, Flow, Waiter
from router.cost import Line
from router.limiter import Window


@dataclass(slots=True, kw_only=True)
class Stream:
    """Callers of one tenant and class: independent arrivals at a share of what the worker can do."""

    tenant: str = "shop"
    rank: int = 1
    weight: float = 1.0
    load: Callable[[float], float]  # at a time in ms
    latencies_ms: list[float] = field(default_factory=list)
    refused: int = 0
    flow: Flow = field(init=False)

    def __post_init__(self) -> None:
        self.flow = Flow(self.rank, self.tenant, self.weight)


@dataclass(slots=True, kw_only=True)
class Worker:
    """Takes `fixed_ms` + `each_ms` for each of at most `batch`; times `slowness` at a time in ms."""

    fixed_ms: float = 2.0
    each_ms: float = 0.2
    batch: int = 32
    slowness: Callable[[float], float] = lambda _: 1.0

    @property
    def per_ms(self) -> float:
        """What it can do."""
        return self.batch / (self.fixed_ms + self.each_ms * self.batch)


class Simulation:
    """Runs for `until_ms`; latencies count from `from_ms`, those of answers that came within `budget_ms`."""

    def __init__(self, admission: Admission, worker: Worker, *streams: Stream, seed: int = 1, budget_ms: float = 200.0) -> None:
        self.admission = admission
        self.worker = worker
        self.streams = streams
        self.limits: list[tuple[float, int]] = []
        self._budget_ms = budget_ms
        self._random = random.Random(seed)  # noqa: S311
        self._line, self._window = Line(1), Window()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self._waiting: list[tuple[Stream, float, float, int]] = []
        self._busy = False
        self._now = self._from_ms = 0.0

    def run(self, until_ms: float, from_ms: float = 0.0) -> Simulation:
        """Let time pass."""
        self._from_ms = from_ms
        for stream in self.streams:
            self._next(stream)
        while self._events and self._events[0][0] <= until_ms:
            self._now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self._now = until_ms
        return self

    def goodput(self, stream: Stream) -> float:
        """Return the answers in time over what the worker can do."""
        return len(stream.latencies_ms) / (self._now - self._from_ms) / self.worker.per_ms

    def p99_ms(self, stream: Stream) -> float:
        """Return the 99th percentile of the answers in time."""
        return sorted(stream.latencies_ms)[int(len(stream.latencies_ms) * 0.99)] if stream.latencies_ms else 0.0

    def _at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._number), act, arguments))

    def _next(self, stream: Stream) -> None:
        per_ms = stream.load(self._now) * self.worker.per_ms
        self._at(self._now + self._random.expovariate(per_ms), self._arrive, stream)

    def _arrive(self, stream: Stream) -> None:
        self._next(stream)
        cost = self._line.of(1)
        try:
            self.admission.knock(stream.flow)
            slots = self.admission.enter(stream.flow, cost)
            if slots:
                self._send(stream, self._now, slots)
                return
            waiter = Waiter.of(stream.flow, cost, self.admission.slots(cost), (stream, self._now))
            patience_s, victim = self.admission.line_up(waiter)
        except ResourceExhausted:
            stream.refused += 1
            return
        if victim is not None:
            victim.turn[0].refused += 1
        self._at(self._now + min(patience_s * 1e3, self._budget_ms), self._give_up, waiter)

    def _give_up(self, waiter: Waiter) -> None:
        if self.admission.give_up(waiter):
            waiter.turn[0].refused += 1

    def _send(self, stream: Stream, came: float, slots: int) -> None:
        self._waiting.append((stream, came, self._now, slots))
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        batch, self._waiting = self._waiting[: self.worker.batch], self._waiting[self.worker.batch :]
        if batch:
            self._busy = True
            took = (self.worker.fixed_ms + self.worker.each_ms * len(batch)) * self.worker.slowness(self._now)
            self._at(self._now + took, self._end, batch, self._now, took)

    def _end(self, batch: list[tuple[Stream, float, float, int]], began: float, took: float) -> None:
        self._busy = False
        for stream, came, sent, slots in batch:
            self.admission.leave(stream.flow, slots)
            self.admission.limiter.sample(self._window, began - sent, took)
            self._line.learn(1, took / len(batch))
            self.admission.answered((self._now - sent) / 1e3, self._now / 1e3)
            if self._now >= self._from_ms and self._now - came <= self._budget_ms:
                stream.latencies_ms.append(self._now - came)
        if not self.limits or self._now - self.limits[-1][0] >= 100:
            self.limits.append((self._now, self.admission.limiter.limit))
        for waiter in self.admission.turns():
            stream, came = waiter.turn
            self._waiting.append((stream, came, self._now, waiter.slots))
        if not self._busy:
            self._begin()
