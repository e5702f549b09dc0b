"""Which snapshots of the registry writes still go by: one that has begun ends with what it knew, whatever this replica hears meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from plait.registry.records import Snapshot


class SnapshotsInUse:
    """Counts the writes under way by the revision of the snapshot they go by. `snapshot` gives the newest one."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._writes: Counter[int] = Counter()

    def __repr__(self) -> str:
        return f"<SnapshotsInUse oldest={self.oldest} writes={self._writes.total()}>"

    @property
    def oldest(self) -> int:
        """The revision of the oldest snapshot that any write goes by, from now on."""
        return min((*self._writes, self._snapshot().revision))

    @contextmanager
    def held(self) -> Iterator[Snapshot]:
        """Give the newest snapshot to a write, which goes by it until it leaves."""
        snapshot = self._snapshot()
        self._writes[snapshot.revision] += 1
        try:
            yield snapshot
        finally:
            self._writes[snapshot.revision] -= 1
            if not self._writes[snapshot.revision]:
                del self._writes[snapshot.revision]
