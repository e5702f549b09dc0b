"""What is kept in memory, least recently used out first, bounded by bytes; and how good a kept answer still is.

Pure: neither a clock nor a source of chance of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

from plait.registry.policies import CachePolicy

OVERHEAD_BYTES: Final = 200  # of one entry: its key, its record and its place in the tables

V = TypeVar("V")
Standing = Literal["fresh", "early", "stale", "gone"]


@dataclass(slots=True)
class Entry:
    """An answer in bytes: made at `made_s` (seconds, of the clock that is asked later), which took `took_s`.

    `position`: of the log of invalidations, up to which it is known to be untouched.
    """

    data: bytes
    made_s: float
    took_s: float
    position: int


def standing(age_s: float, took_s: float, policy: CachePolicy, chance: float) -> Standing:
    """Return how good an answer of this age still is; `chance` is uniform in (0, 1].

    "early" is a fresh one that this caller should have made anew: XFetch (Vattani, Chierichetti and Lowenstein, "Optimal probabilistic
    cache stampede prevention", VLDB 2015), so that a popular answer is renewed once, shortly before it runs out, and what takes longer
    to make is renewed earlier. "stale" is within the hard bound, "gone" beyond it.
    """
    if age_s > policy.ttl_s:
        return "stale" if age_s <= policy.ttl_s + policy.stale_s else "gone"
    early_s = -took_s * policy.early_refresh * math.log(chance)
    return "early" if early_s and age_s + early_s >= policy.ttl_s else "fresh"


class Entries(Generic[V]):
    """Values by key, at most `max_bytes` of them with their overhead; none larger than `max_entry_bytes` (default: a 64th) is taken."""

    def __init__(self, max_bytes: int, max_entry_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_bytes // 64 if max_entry_bytes is None else min(max_entry_bytes, max_bytes)
        self._held: OrderedDict[bytes, tuple[V, int]] = OrderedDict()
        self.size_bytes = 0

    def __repr__(self) -> str:
        return f"<Entries {len(self._held)} bytes={self.size_bytes}/{self._max_bytes}>"

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: bytes) -> V | None:
        """Return a value, which is then the last to go; None where there is none."""
        held = self._held.get(key)
        if held is None:
            return None
        self._held.move_to_end(key)
        return held[0]

    def put(self, key: bytes, value: V, size_bytes: int) -> bool:
        """Keep a value of so many bytes instead of an older one; return whether it is small enough to be kept."""
        self.drop(key)
        cost = size_bytes + OVERHEAD_BYTES
        if cost > self._max_entry_bytes:
            return False
        self._held[key] = (value, cost)
        self.size_bytes += cost
        while self.size_bytes > self._max_bytes:
            _, (_, freed) = self._held.popitem(last=False)
            self.size_bytes -= freed
        return True

    def drop(self, key: bytes) -> None:
        """Forget a value, if there is one."""
        held = self._held.pop(key, None)
        if held is not None:
            self.size_bytes -= held[1]
