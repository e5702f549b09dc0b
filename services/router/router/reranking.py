"""Business rules over candidates: what is dropped, what is lifted, and how often the same seller may stand at the top. Pure, and vectorised
where it can be.

`columns` is [candidates, columns of the rules feature set]; NaN is a value nobody knows, for which no rule holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Columns = NDArray[np.floating]
Mask = NDArray[np.bool_]
Scores = NDArray[np.float32]
Order = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """Holds for candidates whose number at `place` is within the bounds, both included."""

    __test__ = False  # (pytest takes the name for one of its own)

    name: str
    place: int
    at_least: float = -math.inf
    at_most: float = math.inf
    multiply: float = 1.0

    def holds(self, columns: Columns) -> Mask:
        """Return for which candidates it holds [candidates]."""
        values = columns[:, self.place]
        mask: Mask = (values >= self.at_least) & (values <= self.at_most)
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """At most `at_most` candidates with one number at `place` among the first `within`."""

    name: str
    place: int
    at_most: int
    within: int


def dropped(columns: Columns, filters: Sequence[Test]) -> tuple[Mask, dict[str, int]]:
    """Return which candidates any filter drops [candidates], and how many each one drops that none before it did."""
    gone = np.zeros(len(columns), np.bool_)
    by_rule: dict[str, int] = {}
    for test in filters:
        holds = test.holds(columns) & ~gone
        by_rule[test.name] = int(np.count_nonzero(holds))
        gone |= holds
    return gone, by_rule


def boosted(scores: Scores, columns: Columns, boosts: Sequence[Test]) -> tuple[Scores, dict[str, int]]:
    """Return the scores with each boost's factor applied where it holds, and to how many. A negative score is divided by it, so that a factor
    above 1 lifts whatever the sign."""
    lifted = scores.copy()
    by_rule: dict[str, int] = {}
    for test in boosts:
        holds = test.holds(columns)
        by_rule[test.name] = int(np.count_nonzero(holds))
        factor = np.float32(test.multiply)
        np.multiply(lifted, np.where(lifted < 0, 1 / factor, factor), out=lifted, where=holds)
    return lifted, by_rule


def spread(order: Order, columns: Columns, caps: Sequence[Cap]) -> tuple[Order, dict[str, int]]:
    """Return the order with what is over a cap put behind, and how many each cap held back.

    Greedy from the best: each place goes to the best candidate that no cap forbids there; where every one left is forbidden, to the best of
    them all the same, because a short answer helps nobody. What is not touched by a cap keeps its order.
    """
    if not caps:
        return order, {}
    groups = [columns[order, cap.place].tolist() for cap in caps]  # by rank
    counts: list[dict[float, int]] = [{} for _ in caps]
    by_rule = dict.fromkeys((cap.name for cap in caps), 0)
    placed: list[int] = []
    pending: list[int] = list(range(len(order)))

    def place(rank: int) -> None:
        placed.append(rank)
        for group, count in zip(groups, counts, strict=True):
            count[group[rank]] = count.get(group[rank], 0) + 1

    def forbids(rank: int) -> Cap | None:
        for cap, group, count in zip(caps, groups, counts, strict=True):
            value = group[rank]
            if len(placed) < cap.within and value == value and count.get(value, 0) >= cap.at_most:  # noqa: PLR0124  (NaN is in no group)
                return cap
        return None

    for limit in sorted({cap.within for cap in caps}):
        behind: list[int] = []
        for at, rank in enumerate(pending):
            if len(placed) >= limit:
                behind += pending[at:]
                break
            cap = forbids(rank)
            if cap is None:
                place(rank)
            else:
                by_rule[cap.name] += 1
                behind.append(rank)
        spare = max(0, limit - len(placed))
        for rank in behind[:spare]:
            place(rank)
        pending = behind[spare:]
    return order[np.array([*placed, *pending], np.intp)], by_rule
