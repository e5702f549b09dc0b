"""When a model version that keeps failing is taken out, and how it comes back. Pure: every time is given.

A circuit breaker (Nygard, "Release It!", 2nd ed., ch. 5: closed, open, half-open) around each version. What ejects, and for how long, follows
outlier detection as Envoy and gRPC have it (gRFC A50): a share of recent traffic rather than a lone failure, and a time out that doubles
when a version fails again soon after it came back.

Who is at fault, the model or the request? A batch that fails is run again by halves until one request is alone (`schedule`), and only then
a fault is counted, once; the halves that succeed count as successes. So among other callers' requests one poisoned request stays a small
part of what was computed, however often it is sent: in a batch of eight it leaves one fault beside three successes. A version is taken out
when `faults` of its last `window` outcomes were faults (half, by default), all younger than `window_s`: a caller whose requests are
poisoned has to make up half of the traffic for that, and then the breaker cannot tell it from a broken model. It then errs on the side of
every caller who would be failed slowly; the self-test, which the model passed before, brings it back after the back-off. A hang and a
lost instance cost everybody who waits, so `severe` of them suffice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What a model did wrong, and whether it cost more than its own callers."""

    EXECUTION = "EXECUTION"  # it raised
    NOT_FINITE = "NOT_FINITE"  # it answered NaN or infinity
    WRONG_OUTPUT = "WRONG_OUTPUT"  # its answer was not what the signature says
    HANG = "HANG"  # one forward pass took longer than its budget
    INSTANCE_LOST = "INSTANCE_LOST"  # its process ended

    @property
    def severe(self) -> bool:
        """Whether others than the callers of the batch had to suffer for it."""
        return self in (Fault.HANG, Fault.INSTANCE_LOST)


class Phase(Enum):
    """CLOSED: in service. OPEN: out, until the back-off ends. HALF_OPEN: out, its self-test is running."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A version is taken out at `faults` faults, or `severe` severe ones, among its last `window` outcomes, none older than `window_s`
    seconds. `faults` = 0: never. The first time out is `backoff_s`, doubling up to `max_backoff_s` (also the time of good behaviour after
    which the count starts anew)."""

    faults: int = 10
    severe: int = 3
    window: int = 20
    window_s: float = 300.0
    backoff_s: float = 5.0
    max_backoff_s: float = 300.0


class Breaker:
    """One version's record. Times are seconds on any one monotonic clock."""

    __slots__ = ("_back_since_s", "_backoff_s", "_faults", "_outcomes", "failed_tests", "opened", "phase", "rule", "until_s")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.phase = Phase.CLOSED
        self.until_s = 0.0
        self.opened = 0
        self.failed_tests = 0
        self._backoff_s = 0.0
        self._back_since_s = 0.0
        self._outcomes = 0
        self._faults: deque[tuple[int, float, Fault]] = deque()  # (number of the outcome, when, what), oldest first

    def __repr__(self) -> str:
        return (
            f"<Breaker {self.phase.value} faults={len(self._faults)}/{self.rule.faults} opened={self.opened} backoff={self._backoff_s:g}>"
        )

    def success(self) -> None:
        """A batch was computed. Nearly free while there are no faults."""
        if not self._faults:
            return
        self._outcomes += 1
        if self._faults[0][0] <= self._outcomes - self.rule.window:
            self._faults.popleft()

    def fault(self, kind: Fault, now_s: float) -> bool:
        """A batch failed whose request, or whole, is at fault. Return whether that takes the version out now.

        What still fails of a version that is out already says nothing new and is not counted.
        """
        if self.phase is not Phase.CLOSED:
            return False
        self._outcomes += 1
        self._faults.append((self._outcomes, now_s, kind))
        while self._faults[0][0] <= self._outcomes - self.rule.window or self._faults[0][1] < now_s - self.rule.window_s:
            self._faults.popleft()
        if not self._too_many():
            return False
        again_soon = self._backoff_s > 0 and now_s - self._back_since_s < self.rule.max_backoff_s
        self._open(now_s, self._backoff_s * 2 if again_soon else self.rule.backoff_s)
        return True

    def test(self) -> None:
        """The self-test begins."""
        self.phase = Phase.HALF_OPEN

    def test_failed(self, now_s: float) -> None:
        """It failed: the version stays out twice as long as the last time."""
        self.failed_tests += 1
        self._open(now_s, self._backoff_s * 2)

    def restored(self, now_s: float) -> None:
        """The version is back, tested or loaded anew."""
        self.phase = Phase.CLOSED
        self.failed_tests = 0
        self._back_since_s = now_s
        self._faults.clear()

    def retry_after_s(self, now_s: float) -> float:
        """Return how long a caller should wait, in seconds."""
        return max(0.1, self.until_s - now_s)

    def reason(self) -> str:
        """Return what it was taken out for, in a few words."""
        kinds = sorted({kind.value for _, _, kind in self._faults})
        return f"{len(self._faults)} of its last {self.rule.window} batches failed ({', '.join(kinds)})"

    def _too_many(self) -> bool:
        if not self.rule.faults:
            return False
        return len(self._faults) >= self.rule.faults or sum(kind.severe for _, _, kind in self._faults) >= self.rule.severe

    def _open(self, now_s: float, backoff_s: float) -> None:
        if self.phase is Phase.CLOSED:
            self.opened += 1
        self.phase = Phase.OPEN
        self._backoff_s = min(max(backoff_s, self.rule.backoff_s), self.rule.max_backoff_s)
        self.until_s = now_s + self._backoff_s


class Health:
    """What a batcher tells about its version, once per batch, on the event loop. `tripped` is called when that takes the version out."""

    __slots__ = ("_breaker", "_clock", "_tripped", "success")

    def __init__(self, breaker: Breaker, tripped: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._breaker = breaker
        self._tripped = tripped
        self._clock = clock
        self.success = breaker.success

    def fault(self, kind: Fault) -> None:
        """Count one fault of the model. `kind` says which."""
        if self._breaker.fault(kind, self._clock()):
            self._tripped()
