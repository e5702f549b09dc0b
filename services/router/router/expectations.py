"""How long a model may be expected to take, learnt from how long it took: what the ladder decides by."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from router.route_table import Arm

_SAMPLES: Final = 256
_FRESH_S: Final = 10.0  # what was longer ago says nothing: a model nobody dared to ask is asked again
_AGAIN_S: Final = 0.1  # how long a figure is good for
_SHARE: Final = 0.9
_MOST: Final = 1_024  # of what is remembered
_FEW: Final = 5  # fewer durations say nothing
_PROBE_S: Final = 1.0


class _Durations:
    """The last durations of one model for one size of request."""

    __slots__ = ("figure_s", "figured_s", "probed_s", "probing", "samples")

    def __init__(self) -> None:
        self.probed_s = float("-inf")
        self.probing = False
        self.samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)  # (when, how long)
        self.figure_s = 0.0
        self.figured_s = float("-inf")


class Expectations:
    """The 90th percentile of features and model together, by model version and by the size of the request (its rows, in powers of two).

    A model that is expected to take too long is nevertheless asked now and then (`probe`); once it answers, what was before is forgotten.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[tuple[str, str, int], _Durations] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Expectations known={len(self._known)}>"

    def learn(self, arm: Arm, rows: int, took_s: float, *, answered: bool = True) -> None:
        """Note how long an answer took, or how long one was waited for in vain."""
        key = (arm.model, arm.version, rows.bit_length())
        durations = self._known.get(key)
        if durations is None:
            durations = self._known[key] = _Durations()
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        if durations.probing and answered:
            durations.samples.clear()
            durations.probing, durations.figured_s = False, float("-inf")
        durations.samples.append((self._clock(), took_s))

    def expected_s(self, arm: Arm, rows: int) -> float:
        """Return how long an answer may be expected to take, seconds; 0 where nothing recent is known."""
        durations = self._known.get((arm.model, arm.version, rows.bit_length()))
        if durations is None:
            return 0.0
        now = self._clock()
        if now - durations.figured_s >= _AGAIN_S:
            durations.figured_s = now
            fresh = sorted(took for when, took in durations.samples if now - when <= _FRESH_S)
            durations.figure_s = fresh[int(_SHARE * (len(fresh) - 1))] if len(fresh) >= _FEW else 0.0
        return durations.figure_s

    def probe(self, arm: Arm, rows: int) -> bool:
        """Whether to ask a model although it is expected to take too long: true once a second, so that one that is well again is found out."""
        durations = self._known.get((arm.model, arm.version, rows.bit_length()))
        if durations is None or self._clock() - durations.probed_s < _PROBE_S:
            return False
        durations.probed_s, durations.probing = self._clock(), True
        return True
