"""How long a batch will take, learnt from the last ones: duration(rows) = a·rows + b.

BentoML's dispatcher fits the same line (bentoml/BentoML: `src/bentoml/_internal/marshal/dispatcher.py`, class Optimizer);
refusing by prediction is Clockwork's idea (Gujarati et al., OSDI '20).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

WINDOW: Final = 50  # batches
MIN_BATCHES: Final = 3
TRUST_S: Final = 1.0


class LatencyModel:
    """Least squares over the last 50 batches, kept as running sums so that learning costs the same however many there are.

    Before three batches were seen it predicts 0, and an estimate that no batch confirmed for a second is not trusted to refuse anyone:
    otherwise one slow batch could make a worker refuse everybody and never learn better.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque()
        self._n = self._nn = 0  # exact: rows are integers
        self._s = self._ns = 0.0
        self._last_s = -math.inf
        self.per_row_s = 0.0
        self.per_batch_s = 0.0

    def __repr__(self) -> str:
        return f"<LatencyModel {self.per_row_s * 1e6:.3g} us/row + {self.per_batch_s * 1e3:.3g} ms over {len(self._seen)} batches>"

    def observe(self, rows: int, duration_s: float, now_s: float) -> None:
        """Learn that a batch of `rows` took `duration_s`."""
        self._add(rows, duration_s, 1)
        self._seen.append((rows, duration_s))
        if len(self._seen) > WINDOW:
            self._add(*self._seen.popleft(), -1)
        self._last_s = now_s
        self._fit()

    def trusted(self, now_s: float) -> bool:
        """Say whether the estimate is fresh enough to refuse somebody because of it."""
        return len(self._seen) >= MIN_BATCHES and now_s - self._last_s <= TRUST_S

    def predict_s(self, rows: int, batches: int = 1) -> float:
        """Return how long `rows` in that many batches take."""
        return self.per_row_s * rows + self.per_batch_s * batches

    def _add(self, rows: int, duration_s: float, sign: int) -> None:
        self._n += sign * rows
        self._nn += sign * rows * rows
        self._s += sign * duration_s
        self._ns += sign * rows * duration_s

    def _fit(self) -> None:
        count = len(self._seen)
        if count < MIN_BATCHES:
            return
        spread = count * self._nn - self._n * self._n
        slope = (count * self._ns - self._n * self._s) / spread if spread else 0.0
        self.per_row_s = max(0.0, slope)
        self.per_batch_s = max(0.0, (self._s - self.per_row_s * self._n) / count)
