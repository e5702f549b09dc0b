"""From a columnar FeatureBatch to rows in the store: checked, encoded, written where newer; what is wrong with one row costs only that row.

Rows go to every epoch of their view that is in use, so that a flip and a rollback find in theirs whatever was streamed; a backfill names its
epoch. Nothing is acknowledged before it is as safe as the settings ask, and nothing is written to a Redis that has not been told of every
erasure.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import numpy as np

from feature_retrieval.batch_encoding import Encoded, Encoder
from feature_retrieval.entity_ids import MAX_ROWS
from feature_retrieval.permissions import check_admin, check_writable
from feature_retrieval.row_codec import MAX_ID_BYTES, Id, KeySpace, RowCodec, header
from feature_retrieval.snapshots_in_use import SnapshotsInUse
from feature_retrieval.store.redis import APPLIED, ERASED, RedisStore
from feature_retrieval.views import schemas_of
from feature_retrieval.write_metrics import WriteMetrics
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, Violation
from plait.redis.dispatch import Receipt
from plait.registry.entity_ids import read_ids
from plait.registry.explain import suggestion
from plait.registry.records import FeatureSchema, FeatureView, Snapshot
from plait.rpc.call import Call

MAX_FUTURE_S: Final = 300.0  # an event time further ahead would block every true update until then

_Bad = dict[int, tuple[str, str]]  # row → reason, message
Keep = Callable[[FeatureView, Sequence[bytes], Sequence[bytes]], Awaitable[bool]]


async def nothing_was_erased() -> None:
    """For who keeps no erasures."""


def _told_nobody(tenant: str, view: str, newest_us: int) -> None:
    """For who keeps no count of how fresh views are."""


async def kept_nowhere(view: FeatureView, keys: Sequence[bytes], rows: Sequence[bytes]) -> bool:
    """For who has no durable copy."""
    return False


class Ingestion:
    """Answers WriteFeatures. `snapshot` gives the newest registry snapshot; `erasures_loaded` returns once Redis knows every erasure, or
    raises; `keep` takes rows into the durable copy; `wrote` hears of the newest event time written to a tenant's view; `max_future_s`: how far
    an event time may be ahead of `clock`."""

    def __init__(
        self,
        store: RedisStore,
        snapshot: Callable[[], Snapshot],
        clock: Callable[[], float] = time.time,
        *,
        erasures_loaded: Callable[[], Awaitable[None]] = nothing_was_erased,
        keep: Keep = kept_nowhere,
        wrote: Callable[[str, str, int], None] = _told_nobody,
        metrics: WriteMetrics | None = None,
        max_future_s: float = MAX_FUTURE_S,
    ) -> None:
        self._store = store
        self.snapshots = SnapshotsInUse(snapshot)
        self._clock = clock
        self._wrote = wrote
        self._metrics = metrics
        self._erasures_loaded = erasures_loaded
        self._keep = keep
        self._max_future_s = max_future_s
        self._encoders: dict[tuple[str, int], tuple[FeatureSchema, Encoder]] = {}

    async def write(self, batch: Any, result: Any, call: Call) -> None:
        """Write a FeatureBatch; fill a WriteFeaturesResponse.

        Raises NotFound, InvalidArgument, PermissionDenied, FailedPrecondition and Unavailable as the contract says.
        """
        began = time.perf_counter()
        with self.snapshots.held() as snapshot:
            await self._write_by(snapshot, batch, result, call)
        if self._metrics is not None:
            took_s = time.perf_counter() - began
            self._metrics.wrote(
                batch.feature_view, applied=result.applied, ignored=result.ignored, refused=len(result.errors), took_s=took_s
            )

    async def _write_by(self, snapshot: Snapshot, batch: Any, result: Any, call: Call) -> None:
        view = view_of(snapshot, batch.feature_view, batch.view_version)
        check_writable(view, call)
        _check_written_by_callers(view)
        epochs = _epochs(snapshot, view, batch, call)
        encoder = self._encoder(view)
        ids = _checked_ids(batch, view)
        encoded = encoder.encode(batch, ids)
        bad = self._bad_rows(encoded, ids, view)
        rows: Sequence[bytes] = encoder.codec.pack(encoded.block, encoded.tails)
        places: Sequence[int] = range(len(ids))
        if bad:
            places = [at for at in places if at not in bad]
            ids, rows = [ids[at] for at in places], [rows[at] for at in places]
        if ids:
            receipt = Receipt()
            verdicts, committed = await self._write(view, epochs, call.tenant, ids, rows, receipt)
            result.applied = verdicts.count(APPLIED)
            result.ignored = len(ids) - result.applied - verdicts.count(ERASED)
            bad |= {places[at]: _ERASED for at, verdict in enumerate(verdicts) if verdict == ERASED}
            if result.applied:
                times = header(encoded.block)["event_time_us"]
                self._wrote(
                    call.tenant,
                    view.name,
                    int(times[[place for place, verdict in zip(places, verdicts, strict=True) if verdict == APPLIED]].max()),
                )
            safe = await self._store.settle(receipt)
            result.durability = pb.DURABILITY_COMMITTED if committed else safe
        for at in sorted(bad):
            result.errors.add(row=at, reason=bad[at][0], message=bad[at][1])

    async def _write(
        self, view: FeatureView, epochs: Sequence[int], tenant: str, ids: Sequence[Id], rows: Sequence[bytes], receipt: Receipt
    ) -> tuple[bytes, bool]:
        """Write rows to epochs in one round trip; return the verdicts of the first epoch, which is the one that is served, and whether the
        rows are committed in Postgres. Rows that were there already are kept, too: an earlier try may have ended between the two."""
        spaces = [KeySpace.of(tenant, view.entity.type, view.name, view.version, epoch) for epoch in epochs]
        keys = [key for space in spaces for key in space.keys(ids)]
        marks = spaces[0].mark_keys(ids)
        await self._erasures_loaded()
        rows = [*rows] * len(epochs)
        verdicts = await self._store.write(keys, marks * len(epochs), rows, self._ttl_ms(view), receipt)
        kept = [at for at, verdict in enumerate(verdicts) if verdict != ERASED] if view.durable != "off" else []
        committed = await self._keep(view, [keys[at] for at in kept], [rows[at] for at in kept])
        return verdicts[: len(ids)], committed

    def _ttl_ms(self, view: FeatureView) -> int:
        """How long Redis keeps a row. Past it, an older event must be too old to be taken, or it would come back: whatever the row's event
        time was, it was at most `max_future_s` ahead."""
        return int((view.retention_s + self._max_future_s) * 1000) if view.retention_s else 0

    def _encoder(self, view: FeatureView) -> Encoder:
        schema = schemas_of(view)[-1]
        known = self._encoders.get((view.name, view.version))
        if known is None or known[0] is not schema:  # every snapshot has schemas of its own
            known = self._encoders[(view.name, view.version)] = (schema, Encoder(view, RowCodec(schema)))
        return known[1]

    def _bad_rows(self, encoded: Encoded, ids: Sequence[Id], view: FeatureView) -> _Bad:
        """Return the rows whose time, id or value is impossible."""
        times = header(encoded.block)["event_time_us"]
        bad: _Bad = dict(encoded.refused)
        now_us = int(self._clock() * 1e6)
        future = (
            "EVENT_TIME_IN_FUTURE",
            f"the event time is more than {self._max_future_s:.0f} s ahead of this service's clock: is it in microseconds?",
        )
        bad |= dict.fromkeys(np.flatnonzero(times > now_us + int(self._max_future_s * 1e6)).tolist(), future)
        if view.retention_s:
            old = (
                "EVENT_TIME_TOO_OLD",
                f"the event time is further back than the view's retention_s, {view.retention_s:g} s: such rows are kept no more",
            )
            bad |= dict.fromkeys(np.flatnonzero(times < now_us - int(view.retention_s * 1e6)).tolist(), old)
        invalid = ("EVENT_TIME_INVALID", "the event time must be after 1970, in microseconds since the epoch")
        bad |= dict.fromkeys(np.flatnonzero(times <= 0).tolist(), invalid)
        if not _all_possible(ids):
            invalid = ("ID_INVALID", f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8, and so has each text of a composite one, or none")
            bad |= {at: invalid for at, entity_id in enumerate(ids) if _impossible(entity_id)}
        return bad


_ERASED: Final = ("ENTITY_ERASED", "the entity was erased after this event: only what happens from then on is taken, if anything")


def view_of(snapshot: Snapshot, name: str, version: int) -> FeatureView:
    """Return a view in a version, 0 = the current one. Raises NotFound (FEATURE_VIEW_NOT_FOUND, VIEW_VERSION_NOT_FOUND)."""
    view = snapshot.feature_views.get(name)
    if view is None:
        hint = suggestion(name, list(snapshot.feature_views))
        raise NotFound(
            f"no feature view {name[:80]!r}{hint}: see 'plait get featureview' for what there is", reason="FEATURE_VIEW_NOT_FOUND"
        )
    found = view.at(version)
    if found is None:
        kept = ", ".join(str(past.version) for past in view.versions) or "none"
        raise NotFound(
            f"feature view {name!r} has no version {version}: it is at {view.version}, and earlier ones still kept are {kept}",
            reason="VIEW_VERSION_NOT_FOUND",
        )
    return found


def _check_written_by_callers(view: FeatureView) -> None:
    if view.aggregation is not None:
        message = f"the rows of {view.name!r} are computed from events: send events with PublishEvents"
        raise FailedPrecondition(message, reason="VIEW_IS_AGGREGATED")
    if view.feast is not None:
        message = f"the rows of {view.name!r} are Feast's and only read here: write them with Feast"
        raise FailedPrecondition(message, reason="VIEW_IS_FOREIGN")


def _epochs(snapshot: Snapshot, view: FeatureView, batch: Any, call: Call) -> Sequence[int]:
    """Return which epochs a batch goes to, the served one first; or the one it names, which takes an administrator."""
    epochs = snapshot.epochs_of(call.tenant, view.name, view.version)
    if not batch.HasField("epoch"):
        return epochs.in_use
    check_admin(call)
    if batch.epoch not in epochs.in_use:
        raise NotFound(
            f"epoch {batch.epoch} of feature view {view.name!r} is not in use here (yet); in use are {list(epochs.in_use)}",
            reason="EPOCH_NOT_FOUND",
        )
    return (batch.epoch,)


def _checked_ids(batch: Any, view: FeatureView) -> Sequence[Id]:
    ids, problem = read_ids(batch.ids, view.entity)
    if len(ids) > MAX_ROWS:
        problem = f"{len(ids)} rows are given, at most {MAX_ROWS} are allowed in a batch"
    if problem and problem != "an id is empty":  # an empty id is that row's error only
        raise InvalidArgument("the batch's ids cannot be used", violations=[Violation("ids", problem)])
    return ids


def _all_possible(ids: Sequence[Id]) -> bool:
    """Say at a glance whether all ids are surely good: numbers, or texts so short that no UTF-8 of theirs is too long."""
    if isinstance(ids[0], str):
        return "" not in ids and max(map(len, ids)) <= MAX_ID_BYTES // 4  # type: ignore[arg-type]  # all are of one kind
    return isinstance(ids[0], int)


def _impossible(entity_id: Id) -> bool:
    if isinstance(entity_id, tuple):
        return any(_too_long(part) for part in entity_id)
    return entity_id == "" or _too_long(entity_id)


def _too_long(part: str | int) -> bool:
    return isinstance(part, str) and len(part) > MAX_ID_BYTES // 4 and len(part.encode()) > MAX_ID_BYTES
