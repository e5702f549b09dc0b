"""What a request will cost: the milliseconds a model needs for so many rows, learnt from the answers."""

from __future__ import annotations

from typing import Final

from router.limiter import Window

_START_A_MS: Final = 1.0
_START_B_MS: Final = 0.002  # per thousand cells
_DECAY: Final = 0.98  # of what was learnt before, per answer: half is forgotten after 34
_BEHIND_SMOOTHING: Final = 0.05
_LEAST_MS: Final = 0.001
_SIZES: Final = 33


class Line:
    """One model version's cost: a + b × rows, least squares over its last answers, a and b never below nothing.

    `a` and `b` may be read in place of `of`, which is what the hot path does.
    """

    __slots__ = ("_n", "_windows", "_x", "_xx", "_xy", "_y", "a", "b", "behind_s")

    def __init__(self, columns: int) -> None:
        self.a = _START_A_MS
        self.b = _START_B_MS * columns / 1000
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.behind_s = 0.0  # on average, of a request behind the gate; 0 = not known yet
        self._windows: list[Window | None] = [None] * _SIZES

    def of(self, rows: int) -> float:
        """Return the predicted milliseconds of so many rows."""
        return self.a + self.b * rows

    def window(self, rows: int) -> Window:
        """Return where the times of requests of about this size are kept."""
        size = min(rows.bit_length(), _SIZES - 1)
        window = self._windows[size]
        if window is None:
            window = self._windows[size] = Window()
        return window

    def took(self, seconds: float) -> None:
        """Hear how long a request was behind the gate."""
        self.behind_s += (seconds - self.behind_s) * (_BEHIND_SMOOTHING if self.behind_s else 1.0)

    def learn(self, rows: int, took_ms: float) -> None:
        """Hear what a request's own part of a forward pass took."""
        self._n = self._n * _DECAY + 1
        self._x = self._x * _DECAY + rows
        self._y = self._y * _DECAY + took_ms
        self._xx = self._xx * _DECAY + rows * rows
        self._xy = self._xy * _DECAY + rows * took_ms
        spread = self._n * self._xx - self._x * self._x
        mean = self._y / self._n
        if spread > 1e-6 * self._xx * self._n:  # else all were of one size, and tell nothing of others
            b = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
            a = mean - b * self._x / self._n
            if a < 0:  # through nothing, then
                a, b = 0.0, self._y / self._x
        else:
            share = self._x / self._n * self.b
            total = self.a + share
            a, b = (self.a * mean / total, self.b * mean / total) if total > 0 else (mean, 0.0)
        self.a, self.b = max(a, _LEAST_MS), b


class Costs:
    """The lines of all model versions that a snapshot serves."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], Line] = {}

    def line(self, model: str, version: str, columns: int) -> Line:
        """Return a version's line, a new one where there was none; `columns`: values per row of its inputs."""
        line = self._lines.get((model, version))
        if line is None:
            line = self._lines[model, version] = Line(columns)
        return line

    def keep(self, versions: set[tuple[str, str]]) -> None:
        """Forget the versions that are not served any more."""
        self._lines = {key: line for key, line in self._lines.items() if key in versions}
