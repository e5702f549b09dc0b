"""The seam of columns that are not stored as they are answered: a row holds a state, and its value depends on when it is asked for."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import Bytes2D


class Computed(Protocol):
    """One such column; `state` is its part of a block of rows, [rows, size_bytes]."""

    size_bytes: int

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_] | None]:
        """Return [rows] values at `now_us` (µs since the epoch), and which rows have one (None = all)."""
        ...
