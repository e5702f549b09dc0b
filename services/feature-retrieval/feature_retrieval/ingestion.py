"""From a columnar FeatureBatch to rows in the store: checked, encoded, written where newer; what is wrong with one row costs only that row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.batch_encoding import Encoded, Encoder
from feature_retrieval.retrieval import MAX_ROWS
from feature_retrieval.row_codec import MAX_ID_BYTES, Id, KeySpace, RowCodec, header
from feature_retrieval.store.redis import APPLIED, RedisStore
from feature_retrieval.views import schemas_of
from plait.errors import InvalidArgument, NotFound, Violation
from plait.registry.entity_ids import read_ids
from plait.registry.explain import suggestion
from plait.registry.records import FeatureSchema, FeatureView, Snapshot

MAX_FUTURE_S: Final = 300.0  # an event time further ahead would block every true update until then


class Ingestion:
    """Answers WriteFeatures. `snapshot` gives the newest registry snapshot."""

    def __init__(self, store: RedisStore, snapshot: Callable[[], Snapshot], clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._snapshot = snapshot
        self._clock = clock
        self._encoders: dict[tuple[str, int], tuple[FeatureSchema, Encoder]] = {}

    async def write(self, batch: Any, result: Any, tenant: str) -> None:
        """Write a FeatureBatch; fill a WriteFeaturesResponse. Raises NotFound, InvalidArgument, Unavailable as the contract says."""
        view = self._snapshot().feature_views.get(batch.feature_view)
        if view is None:
            hint = suggestion(batch.feature_view, list(self._snapshot().feature_views))
            raise NotFound(
                f"no feature view {batch.feature_view!r}{hint}: see 'plait get featureview' for what there is",
                reason="FEATURE_VIEW_NOT_FOUND",
            )
        encoder = self._encoder(view)
        ids = _checked_ids(batch, view)
        encoded = encoder.encode(batch, ids)
        rows: Sequence[bytes] = encoder.codec.pack(encoded.block, encoded.tails)
        good = self._refuse_bad_rows(encoded, ids, result)
        if good is not None:
            ids, rows = [ids[at] for at in good.tolist()], [rows[at] for at in good.tolist()]
        if not ids:
            return
        space = KeySpace.of(tenant, view.entity.type, view.name, view.version)
        verdicts = await self._store.write(space.keys(ids), space.mark_keys(ids), rows, int(view.retention_s * 1000))
        result.applied = verdicts.count(APPLIED)
        result.ignored = len(ids) - result.applied

    def _encoder(self, view: FeatureView) -> Encoder:
        schema = schemas_of(view)[-1]
        known = self._encoders.get((view.name, view.version))
        if known is None or known[0] is not schema:  # every snapshot has schemas of its own
            known = self._encoders[(view.name, view.version)] = (schema, Encoder(view, RowCodec(schema)))
        return known[1]

    def _refuse_bad_rows(self, encoded: Encoded, ids: Sequence[Id], result: Any) -> npt.NDArray[np.intp] | None:
        """Report rows whose time, id or value is impossible; return the positions of the others, None when all are good."""
        times = header(encoded.block)["event_time_us"]
        bad = dict(encoded.refused)
        limit = int((self._clock() + MAX_FUTURE_S) * 1e6)
        for at in np.flatnonzero(times > limit).tolist():
            bad[at] = (
                "EVENT_TIME_IN_FUTURE",
                f"the event time is more than {MAX_FUTURE_S:.0f} s ahead of this service's clock: is it in microseconds?",
            )
        for at in np.flatnonzero(times <= 0).tolist():
            bad[at] = ("EVENT_TIME_INVALID", "the event time must be after 1970, in microseconds since the epoch")
        for at, entity_id in enumerate(ids):
            if _impossible(entity_id):
                bad[at] = ("ID_INVALID", f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8, and so has each text of a composite one, or none")
        for at in sorted(bad):
            result.errors.add(row=at, reason=bad[at][0], message=bad[at][1])
        return np.delete(np.arange(len(ids)), list(bad)) if bad else None


def _checked_ids(batch: Any, view: FeatureView) -> Sequence[Id]:
    ids, problem = read_ids(batch.ids, view.entity)
    if len(ids) > MAX_ROWS:
        problem = f"{len(ids)} rows are given, at most {MAX_ROWS} are allowed in a batch"
    if problem and problem != "an id is empty":  # an empty id is that row's error only
        raise InvalidArgument("the batch's ids cannot be used", violations=[Violation("ids", problem)])
    return ids


def _impossible(entity_id: Id) -> bool:
    if isinstance(entity_id, tuple):
        return any(_too_long(part) for part in entity_id)
    return entity_id == "" or _too_long(entity_id)


def _too_long(part: str | int) -> bool:
    return isinstance(part, str) and len(part) > MAX_ID_BYTES // 4 and len(part.encode()) > MAX_ID_BYTES
