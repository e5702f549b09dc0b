"""Whether a free instance waits a little for company, learnt from whether company comes and from what waiting costs.

Callers that were just answered tend to come back at once. A batch begun before they do is half empty, and each batch costs a fixed time
besides its rows. So after a batch a free instance waits for as many requests as are usually held at once, but only

- while fewer are held than that: a lone caller is all the company there is, and is never kept waiting;
- while the batch is so small that its fixed time matters beside that of its rows;
- while they keep coming, and never longer than the model's `max_queue_delay_ms` (Triton's bound of that name);
- while it pays: the time in which the process has nothing to do because it waits must stay below the fixed cost of a batch, which is what
  waiting saves (the trade of BentoML's dispatcher, bentoml/BentoML: `src/bentoml/_internal/marshal/dispatcher.py`, with its cost measured
  instead of assumed). Where the CPU is busy with the answers of the last batch, waiting costs nothing. Where it does not pay, it is tried
  again twice a second.

Pure: it is told the time, and the time in which the event loop had something to do (`busy_clock`), so tests need neither.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final, TypeVar

GAP_S: Final = 0.001  # when nobody came for that long, nobody is coming; an event loop's timers are no finer
_REMEMBERED: Final = 8  # batches; the median of their companies is expected
_RETRY_S: Final = 0.5
_LEAST_GAIN_S: Final = 50e-6  # what one batch costs the event loop, which the latency model does not see

T = TypeVar("T", int, float)


class QueueDelay:
    """The wait of one model. `most_s`: longest time a free instance waits (0 = never)."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._peaks: deque[int] = deque(maxlen=_REMEMBERED)
        self._peak = 0
        self._ended_s = -math.inf  # of the last batch
        self._ended_busy_s = 0.0
        self._costs: deque[float] = deque(maxlen=_REMEMBERED)
        self._cost_s = 0.0  # of a wait
        self._tried_s = -math.inf
        self._open = False  # company of the last batch may still come
        self._waited = False
        self.expected = 1

    def __repr__(self) -> str:
        return f"<QueueDelay for {self.expected} requests{' open' if self._open else ''}, costs {self._cost_s * 1e6:.0f} us>"

    @property
    def open(self) -> bool:
        """Whether company may still come; `expire` ends that."""
        return self._open and self.expected > 1

    def arrived(self, held: int) -> None:
        """A request came; `held` are here now, waiting or running."""
        self._peak = max(self._peak, held)

    def ended(self, now_s: float, busy_s: float) -> None:
        """A batch came back: whoever it answers may be back soon."""
        self._peaks.append(self._peak)
        self._peak = 0
        self.expected = _median(self._peaks)
        self._ended_s = now_s
        self._ended_busy_s = busy_s
        self._open = self._most_s > 0

    def holds(self, held: int, gain_s: float, now_s: float) -> bool:
        """Say whether to wait for more than the `held` requests; `gain_s` is the fixed cost of a batch."""
        if not self._open or held >= self.expected or now_s >= self._ended_s + self._most_s or not self._pays(gain_s, now_s):
            return False
        self._waited = True
        return True

    def expire(self) -> None:
        """Nobody came for `GAP_S`, in which the event loop was not held up."""
        self._open = False

    def started(self, now_s: float, busy_s: float) -> None:
        """A batch begins. If it was waited for, learn what that cost: the time in which this process had nothing to do."""
        self._open = False
        if self._waited:
            self._waited = False
            self._tried_s = now_s
            idle_s = max(0.0, (now_s - self._ended_s) - (busy_s - self._ended_busy_s))
            self._costs.append(idle_s)
            self._cost_s = _median(self._costs)

    def _pays(self, gain_s: float, now_s: float) -> bool:
        if self._waited or self._cost_s <= max(gain_s, _LEAST_GAIN_S):
            return True
        if now_s - self._tried_s < _RETRY_S:
            return False
        self._costs.clear()  # what it cost a while ago, with other callers, says nothing of now
        return True


def _median(values: Sequence[T]) -> T:
    return sorted(values)[len(values) // 2]
