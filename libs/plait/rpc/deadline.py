"""A deadline is a budget, spent once: set by the caller, seen by every hop as what is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(slots=True)  # nobody changes it; frozen would triple the cost of making one, and one is made per call
class Deadline:
    """A point on the monotonic clock, in seconds; infinite for "never"."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @classmethod
    def never(cls) -> Deadline:
        """Return a deadline that does not pass."""
        return cls(math.inf)

    def remaining_s(self) -> float:
        """Return what is left in seconds: negative once passed, infinite for never."""
        return self.at_s - time.monotonic()

    @property
    def expired(self) -> bool:
        """Whether nothing is left."""
        return self.remaining_s() <= 0

    def at_most(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and `seconds` from now."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))
