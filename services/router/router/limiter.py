"""How many requests may be under way: as many as the workers take before their queues grow, found by watching those queues."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

STEP_S: Final = 0.1
MIN_SAMPLES: Final = 10  # of a mean that is worth something
_WINDOW_S: Final = 60.0
_QUEUE: Final = 1.0  # forward passes that a request may wait before the limit falls: one is under way while the next one fills
_DELIBERATE_MS: Final = 10.0  # of a queue may be a worker's own wait for a fuller batch
_FAR: Final = 10.0  # times what a worker takes when there is little to do; batches that may grow without end are held here
_SMOOTHING: Final = 0.2
_COLLAPSE: Final = 0.5  # of what is under way is let in where more requests fail for want of time or place than are answered
_HOLD_S: Final = 0.3  # after which that is looked at again: what fails until then was let in before
_GROWTH: Final = 0.25  # times the root of the limit, the room for a queue that is kept full
_START_GROWTH: Final = 1.25  # a step, until a queue has been seen


class Least:
    """The least of the values of the last minute."""

    __slots__ = ("_rising",)

    def __init__(self) -> None:
        self._rising: deque[tuple[float, float]] = deque()  # (when, value), values rising: the first is the least

    def of(self, value: float, now_s: float) -> float:
        """Add a value and return the least."""
        rising = self._rising
        while rising and rising[-1][1] >= value:
            rising.pop()
        rising.append((now_s, value))
        while rising[0][0] < now_s - _WINDOW_S:
            rising.popleft()
        return rising[0][1]


class Window:
    """What a worker took for like requests (one arm, one size) since the last step, in milliseconds."""

    __slots__ = ("_least_ms", "_least_queue_ms", "compute_ms", "count", "queue_ms")

    def __init__(self) -> None:
        self.count = 0
        self.queue_ms = 0.0
        self.compute_ms = 0.0
        self._least_ms = Least()
        self._least_queue_ms = Least()

    def close(self, now_s: float) -> float:
        """End a step and begin the next; return the pressure: above 1 where requests wait longer than makes batches fuller."""
        queue, compute = self.queue_ms / self.count, self.compute_ms / self.count
        self.count, self.queue_ms, self.compute_ms = 0, 0.0, 0.0
        least, least_queue = self._least_ms.of(queue + compute, now_s), self._least_queue_ms.of(queue, now_s)
        fair = _QUEUE * max(compute, min(least_queue, _DELIBERATE_MS))
        return max(queue / fair if fair else 0.0, (queue + compute) / (_FAR * least) if least else 0.0)


class Limiter:
    """A gradient limit in the manner of Netflix's concurrency-limits (`GradientLimit`, `Gradient2Limit`), with another gradient.

    Theirs compares round trips with earlier ones. A worker that batches takes several times as long under load as alone and is the better
    for it, and a long average learns lasting overload as normal. So a worker's own words are compared with each other: how long requests
    wait for a forward pass, and how long that pass takes. One pass of waiting is what it takes to never idle, more is of no use to anybody
    (Clipper, NSDI 2017, holds its batches by such a rule). Nothing need be remembered for that, so a change of the mix of requests, of the
    model or of the machines is no change of load. Until a queue has been seen for the first time the limit grows by a quarter a step, as
    TCP's window does at its start.
    """

    def __init__(self, *, start: int, least: int, most: int) -> None:
        """Bounds in requests of mean cost; `start` is brought between the two."""
        self._least = least
        self._most = most
        self._estimate = float(max(least, min(start, most)))
        self.limit = int(self._estimate)
        self.pass_ms = 0.0  # what a forward pass took in the last step, over all arms; 0 = not known yet
        self._touched: set[Window] = set()
        self.samples = 0  # heard since the last step
        self._dropped = 0
        self._congested = False
        self._next_s = 0.0
        self._held_until_s = 0.0

    def __repr__(self) -> str:
        return f"<Limiter {self.limit} of {self._least}..{self._most} pass_ms={self.pass_ms:.1f}>"

    def sample(self, window: Window, queue_ms: float, compute_ms: float) -> None:
        """Hear what a worker took for one request."""
        window.queue_ms += queue_ms
        window.compute_ms += compute_ms
        window.count += 1
        self.samples += 1
        self._touched.add(window)

    def dropped(self) -> None:
        """Hear that a worker was too busy for a request."""
        self._dropped += 1

    def due(self, now_s: float) -> bool:
        """Whether it is time for a step."""
        return now_s >= self._next_s and self.samples + self._dropped >= MIN_SAMPLES

    def step(self, now_s: float, peak: float) -> None:
        """Set the limit by what was heard since the last step, and by the most that was under way in it."""
        self._next_s = now_s + STEP_S
        full = [window for window in self._touched if window.count >= MIN_SAMPLES]
        self._touched.difference_update(full)
        count = sum(window.count for window in full)
        if count:
            self.pass_ms = sum(window.compute_ms for window in full) / count
        pressure = 2.0 * self._dropped  # each counts as an answer that waited twice as long as it should
        for window in full:
            samples = window.count
            pressure += samples * window.close(now_s)
        heard, collapsed = count + self._dropped, self._dropped > count
        self.samples = sum(window.count for window in self._touched)
        self._dropped = 0
        if collapsed:  # no time for smoothing
            if now_s >= self._held_until_s:
                self._congested = True
                self._set(_COLLAPSE * min(self._estimate, peak))
                self._held_until_s = now_s + _HOLD_S
        elif heard and peak >= self._estimate / 2:
            self._move(max(0.5, min(1.0, heard / pressure)) if pressure else 1.0)

    def _move(self, gradient: float) -> None:
        self._congested = self._congested or gradient < 1
        if self._congested:
            wanted = self._estimate * gradient + _GROWTH * math.sqrt(self._estimate)
            estimate = (1 - _SMOOTHING) * self._estimate + _SMOOTHING * wanted
        else:
            estimate = _START_GROWTH * self._estimate
        self._set(estimate)

    def _set(self, estimate: float) -> None:
        self._estimate = max(float(self._least), min(float(self._most), estimate))
        self.limit = int(self._estimate)
