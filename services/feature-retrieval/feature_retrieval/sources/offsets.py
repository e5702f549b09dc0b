"""What may be committed: Kafka remembers one offset per partition, but messages are done with in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

Place = tuple[str, int, int]  # topic, partition, offset


class Offsets:
    """The messages that were delivered and not yet committed, by (topic, partition). Pure bookkeeping."""

    def __init__(self) -> None:
        self._delivered: dict[tuple[str, int], deque[tuple[int, int]]] = {}  # (offset, when it was appended)
        self._done: dict[tuple[str, int], set[int]] = {}
        self._newest_us: dict[tuple[str, int], int] = {}

    def __repr__(self) -> str:
        return f"<Offsets partitions={len(self._delivered)} open={sum(map(len, self._delivered.values()))}>"

    def delivered(self, place: Place, appended_us: int) -> None:
        """Note a message as handed out; a partition's offsets ascend."""
        self._delivered.setdefault(place[:2], deque()).append((place[2], appended_us))
        self._newest_us[place[:2]] = appended_us

    def done(self, places: Iterable[Place]) -> dict[tuple[str, int], int]:
        """Note messages as done with; return by partition the offset to commit, of those that moved on.

        That is the lowest one that is not done, or the one after the last delivered: a consumer that starts there misses nothing. Messages of
        partitions that were given up are not ours to commit any more.
        """
        touched = set()
        for topic, partition, offset in places:
            if (topic, partition) in self._delivered:
                self._done.setdefault((topic, partition), set()).add(offset)
                touched.add((topic, partition))
        moved: dict[tuple[str, int], int] = {}
        for where in touched:
            waiting, done = self._delivered[where], self._done[where]
            last = None
            while waiting and waiting[0][0] in done:
                last = waiting.popleft()[0]
                done.discard(last)
            if last is not None:
                moved[where] = waiting[0][0] if waiting else last + 1
        return moved

    def oldest(self, topic: str, partition: int) -> int | None:
        """Return the lowest offset that is not done, None where nothing is open."""
        waiting = self._delivered.get((topic, partition))
        return waiting[0][0] if waiting else None

    def reached_us(self, topic: str, partition: int) -> int:
        """Return until when everything that was appended is done, µs since the epoch; 0 = not known."""
        waiting = self._delivered.get((topic, partition))
        return waiting[0][1] - 1 if waiting else self._newest_us.get((topic, partition), 0)

    def give_up(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Forget partitions that another consumer has now."""
        for partition in partitions:
            for each in (self._delivered, self._done, self._newest_us):
                each.pop(partition, None)
