"""Rings of tiles: how a window over events lies in a row, so that any order of the same events leaves the same bytes.

Time is cut into tiles; a ring of T tiles holds, per row, the number of its newest tile (int64) and one cell for each of the last T. The cell of
tile k is k mod T, so a newer tile takes the place of one that has left the window. Which tiles are held follows from the newest one alone, never
from the order in which events came: an event counts exactly if its tile is newer than the newest one less T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

NEVER: Final = -(1 << 63)  # the newest tile of a row that has none, and an event time before every other

Ints = npt.NDArray[np.int64]
Index = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Landing:
    """Where events land: of each that counts, its position among the events (`kept`), and its cell, row * T + slot. Parallel arrays."""

    kept: Index
    cells: Ints


@dataclass(frozen=True, slots=True)
class Ring:
    """`tiles` cells of `tile_us` microseconds each; `tile_us` 0 = one cell that holds all of time."""

    tiles: int
    tile_us: int

    def tile(self, times_us: Ints) -> Ints:
        """Return the number of the tile of each time."""
        return times_us // self.tile_us if self.tile_us else np.zeros(len(times_us), np.int64)

    def age(self, newest: Ints) -> npt.NDArray[np.int16]:
        """Return [rows, T]: how many tiles before the newest the tile in each cell is. Means nothing where `newest` is NEVER."""
        return _ages(self.tiles)[newest % self.tiles]

    def live(self, newest: Ints, now_us: int) -> Bools:
        """Return [rows, T]: True where a cell is in the window that ends now. Tiles that have yet to begin are in it (clocks differ)."""
        if not self.tile_us:
            ever: Bools = newest != NEVER
            return ever[:, None]
        known = np.maximum(newest, now_us // self.tile_us - self.tiles)  # from there on nothing is live, and nothing overflows
        reach = np.minimum(known - now_us // self.tile_us + self.tiles, self.tiles).astype(np.int16)
        found: Bools = self.age(newest) < reach[:, None]
        return found

    def advance(self, newest: Ints, rows: Index, times_us: Ints) -> tuple[Ints, Index, Bools, Landing]:
        """Take events in: `rows`, `times_us` are parallel, one per event.

        Returns the newest tile of each row from now on; the rows that move on from an older one; for those, [moved, T], True where the tile in
        the cell leaves and it must be blanked first; and where the events land.
        """
        tile = self.tile(times_us)
        later = newest.copy()
        np.maximum.at(later, rows, tile)
        moved = np.flatnonzero((later != newest) & (newest != NEVER))
        gone = np.minimum(later[moved] - newest[moved], self.tiles).astype(np.int16)
        left = self.age(later[moved]) < gone[:, None]
        kept = np.flatnonzero(tile > later[rows] - self.tiles)
        return later, moved, left, Landing(kept, rows[kept] * self.tiles + tile[kept] % self.tiles)


@lru_cache(maxsize=256)
def _ages(tiles: int) -> npt.NDArray[np.int16]:
    """Return [T, T]: by the newest tile's slot and by slot, how many tiles older the tile there is."""
    slots = np.arange(tiles, dtype=np.int16)
    table: npt.NDArray[np.int16] = (slots[:, None] - slots) % np.int16(tiles)
    table.flags.writeable = False
    return table
