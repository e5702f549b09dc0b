"""Which replica gets the next call. Pure: numbers in, a choice out; `connections` does the calling."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence


class Replica:
    """One stream to one replica, as balancing sees it: its load, and how long it is to be avoided."""

    __slots__ = ("ejected_until", "failures", "in_flight", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_flight = 0
        self.failures = 0  # in a row, and at most one per ejection
        self.ejected_until = 0.0

    def __repr__(self) -> str:
        state = f"failing ({self.failures} in a row)" if self.failures else "up"
        return f"<{self.name} in_flight={self.in_flight} {state}>"


class Balancer:
    """Picks by the power of two choices (Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 2001): of two
    replicas drawn at random, the one with fewer calls in flight.

    A replica that failed is ejected for `ejection_s`, twice as long each time it fails again, up to `max_ejection_s` (after gRFC A50);
    while all are ejected, none is. `random_` and `clock` are seams for tests.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        ejection_s: float,
        max_ejection_s: float,
        random_: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = tuple(replicas)
        self._ejection_s = ejection_s
        self._max_ejection_s = max_ejection_s
        self._random = random_
        self._clock = clock
        self._any_ejected = False

    def __repr__(self) -> str:
        return f"<Balancer {list(self._replicas)}>"

    def pick(self, avoid: Replica | None = None) -> Replica:
        """Return the replica for the next call, another one than `avoid` wherever there is another."""
        usable: Sequence[Replica] = self._replicas
        if self._any_ejected:
            usable = self._not_ejected()
        if avoid is not None:
            usable = [r for r in usable if r is not avoid] or [r for r in self._replicas if r is not avoid] or self._replicas
        count = len(usable)
        if count == 1:
            return usable[0]
        first = int(self._random() * count)
        second = (first + 1 + int(self._random() * (count - 1))) % count
        a, b = usable[first], usable[second]
        return b if b.in_flight < a.in_flight else a

    def failed(self, replica: Replica) -> float:
        """Eject a replica that could not be reached; return for how many seconds, 0 when it is ejected already."""
        now = self._clock()
        if now < replica.ejected_until:
            return 0.0  # every call in flight fails when a stream breaks; that is one failure
        ejection_s: float = min(self._ejection_s * 2.0 ** min(replica.failures, 30), self._max_ejection_s)
        replica.failures += 1
        replica.ejected_until = now + ejection_s
        self._any_ejected = True
        return ejection_s

    def succeeded(self, replica: Replica) -> None:
        """Take a replica back: it answered."""
        replica.failures = 0
        replica.ejected_until = 0.0

    def _not_ejected(self) -> Sequence[Replica]:
        now = self._clock()
        usable = [r for r in self._replicas if r.ejected_until <= now]
        self._any_ejected = len(usable) < len(self._replicas)
        return usable or self._replicas
