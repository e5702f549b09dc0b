"""The seam between whoever holds rows and whoever wants them: one method, and one answer that tells found, late and failed apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from plait.errors import Unavailable

Positions = npt.NDArray[np.intp]

NONE: Final[Positions] = np.empty(0, np.intp)
NONE.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Read:
    """Rows parallel to the keys asked for, None where there is no row, or none is known.

    `late`: positions of keys not answered in time; `failed`: of those whose node could not be reached or answered with an error. Both
    ascend and share no position; nothing is known of these keys, of all others the truth. They need not be a prefix or a suffix: nodes
    answer apart.
    """

    rows: list[bytes | None]
    late: Positions = field(default_factory=lambda: NONE)
    failed: Positions = field(default_factory=lambda: NONE)

    @property
    def whole(self) -> bool:
        """Whether every key was answered."""
        return not (self.late.size or self.failed.size)

    def check_whole(self) -> None:
        """Raise Unavailable (STORE_UNAVAILABLE) unless every key was answered: for work that must not pass over any."""
        if not self.whole:
            raise Unavailable(
                f"{self.late.size + self.failed.size} of {len(self.rows)} rows could not be read: try again", reason="STORE_UNAVAILABLE"
            )


class Rows(Protocol):
    """Where rows come from: a store, or something in front of one."""

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys`. At the time-out what has arrived is kept; raises Unavailable where nothing could be asked at all."""
        ...
