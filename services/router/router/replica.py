"""One endpoint as balancing sees it: its load, its speed, its failures, and since when. Pure: times come in as arguments."""

from __future__ import annotations

import math
from typing import Final

from router.outliers import Ejection, Window

_OTHERS_HALVE_S: Final = 0.1  # what a report says of other routers' calls weighs half after this
_OTHERS_GONE_S: Final = 2.0
_FORGET_S: Final = 2.0  # what was seen longer ago says nothing: an endpoint may have recovered, and nobody would know
_EWMA: Final = 0.3
_FAILING_EWMA: Final = 1 / 32
_FAILING: Final = 0.2
_COLDEST: Final = 0.1  # share of its calls that a new endpoint gets at first


class Replica:
    """One endpoint. `in_flight` is the caller's to count; `accepts` is false while it is not to get new calls."""

    __slots__ = (
        "_answered_at_s",
        "_base_s",
        "_failing",
        "_others",
        "_reported_at_s",
        "_row_s",
        "_tried_at_s",
        "_window",
        "accepts",
        "ejection",
        "in_flight",
        "loss",
        "name",
        "warm_from_s",
        "zone",
    )

    def __init__(self, name: str, *, zone: str = "", now_s: float = -math.inf) -> None:
        self.name = name
        self.zone = zone
        self.in_flight = 0
        self.accepts = True
        self.warm_from_s = now_s
        self.ejection = Ejection()  # because it fails
        self.loss = Ejection()  # because it cannot be reached
        self._window = Window()
        self._others = 0.0
        self._reported_at_s = -math.inf
        self._base_s = 0.0
        self._row_s = 0.0
        self._answered_at_s = -math.inf
        self._tried_at_s = -math.inf
        self._failing = 0.0

    def __repr__(self) -> str:
        failures = self.loss.in_a_row + self.ejection.in_a_row
        state = f"failing ({failures} in a row)" if failures else "up" if self.accepts else "not taking calls"
        return f"<{self.name} in_flight={self.in_flight} {state}>"

    @property
    def suspect(self) -> bool:
        """Whether it was lost or ejected and has not answered since."""
        return bool(self.loss.in_a_row or self.ejection.in_a_row)

    def avoided(self, now_s: float) -> bool:
        """Whether its time out is not over."""
        return self.loss.until_s > now_s or self.ejection.until_s > now_s

    def known(self, now_s: float) -> bool:
        """Whether it answered lately."""
        return now_s - self._answered_at_s <= _FORGET_S

    def load(self, now_s: float) -> float:
        """Return its calls in flight: ours, and what it said of others', which is the less worth the older it is."""
        if not self._others:
            return self.in_flight
        age_s = now_s - self._reported_at_s
        if age_s > _OTHERS_GONE_S:
            self._others = 0.0
            return self.in_flight
        weight: float = 0.5 ** (age_s / _OTHERS_HALVE_S)
        return self.in_flight + self._others * weight

    def base_s(self) -> float:
        """Return what a call takes beyond the computing of its rows: queue, network and the rest, seconds."""
        return self._base_s

    def expected_s(self, rows: int, now_s: float, otherwise_s: float = 0.0) -> float:
        """Return how long a call of so many rows takes, seconds; `otherwise_s` stands in for the base while nothing is known lately."""
        return (self._base_s if self.known(now_s) else otherwise_s) + rows * self._row_s

    def failing(self, now_s: float) -> bool:
        """Whether more than a fifth of about the last 32 calls failed or were refused. One that fails fast looks idle, and is not."""
        return self._failing > _FAILING and now_s - self._tried_at_s <= _FORGET_S

    def warmth(self, now_s: float, slow_start_s: float) -> float:
        """Return the share of its calls it is to get by its age, 0.1 to 1."""
        age_s = now_s - self.warm_from_s
        return 1.0 if not slow_start_s or age_s >= slow_start_s else max(_COLDEST, age_s / slow_start_s)

    def reported(self, in_flight: int, row_s: float, now_s: float) -> None:
        """Take what it said of itself: calls under way, whoever's they are, and seconds one row computes."""
        self._others = max(0.0, float(in_flight - self.in_flight))
        self._reported_at_s = now_s
        self._row_s = row_s

    def answered(self, took_s: float, rows: int, now_s: float) -> None:
        """Count an answer."""
        base_s = max(0.0, took_s - rows * self._row_s)
        self._base_s = self._base_s + _EWMA * (base_s - self._base_s) if self.known(now_s) else base_s
        self._answered_at_s = now_s
        self._outcome(now_s, against=0.0)
        self._window.count(now_s, failed=False)

    def overdue(self, waited_s: float, rows: int, now_s: float) -> None:
        """Count a call that was given up after so long: all that is known is that it would have taken longer."""
        base_s = waited_s - rows * self._row_s
        if base_s > self._base_s or not self.known(now_s):
            self._base_s = self._base_s + _EWMA * (base_s - self._base_s) if self.known(now_s) else max(0.0, base_s)
            self._answered_at_s = now_s

    def refused(self, now_s: float) -> None:
        """Count a call it turned away: no fault, but no reason to send more."""
        self._outcome(now_s, against=1.0)
        self._window.count(now_s, failed=False)

    def failed(self, now_s: float) -> bool:
        """Count a failure of its own; return whether it fails so often that it should be ejected."""
        self._outcome(now_s, against=1.0)
        self._window.count(now_s, failed=True)
        return self._window.bad(now_s)

    def sent_off(self, until_s: float) -> None:
        """It is avoided until then, starts slowly afterwards, and is judged anew."""
        self._window.clear()
        self._failing = 0.0
        self.warm_from_s = until_s

    def back(self) -> None:
        """It is well again."""
        self.loss.end()
        self.ejection.end()

    def _outcome(self, now_s: float, against: float) -> None:
        before = self._failing if now_s - self._tried_at_s <= _FORGET_S else 0.0
        self._failing = before + _FAILING_EWMA * (against - before)
        self._tried_at_s = now_s
