"""The seam of columns that are not stored as they are answered: a row holds a state, and its value depends on when it is asked for."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import Bytes2D


class Computed(Protocol):
    """One such column of one schema."""

    def fill(self, block: Bytes2D, now_us: int, out: npt.NDArray[np.float64]) -> None:
        """Put the value of each of [rows, row_bytes] rows at `now_us` (µs since the epoch) into `out` [rows]."""
        ...
