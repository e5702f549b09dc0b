"""The rows of one epoch as batches, page by page: what `plait features export` writes to Parquet and a materialize reads back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

from feature_retrieval.batch_decoding import decode
from feature_retrieval.epochs import PAGE_KEYS, READ_TIMEOUT_S
from feature_retrieval.ingestion import view_of
from feature_retrieval.permissions import check_admin, check_readable
from feature_retrieval.row_codec import Id, KeySpace, RowCodec
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import schemas_of
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, NotFound
from plait.registry.records import FeatureView, Snapshot
from plait.rpc.call import Call
from plait.rpc.pace import Pace

_MAX_BATCH_BYTES: Final = 4 * 1024 * 1024  # of packed rows in one answer: several fit the largest message
Row = tuple[Id, bytes]


class Exporting:
    """Answers ExportFeatures. `snapshot` gives the newest registry snapshot."""

    def __init__(self, store: RedisStore, snapshot: Callable[[], Snapshot]) -> None:
        self._store = store
        self._snapshot = snapshot

    async def export(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Yield the rows of an epoch, tombstones included. A row that is written meanwhile may be missing, old, new or there twice."""
        check_admin(call)
        snapshot = self._snapshot()
        view = view_of(snapshot, request.feature_view, request.view_version)
        check_readable(view, call)
        if view.aggregation is not None or view.feast is not None:
            raise FailedPrecondition(
                f"the rows of {view.name!r} are no plain values (aggregated, or Feast's): export its source", reason="VIEW_IS_AGGREGATED"
            )
        space = _space(snapshot, view, request, call)
        codecs = {schema.id: RowCodec(schema) for schema in schemas_of(view)}
        pace = Pace(request.max_rows_per_s)
        async for page in self._store.scan(space.prefix, space.suffix, cursor=request.cursor, count=PAGE_KEYS):
            rows = await self._read(space, page.keys)
            await pace.take(len(rows))
            for batch in _batches(view, codecs, rows):
                yield pb.ExportFeaturesResponse(batch=batch, scanned=page.scanned, total=page.total)
            yield pb.ExportFeaturesResponse(cursor=page.cursor, scanned=page.scanned, total=page.total)  # all of the page is out

    async def _read(self, space: KeySpace, keys: Sequence[bytes]) -> list[Row]:
        found = {key: entity_id for key in keys if (entity_id := space.id_of(key)) is not None}
        if not found:
            return []
        read = await self._store.read(list(found), READ_TIMEOUT_S)
        read.check_whole()
        return [(entity_id, row) for entity_id, row in zip(found.values(), read.rows, strict=True) if row is not None]


def _space(snapshot: Snapshot, view: FeatureView, request: Any, call: Call) -> KeySpace:
    epochs = snapshot.epochs_of(call.tenant, view.name, view.version)
    epoch = request.epoch if request.HasField("epoch") else epochs.serving
    if epoch not in epochs.in_use:
        raise NotFound(f"epoch {epoch} of {view.name!r} is not in use; in use are {list(epochs.in_use)}", reason="EPOCH_NOT_FOUND")
    return KeySpace.of(call.tenant, view.entity.type, view.name, view.version, epoch)


def _batches(view: FeatureView, codecs: dict[int, RowCodec], rows: Sequence[Row]) -> Iterator[Any]:
    """Yield rows as batches, each of one schema and not too large. Rows that nobody can read are left out, as readers do."""
    groups: dict[int, list[Row]] = {}
    for entity_id, row in rows:
        codec = codecs.get(int.from_bytes(row[2:4], "little"))
        if codec is not None and codec.is_current(row):
            groups.setdefault(codec.schema_id, []).append((entity_id, row))
    for schema_id, group in groups.items():
        for part in _parts(group):
            batch = decode(view, codecs[schema_id], [entity_id for entity_id, _ in part], [row for _, row in part])
            if batch is not None:
                yield batch


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    start, size = 0, 0
    for at, (_, row) in enumerate(rows):
        if size and size + len(row) > _MAX_BATCH_BYTES:
            yield rows[start:at]
            start, size = at, 0
        size += len(row)
    yield rows[start:]
