"""Who begins now, who waits and who is sent away: decisions only, on a clock that is handed in; `gate` acts on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from plait.errors import ResourceExhausted
from router.fair_queue import FairQueue, Guest
from router.limiter import Limiter
from router.settings import AdmissionSettings

_STANDING_S: Final = 0.1  # what lasts longer is no burst
_STANDING_SHARE: Final = 0.25  # of those that came, that found no place
_LEAST_PATIENCE_S: Final = 0.002
_PATIENCE: Final = 0.5  # forward passes
_PATIENCE_AMONG_OTHERS: Final = 1.5  # forward passes: when one ends, as many wait as places come free, so that turns decide who gets them
_LONGEST_RETRY_S: Final = 5.0
_JITTER: Final = 0.2
_RESIDENCE_SMOOTHING: Final = 0.05
_COST_SMOOTHING: Final = 0.2


class Flow:
    """The requests of one tenant in one class: `held` places are taken or waited for."""

    __slots__ = ("held", "rank", "tenant", "weight")

    def __init__(self, rank: int, tenant: str, weight: float) -> None:
        self.rank = rank
        self.tenant = tenant
        self.weight = weight
        self.held = 0


@dataclass(slots=True, eq=False)
class Waiter(Guest):
    """A guest that takes `slots` places once its `turn` comes."""

    flow: Flow
    slots: int
    turn: Any = None

    @classmethod
    def of(cls, flow: Flow, cost: float, slots: int, turn: Any) -> Waiter:
        """Return a waiter of a flow."""
        return cls(flow.rank, flow.tenant, flow.weight, cost, flow, slots, turn)


class Admission:
    """Lets in as much as the limiter says, a request of mean cost taking one place; the others wait in fair turn, shortly.

    How long a request may wait follows controlled delay (Maurer, "Fail at Scale", ACM Queue 2015, after CoDel): `max_wait_s` in a burst. Where
    every fourth request of the last 100 ms found no place, waiting helps nobody: then it is half a forward pass of the worker, or one and a
    half while several flows share, since turns decide only among those who wait when places come free. Whoever would have to wait longer is
    sent away at once.
    """

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        least = min(settings.min_limit, settings.limit) if settings.adaptive else settings.limit
        start = settings.start if settings.adaptive else settings.limit
        self.limiter = Limiter(start=start, least=least, most=settings.limit)
        self.queue: FairQueue[Waiter] = FairQueue(settings.queue)
        self.in_flight = 0  # places taken
        self._peak = 0
        self._flows = 0  # that hold something
        self._stands = False  # the queue
        self._stands_until_s = 0.0  # when that is looked at again
        self._came = self._found_full = 0
        self._residence_s = 0.0  # of a request behind the gate
        self._mean_cost = 0.0
        self._per_ms = 0.0  # places per millisecond of cost
        self._entered = 0
        self._entered_cost = 0.0

    def __repr__(self) -> str:
        return f"<Admission in_flight={self.in_flight}/{self.limiter.limit} waiting={len(self.queue)}/{self._settings.queue}>"

    def enter(self, flow: Flow, cost: float) -> int:
        """Take places for a request and return how many; 0 where it has to wait."""
        slots = self.slots(cost)
        taken = self.in_flight + slots
        self._came += 1
        if len(self.queue) or (taken > self.limiter.limit and self.in_flight):
            self._found_full += 1
            return 0
        self._hold(flow, slots)
        self._take(slots, cost)
        return slots

    def slots(self, cost: float) -> int:
        """Return how many places a request takes: its share of the mean, half the limit at most."""
        return min(int(cost * self._per_ms + 0.5), self.limiter.limit >> 1) or 1

    def knock(self, flow: Flow) -> None:
        """Raise ResourceExhausted where a request could not even wait. O(1) while there is room."""
        if len(self.queue):
            try:
                self._check(flow)
                self._victim(flow)
            except ResourceExhausted:
                self._came += 1
                self._found_full += 1
                raise

    def line_up(self, waiter: Waiter) -> tuple[float, Waiter | None]:
        """Let a request wait: return how long at most, and who has to go for it.

        Raises ResourceExhausted (OVERLOADED) where that would take too long, or all places to wait are taken by its equals and betters.
        """
        flow = waiter.flow
        self._check(flow)
        victim = self._victim(flow)
        if victim is not None:
            self.give_up(victim)
        patience_s = self._patience_s(flow)
        self.queue.push(waiter)
        self._hold(flow, waiter.slots)
        self._peak = max(self._peak, self.limiter.limit)
        return patience_s, victim

    def give_up(self, waiter: Waiter) -> bool:
        """Let a waiter go without a turn; False when it did not wait any more."""
        waited = self.queue.remove(waiter)
        if waited:
            self._let_go(waiter.flow, waiter.slots)
        return waited

    def leave(self, flow: Flow, slots: int) -> None:
        """Give places back."""
        self.in_flight -= slots
        self._let_go(flow, slots)

    def turns(self) -> Iterator[Waiter]:
        """Yield whose turn it is now; they have their places."""
        while len(self.queue):
            head = self.queue.head()
            if self.in_flight and self.in_flight + head.slots > self.limiter.limit:
                return
            self.queue.pop()
            self._take(head.slots, head.cost)
            yield head

    def answered(self, took_s: float, now_s: float) -> None:
        """Hear how long a request was behind the gate, and look at the limit again where it is time."""
        if self._residence_s:
            self._residence_s += _RESIDENCE_SMOOTHING * (took_s - self._residence_s)
        else:
            self._residence_s = took_s
        if now_s >= self._stands_until_s:
            self._stands = self._found_full > _STANDING_SHARE * self._came
            self._stands_until_s = now_s + _STANDING_S
            self._came = self._found_full = 0
        if self.limiter.due(now_s):
            self._step(now_s)

    def overloaded(self, why: str, wait_s: float) -> ResourceExhausted:
        """Return the refusal: when to come back is after the wait that was expected, not everybody in the same moment."""
        retry_s = min(_LONGEST_RETRY_S, max(self._settings.retry_after_s, wait_s)) * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311
        return ResourceExhausted(
            f"the router is at its limit of {self.limiter.limit} requests and {why}: retry in {retry_s * 1e3:.0f} ms",
            reason="OVERLOADED",
            retry_after_s=retry_s,
        )

    def _check(self, flow: Flow) -> None:
        wait_s = self._predicted_s(flow)
        if wait_s > self._patience_s(flow):
            raise self.overloaded(f"a turn would come in {wait_s * 1e3:.0f} ms only", wait_s)

    def _victim(self, flow: Flow) -> Waiter | None:
        """Return whose place a newcomer takes, None where one is free."""
        if not self.queue.full:
            return None
        victim = self.queue.victim(flow.rank, flow.tenant, flow.weight)
        if victim is None:
            raise self.overloaded(f"{len(self.queue)} are waiting already", self._predicted_s(flow))
        return victim

    def _predicted_s(self, flow: Flow) -> float:
        """Return how long a newcomer would wait: the cost served before it, at the pace of what is under way (Little's law)."""
        served_ms = self.limiter.limit * self._mean_cost
        return self.queue.ahead(flow.rank, flow.tenant, flow.weight) / served_ms * self._residence_s if served_ms else 0.0

    def _patience_s(self, flow: Flow) -> float:
        most_s = self._settings.max_wait_s
        pass_s = self.limiter.pass_ms / 1e3
        if not (self._stands and pass_s and self._settings.adaptive):
            return most_s
        alone = self._flows - bool(flow.held) == 0
        passes = _PATIENCE if alone else _PATIENCE_AMONG_OTHERS
        return min(most_s, max(_LEAST_PATIENCE_S, passes * pass_s))

    def _hold(self, flow: Flow, slots: int) -> None:
        if not flow.held:
            self._flows += 1
        flow.held += slots

    def _let_go(self, flow: Flow, slots: int) -> None:
        flow.held -= slots
        if not flow.held:
            self._flows -= 1

    def _take(self, slots: int, cost: float) -> None:
        self.in_flight += slots
        self._peak = max(self._peak, self.in_flight)
        self._entered += 1
        self._entered_cost += cost

    def _step(self, now_s: float) -> None:
        self.limiter.step(now_s, self._peak)
        self._peak = self.in_flight
        if self._entered:
            mean = self._entered_cost / self._entered
            self._mean_cost += (mean - self._mean_cost) * (_COST_SMOOTHING if self._mean_cost else 1.0)
            self._per_ms = 1 / self._mean_cost
            self._entered, self._entered_cost = 0, 0.0
