"""Which endpoint gets the next call. Pure: numbers in, a choice out; `connections` does the calling.

Two endpoints are drawn (Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 2001) and compared by the rule
hot-cold-lexicographic of Prequal (Wydrowski et al., "Load is not what you should balance", NSDI 2024): one whose calls in flight stand out
is hot and loses; of two cold ones the faster wins, of two hot ones the one with fewer calls. What "faster" means is ours: Prequal's fleets
have thousands of replicas, where the estimate alone spreads calls well enough; a pool here may have three, so the calls that are ahead count
as well (as in Finagle's peak EWMA; by their root, since the time that was measured holds a part of them already).

What an endpoint says of itself comes with its answers; nothing is probed for it.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from router.replica import Replica

_LOOK_S: Final = 0.01  # how old the view over all endpoints may be
_HOT_QUANTILE: Final = 0.84
_CROWD: Final = 2.0  # times the mean; of three endpoints the busiest is always at the quantile, and need not stand out
_NEVER_HOT: Final = 4.0  # calls in flight; so few are no crowd, whatever the others have
_LEAST_S: Final = 1e-6
_ZONE_READY: Final = 0.7
_ZONE_BUSY: Final = 1.5


class Balancer:
    """Picks endpoints, and remembers how each did.

    `zone`: the caller's own, preferred while it has room. A new endpoint gets its full share only after `slow_start_s`, and so does one
    that was avoided (as in Envoy). One that cannot be reached is avoided for `ejection_s`, doubling up to `max_ejection_s`; so is one that
    fails (`outliers`), as long as at most half of them are. While all are avoided, none is. `random_` and `clock` are seams for tests.
    """

    def __init__(
        self,
        *,
        ejection_s: float = 0.5,
        max_ejection_s: float = 30.0,
        slow_start_s: float = 10.0,
        zone: str = "",
        random_: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas: tuple[Replica, ...] = ()
        self._usable: Sequence[Replica] = ()
        self._ejection_s = ejection_s
        self._max_ejection_s = max_ejection_s
        self._slow_start_s = slow_start_s
        self._zone = zone
        self._random = random_
        self._clock = clock
        self._look_at_s = -math.inf
        self._hot = _NEVER_HOT
        self._median_s = 0.0

    def __repr__(self) -> str:
        return f"<Balancer {list(self._replicas)}>"

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All endpoints, avoided ones included."""
        return self._replicas

    def add(self, name: str, zone: str = "", *, warm: bool = False) -> Replica:
        """Return a new endpoint; a warm one gets its full share at once, as those do that are there from the beginning."""
        replica = Replica(name, zone=zone, now_s=-math.inf if warm else self._clock())
        self._replicas = (*self._replicas, replica)
        self.changed()
        return replica

    def remove(self, replica: Replica) -> None:
        """Pick it no more."""
        self._replicas = tuple(r for r in self._replicas if r is not replica)
        self.changed()

    def changed(self) -> None:
        """Look at all of them again at the next pick: one accepts, or accepts no more."""
        self._look_at_s = -math.inf

    def pick(self, rows: int = 1, avoid: Collection[Replica] = ()) -> Replica | None:
        """Return the endpoint for a call of so many rows, another one than those of `avoid` wherever there is another; None where there
        is none at all."""
        now_s = self._clock()
        if now_s >= self._look_at_s:
            self._look(now_s)
        usable = self._usable
        if avoid:
            usable = [r for r in usable if r not in avoid] or self._anybody_but(avoid) or usable
        count = len(usable)
        if count < 2:
            return usable[0] if count else None
        first = int(self._random() * count)
        second = (first + 1 + int(self._random() * (count - 1))) % count
        return self._better(usable[first], usable[second], rows, now_s)

    def expected_s(self, replica: Replica, rows: int) -> float:
        """Return how long a call of so many rows is likely to take there, seconds; 0 while nothing is known of any."""
        return replica.expected_s(rows, self._clock(), self._median_s)

    def answered(self, replica: Replica, took_s: float, rows: int) -> bool:
        """Count an answer that took so long; return whether it is the first one after the endpoint was avoided."""
        now_s = self._clock()
        replica.answered(took_s, rows, now_s)
        if not replica.suspect or now_s < replica.ejection.until_s:
            return False  # (an answer to a call from before the ejection: it has to stand the test of new ones)
        replica.back()
        self.changed()
        return True

    def reached(self, replica: Replica) -> None:
        """It answered a question that was no call: it is there, whatever it does with calls. From now on it starts slowly."""
        if replica.loss.in_a_row:
            replica.loss.end()
            replica.warm_from_s = self._clock()
            self.changed()

    def overdue(self, replica: Replica, waited_s: float, rows: int) -> None:
        """Count a call that was given up after so long."""
        replica.overdue(waited_s, rows, self._clock())

    def refused(self, replica: Replica) -> None:
        """Count a call that was turned away."""
        replica.refused(self._clock())

    def failed(self, replica: Replica) -> float:
        """Count a failure that says something of the endpoint; return for how many seconds it is avoided from now on, mostly 0."""
        now_s = self._clock()
        if not replica.failed(now_s):
            return 0.0
        ejected = sum(r.ejection.until_s > now_s for r in self._replicas)
        if 2 * (ejected + 1) > len(self._replicas):
            return 0.0
        return self._send_off(replica, replica.ejection.eject(now_s, self._ejection_s, self._max_ejection_s), now_s)

    def lost(self, replica: Replica) -> float:
        """Avoid an endpoint that could not be reached; return for how many seconds, 0 when it is avoided already."""
        now_s = self._clock()
        return self._send_off(replica, replica.loss.eject(now_s, self._ejection_s, self._max_ejection_s), now_s)

    def _send_off(self, replica: Replica, for_s: float, now_s: float) -> float:
        if for_s:
            replica.sent_off(now_s + for_s)
            self.changed()
        return for_s

    def _anybody_but(self, avoid: Collection[Replica]) -> list[Replica]:
        others = [r for r in self._replicas if r not in avoid]
        return [r for r in others if r.accepts] or others

    def _look(self, now_s: float) -> None:
        """Work out what holds for all: who can be picked, how many calls are a crowd, what the usual estimate is."""
        present = [r for r in self._replicas if r.accepts] or self._replicas
        up = [r for r in present if not r.avoided(now_s)]
        usable: Sequence[Replica] = self._near(up, now_s) if self._zone and up else up or present
        self._look_at_s = min([now_s + _LOOK_S, *(max(r.loss.until_s, r.ejection.until_s) for r in present if r.avoided(now_s))])
        self._usable = usable
        if usable:
            loads = sorted(r.load(now_s) for r in usable)
            crowd = _CROWD * sum(loads) / len(loads)
            self._hot = max(_NEVER_HOT, crowd, loads[math.ceil(_HOT_QUANTILE * len(loads)) - 1])
        known = [r.base_s() for r in usable if r.known(now_s)]
        self._median_s = statistics.median_low(known) if known else 0.0

    def _near(self, up: Sequence[Replica], now_s: float) -> Sequence[Replica]:
        """Keep to the own zone while it is about as healthy as all of them, and not much busier."""
        near = [r for r in up if r.zone == self._zone]
        known = sum(r.zone == self._zone for r in self._replicas)
        if not near or len(near) / known < _ZONE_READY * len(up) / len(self._replicas):
            return up
        busy = sum(r.load(now_s) for r in near) / len(near)
        overall = sum(r.load(now_s) for r in up) / len(up)
        return near if busy <= max(_NEVER_HOT, _ZONE_BUSY * overall) else up

    def _better(self, a: Replica, b: Replica, rows: int, now_s: float) -> Replica:
        load_a, load_b = a.load(now_s), b.load(now_s)
        hot_a = load_a > self._hot or a.failing(now_s)
        hot_b = load_b > self._hot or b.failing(now_s)
        if hot_a != hot_b:
            return b if hot_a else a
        cost_a, cost_b = (load_a + 1.0) / a.warmth(now_s, self._slow_start_s), (load_b + 1.0) / b.warmth(now_s, self._slow_start_s)
        if not hot_a:
            cost_a = math.sqrt(cost_a) * (a.expected_s(rows, now_s, self._median_s) + _LEAST_S)
            cost_b = math.sqrt(cost_b) * (b.expected_s(rows, now_s, self._median_s) + _LEAST_S)
        return b if cost_b < cost_a else a
