"""What was told to be forgotten, in the order it was told; whoever keeps something asks whether it was touched since it was begun.

So nothing has to be found and removed when an item is sold: no index of which answers hold which item, no cost for those that are never
asked for again. And an answer that was being made while the item was sold is caught like every other, wherever it is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.entity_ids import Id, composites

Kind = Literal["route", "model", "entity"]
Space = tuple[str, Kind, str]  # tenant, kind, entity type ("" for routes and models)
Named = tuple[Space, Sequence[Id]]

MOST: Final = 100_000
_LOCAL_BITS: Final = 32  # of a position, below those that number what all routers were told


class Invalidations:
    """The last `most` names that were told. What is older than these counts as touched.

    A position is a place in the order. Its upper part numbers what was told to all routers, the same in each of them; below are those
    that only this one was told.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._order: deque[tuple[Space, Id, int]] = deque()
        self._last: dict[Space, dict[Id, int]] = {}
        self._floor = 0
        self.position = 0

    def __repr__(self) -> str:
        return f"<Invalidations position={self.position:#x} known={len(self._order)}>"

    def told(self, since: int, space: Space) -> Iterator[Id]:
        """Yield the names of one space that were told after a position, newest first; one that was told twice comes twice."""
        for told_in, id_, position in reversed(self._order):
            if position <= since:
                return
            if told_in == space:
                yield id_

    @property
    def heard(self) -> int:
        """How much of what all routers were told this one has heard: comparable between routers."""
        return self.heard_at(self.position)

    def tell(self, named: Iterable[Named], heard: int | None = None) -> None:
        """Take in names; `heard` is the number of what all routers were told, None for what only this one was."""
        self._advance(heard)
        for space, ids in named:
            if not ids:
                continue
            last = self._last.setdefault(space, {})
            for id_ in ids:
                if last.get(id_) != self.position:  # else named twice in one go
                    last[id_] = self.position
                    self._order.append((space, id_, self.position))
        while len(self._order) > self._most:
            self._drop_oldest()

    def forget_all(self, heard: int | None = None) -> None:
        """Count all that was begun before now as touched: what was told may have been missed."""
        self._advance(heard)
        self._floor = self.position
        self._order.clear()
        self._last.clear()

    def touched(self, since: int, named: Iterable[Named]) -> bool:
        """Return whether any of the names was told after a position."""
        if since >= self.position:
            return False
        return since < self._floor or any(self._told(space, ids, since) for space, ids in named)

    @staticmethod
    def heard_at(position: int) -> int:
        """Return how much of what all routers were told was heard at a position."""
        return position >> _LOCAL_BITS

    @staticmethod
    def since(heard: int) -> int:
        """Return the position of a router that has heard so much and was told nothing on its own."""
        return heard << _LOCAL_BITS

    def _advance(self, heard: int | None) -> None:
        self.position = max(self.position + 1, 0 if heard is None else heard << _LOCAL_BITS)

    def _told(self, space: Space, ids: Sequence[Id], since: int) -> bool:
        last = self._last.get(space)
        if not last:
            return False
        return any(position is not None and position > since for position in map(last.get, ids))

    def _drop_oldest(self) -> None:
        space, id_, position = self._order.popleft()
        self._floor = max(self._floor, position)
        last = self._last[space]
        if last.get(id_) == position:
            del last[id_]
            if not last:
                del self._last[space]


def named(tenant: str, request: pb.InvalidateCacheRequest) -> Iterator[Named]:
    """Yield what a tenant's request names."""
    if request.route:
        yield (tenant, "route", ""), [request.route]
    if request.model:
        yield (tenant, "model", ""), [request.model]
    if request.HasField("items"):
        yield (tenant, "entity", request.items.entity_type), ids_of(request.items.ids)


def ids_of(ids: types_pb2.EntityIds) -> Sequence[Id]:
    """Return ids as Python values, of whatever kind they are."""
    return ids.string_ids or ids.int64_ids or composites(ids)
