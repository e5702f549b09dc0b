"""The order of an answer: best first, equal scores in the caller's order, NaN last."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# Below this many times top_k a full sort is as fast as a partition.
_PARTITION_PAYS: Final = 8


def best_first(scores: NDArray[np.float32], top_k: int) -> NDArray[np.intp]:
    """Return the indices of the `top_k` (0 = all) best of `scores` [N], best first; stable, NaN last."""
    keys = -scores  # numpy sorts NaN to the end
    if not 0 < top_k < len(keys):
        return np.argsort(keys, kind="stable")
    if top_k * _PARTITION_PAYS > len(keys):
        return np.argsort(keys, kind="stable")[:top_k]
    worst = np.partition(keys, top_k - 1)[top_k - 1]
    if np.isnan(worst):
        return np.argsort(keys, kind="stable")[:top_k]
    kept = np.flatnonzero(keys <= worst)  # in the caller's order; more than top_k where the last place is tied
    return kept[np.argsort(keys[kept], kind="stable")[:top_k]]
