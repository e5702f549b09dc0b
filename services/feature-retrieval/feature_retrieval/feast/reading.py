"""Rows of views that lie in an existing Feast online store, read as if they were ours: asked by its keys, packed into our rows here.

Feast keeps one hash per entity and one message per cell, so this costs what reading Feast costs; it is for moving over without a copy.
Everything behind it (tensors, statuses, policies) is the same. Nothing of it is kept in the near cache or shared with a read under way:
nobody tells us when Feast's Redis changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from feature_retrieval.batch_encoding import Encoder
from feature_retrieval.feast import values
from feature_retrieval.feast.keys import EntityKeys, field_of, time_field_of
from feature_retrieval.row_codec import FOREIGN, KeySpace, RowCodec, decode_id
from feature_retrieval.store.rows import Read, Rows
from feature_retrieval.views import schemas_of
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Unavailable
from plait.redis.commands import pack
from plait.redis.dispatch import Dispatch, Missing, late
from plait.redis.topologies import Topology
from plait.registry.records import FeastSource, FeatureView, Snapshot
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_EPOCH_BYTES: Final = 4


class FeastView:
    """One view whose rows Feast holds."""

    def __init__(self, view: FeatureView, source: FeastSource) -> None:
        self.name = view.name
        self.suffix = KeySpace.of("", view.entity.type, view.name, view.version).suffix[:-_EPOCH_BYTES]  # Feast knows no epochs
        self._keys = EntityKeys(source)
        self._features = view.features
        fields = [field_of(source.view, feature.name) for feature in view.features]
        self._arguments = [time_field_of(source.view), *fields]
        self._encoder = Encoder(view, RowCodec(schemas_of(view)[-1]))

    def commands(self, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return Feast's key for each of ours, and the command that reads its fields."""
        theirs = self._keys.keys([decode_id(key[_id_at(key) :])[0] for key in keys])
        return theirs, [pack(b"HMGET", [key, *self._arguments]) for key in theirs]

    def rows(self, replies: Sequence[Any]) -> tuple[list[bytes | None], list[int]]:
        """Return a packed row per reply, None where Feast has none; and which replies cannot be read."""
        rows: list[bytes | None] = [None] * len(replies)
        unreadable: list[int] = []
        times: dict[int, int] = {}
        for at, reply in enumerate(replies):
            try:
                time_us = values.time_us(reply[0])
            except values.Unreadable:
                unreadable.append(at)
            else:
                if time_us is not None:
                    times[at] = time_us
        if not times:
            return rows, unreadable
        batch = pb.FeatureBatch(feature_view=self.name, event_times_us=times.values())
        bad = np.zeros(len(times), np.bool_)
        cells = list(zip(*(replies[at] for at in times), strict=True))
        for number, feature in enumerate(self._features, start=1):
            found = values.decode(feature, cells[number])
            values.fill(batch.columns.add(), feature, found)
            bad |= found.bad
        encoded = self._encoder.encode(batch, [""] * len(times))
        bad[list(encoded.refused)] = True
        packed = self._encoder.codec.pack(encoded.block, encoded.tails)
        for at, row, wrong in zip(times, packed, bad.tolist(), strict=True):
            if wrong:
                unreadable.append(at)
            else:
                rows[at] = row
        return rows, sorted(unreadable)


class FeastRows:
    """Stands before our own store: keys of Feast's views go to Feast's Redis, all others pass.

    `feast` is where that is; None where no address is set, and then rows of such views are not known, which is said as such.
    """

    def __init__(self, store: Rows, feast: Topology | None, snapshot: Callable[[], Snapshot]) -> None:
        self._store = store
        self._dispatch = None if feast is None else Dispatch(feast)
        self._snapshot = snapshot
        self._compiled: tuple[Snapshot | None, Mapping[bytes, FeastView]] = (None, {})

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys`, as the store's own `read` does; a row of Feast's that cannot be read counts as failed."""
        views = self._views()
        theirs = [at for at, key in enumerate(keys) if key.startswith(FOREIGN)] if views else []
        if not theirs:
            return await self._store.read(keys, timeout_s)
        foreign = set(theirs)
        ours = [at for at in range(len(keys)) if at not in foreign]
        own, feast = await asyncio.gather(
            self._own([keys[at] for at in ours], timeout_s), self._feast([keys[at] for at in theirs], timeout_s, views)
        )
        return _merged(len(keys), ((ours, own), (theirs, feast)))

    def _views(self) -> Mapping[bytes, FeastView]:
        """Return the views of the newest snapshot by what their keys end with before the epoch."""
        snapshot = self._snapshot()
        if self._compiled[0] is not snapshot:
            views = [FeastView(view, view.feast) for view in snapshot.feature_views.values() if view.feast is not None]
            self._compiled = (snapshot, {view.suffix: view for view in views})
        return self._compiled[1]

    async def _own(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        if not keys:
            return Read([])
        try:
            return await self._store.read(keys, timeout_s)
        except Unavailable:  # Feast's may be there
            return Read([None] * len(keys), failed=np.arange(len(keys)))

    async def _feast(self, keys: Sequence[bytes], timeout_s: float, views: Mapping[bytes, FeastView]) -> Read:
        groups: dict[FeastView, list[int]] = {}
        for at, key in enumerate(keys):
            view = views.get(key[_suffix_at(key) : -_EPOCH_BYTES])
            if view is not None:  # else it has just left the registry
                groups.setdefault(view, []).append(at)
        places = [at for members in groups.values() for at in members]
        asked: list[bytes] = []
        commands: list[bytes] = []
        for view, members in groups.items():
            names, packed = view.commands([keys[at] for at in members])
            asked += names
            commands += packed
        replies = late(len(commands))
        if self._dispatch is None:
            replies = [Missing.FAILED] * len(commands)
        else:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._dispatch.run(asked, commands, replies)
            except TimeoutError:
                pass
            except Unavailable:
                replies = [Missing.FAILED] * len(commands)
        return _read(len(keys), groups, dict(zip(places, replies, strict=True)))


def _read(count: int, groups: Mapping[FeastView, Sequence[int]], replies: Mapping[int, Any]) -> Read:
    rows: list[bytes | None] = [None] * count
    slow = [at for at, reply in replies.items() if reply is Missing.LATE]
    failed = [at for at in range(count) if at not in replies]
    for view, members in groups.items():
        here = [at for at in members if isinstance(replies[at], list)]
        found, unreadable = view.rows([replies[at] for at in here])
        for at, row in zip(here, found, strict=True):
            rows[at] = row
        failed += [here[at] for at in unreadable]
        failed += [at for at in members if replies[at] is not Missing.LATE and not isinstance(replies[at], list)]
        if unreadable:
            log.warning("rows of feast cannot be read", feature_view=view.name, rows=len(unreadable), reason="FEAST_ROW_UNREADABLE")
    return Read(rows, late=np.array(sorted(slow), np.intp), failed=np.array(sorted(failed), np.intp))


def _merged(count: int, parts: Sequence[tuple[Sequence[int], Read]]) -> Read:
    rows: list[bytes | None] = [None] * count
    slow: list[int] = []
    failed: list[int] = []
    for places, read in parts:
        for at, row in zip(places, read.rows, strict=True):
            rows[at] = row
        slow += [places[at] for at in read.late.tolist()]
        failed += [places[at] for at in read.failed.tolist()]
    return Read(rows, late=np.array(sorted(slow), np.intp), failed=np.array(sorted(failed), np.intp))


def _id_at(key: bytes) -> int:
    """Return where the id begins in one of our keys: after the tenant and the entity type, each with its length before it."""
    at = len(FOREIGN) + 1 + key[len(FOREIGN)]
    return at + 1 + key[at]


def _suffix_at(key: bytes) -> int:
    """Return where the id ends."""
    at = _id_at(key)
    return at + decode_id(key[at:])[1]
