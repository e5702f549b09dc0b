"""From stored rows back to a columnar FeatureBatch: what `batch_encoding` makes of the batch are these very rows again.

Numbers are moved as blocks; only ids and texts are Python objects, one per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import FLAG_TOMBSTONE, Bytes2D, Column, Id, RowCodec, header
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.registry.records import FeatureView
from plait.registry.shapes import wire_type


def decode(view: FeatureView, codec: RowCodec, ids: Sequence[Id], rows: Sequence[bytes]) -> Any | None:
    """Return rows of `codec`'s schema as a FeatureBatch, None where one is of another schema or not whole.

    Features that are younger than the schema are left out, which means null.
    """
    block = codec.widen(rows)
    if block is None:
        return None
    batch = pb.FeatureBatch(feature_view=view.name, view_version=view.version)
    put_ids(batch.ids, ids)
    _decode_header(batch, block)
    features = {feature.name: feature for feature in view.features}
    names = [name for name in codec.columns if name in features]
    nulls = codec.nulls(block)
    texts = [codec.texts(row) for row in rows] if codec.text_names else []
    for group in _groups(codec, names):
        column = batch.columns.add(features=group, dtype=wire_type(features[group[0]]).number)
        flags = nulls[:, [codec.columns[name].index for name in group]]
        if flags.any():
            column.null_bits = np.packbits(flags, bitorder="little").tobytes()
        _fill(column, codec, group, block, flags, texts)
    return batch


def put_ids(message: Any, ids: Sequence[Id]) -> None:
    """Fill an EntityIds message with ids of one kind."""
    if not ids:
        return
    if isinstance(ids[0], str):
        message.string_ids.extend(ids)
    elif isinstance(ids[0], int):
        message.int64_ids.extend(ids)
    else:
        for entity_id in ids:
            parts = message.composite_ids.add().parts
            for part in entity_id:  # type: ignore[union-attr]  # all ids are of one kind
                parts.add(**{"string_part" if isinstance(part, str) else "int64_part": part})


def _decode_header(batch: Any, block: Bytes2D) -> None:
    head = header(block)
    batch.event_times_us.extend(head["event_time_us"].tolist())
    if head["sequence"].any():
        batch.sequences.extend(head["sequence"].tolist())
    if head["expires_us"].any():
        batch.expires_at_us.extend(head["expires_us"].tolist())
    deleted = (head["flags"] & FLAG_TOMBSTONE) != 0
    if deleted.any():
        batch.deleted.extend(deleted.tolist())


def _groups(codec: RowCodec, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield neighbouring numbers of one dtype together, each text, list and embedding alone."""
    group: list[str] = []
    for name in names:
        column = codec.columns[name]
        if group and not _continues(codec.columns[group[-1]], column):
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _continues(last: Column, column: Column) -> bool:
    numbers = last.kind == column.kind == "plain" and last.width == column.width == 1
    return numbers and last.dtype == column.dtype and last.end == column.offset


def _fill(
    column: Any, codec: RowCodec, names: list[str], block: Bytes2D, flags: npt.NDArray[np.bool_], texts: Sequence[Mapping[str, bytes]]
) -> None:
    first = codec.columns[names[0]]
    if first.kind == "plain":
        column.data = block[:, first.offset : codec.columns[names[-1]].end].tobytes()
    elif first.kind == "code":
        pieces = [found.get(names[0], b"") for found in texts]
        column.data = b"".join(pieces)
        column.offsets = _offsets(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    else:
        values = block[:, first.offset : first.end].view(first.dtype)
        counts = np.where(flags[:, 0], 0, codec.counts(block, names[0]).astype(np.int64))
        column.data = values[np.arange(first.width) < counts[:, None]].tobytes()
        column.offsets = _offsets(counts * first.dtype.itemsize)


def _offsets(sizes: npt.NDArray[np.int64]) -> bytes:
    return np.concatenate(([0], np.cumsum(sizes))).astype("<u4").tobytes()
