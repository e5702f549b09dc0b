"""One view of one request while it is read: what the near cache knew, what was asked of the store, and the rows that came, by schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from feature_retrieval.near_cache import Found, Reading
from feature_retrieval.row_codec import HEADER_BYTES, Bytes2D, Id, KeySpace
from feature_retrieval.store.rows import NONE, Positions
from feature_retrieval.views import Picture, ViewPlan

Index = npt.NDArray[np.intp]
Block = tuple[Picture, Bytes2D, Index | None]  # rows of one schema, and where they belong (None = all rows, in order)


@dataclass(slots=True)
class ViewRead:
    """Which ids are still wanted from the store, and what is known of the others."""

    view: ViewPlan
    ids: Sequence[Id]
    space: KeySpace
    found: Found | None  # in the near cache
    wanted: Index | None = None  # positions asked from the store; None = all
    keys: Sequence[bytes] = ()
    reading: Reading | None = None
    rows: Sequence[bytes | None] = ()  # parallel to keys
    block: Bytes2D | None = None  # the same, where every one is there and of the current schema
    late: Positions = field(default_factory=lambda: NONE)  # of keys
    failed: Positions = field(default_factory=lambda: NONE)

    def wanted_ids(self) -> Sequence[Id]:
        """Return the ids whose keys are asked for."""
        return self.ids if self.wanted is None else [self.ids[at] for at in self.wanted.tolist()]

    def answered(self) -> tuple[Sequence[Id], Sequence[bytes | None]]:
        """Return the ids whose keys were answered, and their rows."""
        ids = self.wanted_ids()
        if not (self.late.size or self.failed.size):
            return ids, self.rows
        known = np.delete(np.arange(len(self.rows)), np.concatenate((self.late, self.failed))).tolist()
        return [ids[at] for at in known], [self.rows[at] for at in known]

    def take(self, rows: Sequence[bytes | None], late: Positions, failed: Positions) -> None:
        """Take what the store said of `keys`."""
        self.rows, self.late, self.failed = rows, late, failed
        self.block = None if None in rows else self.view.current.codec.widen(rows)  # type: ignore[arg-type]

    def at(self, positions: Positions) -> Index:
        """Return the rows that some positions of `keys` stand for."""
        return positions if self.wanted is None else self.wanted[positions]

    def blocks(self) -> list[Block]:
        """Return the rows that exist as blocks of one schema each."""
        blocks: list[Block] = []
        if self.found is not None:
            hits = np.flatnonzero(self.found.codes >= 0)
            if hits.size == len(self.ids):
                return [(self.view.current, self.found.rows, None)]
            if self.block is not None and hits.size + len(self.block) == len(self.ids):  # every row is there: one block is moved faster
                self.found.rows[self.wanted] = self.block
                return [(self.view.current, self.found.rows, None)]
            if hits.size:
                blocks.append((self.view.current, self.found.rows[hits], hits))
        if self.block is not None:
            blocks.append((self.view.current, self.block, self.wanted))
            return blocks
        return blocks + self._by_schema() if self.rows else blocks

    def _by_schema(self) -> list[Block]:
        """The uncommon case: some rows are missing, or were written under an older schema. Rows nobody can read count as missing."""
        positions = np.arange(len(self.rows)) if self.wanted is None else self.wanted
        groups: dict[int, list[int]] = {}
        for at, row in enumerate(self.rows):
            if row is not None and len(row) >= HEADER_BYTES:
                groups.setdefault(int.from_bytes(row[2:4], "little"), []).append(at)
        blocks: list[Block] = []
        for schema_id, members in groups.items():
            picture = self.view.pictures.get(schema_id)
            if picture is None:
                continue
            fitting = [at for at in members if picture.codec.is_current(self.rows[at])]
            block = picture.codec.widen([row for at in fitting if (row := self.rows[at]) is not None])
            if block is not None and fitting:
                blocks.append((picture, block, positions[fitting]))
        return blocks
