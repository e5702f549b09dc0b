"""Feast's ServingService over our rows, so that its clients keep working while they move: a bridge, not the road.

Its answers are one message per cell, which at 100 × 200 cells takes about 30 ms to make and read where a packed tensor takes microseconds. So
the number of cells is bounded. Only this module knows Feast's stubs: its package registers the same names in a process that has both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.feast.asking import Question, Questions, Wanted, asked_rows
from feature_retrieval.retrieval import Answer, Retrieval
from feature_retrieval.view_read import ViewRead
from feature_retrieval.views import Plans
from plait.api.feast.serving import serving_service_pb2 as pb
from plait.api.feast.serving import serving_service_pb2_grpc as pb_grpc
from plait.api.feast.types import value_pb2
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, InvalidArgument, Unavailable
from plait.rpc.call import current

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ServingService"].full_name
register: Final = pb_grpc.add_ServingServiceServicer_to_server
MAX_CELLS: Final = 500_000
_VERSION: Final = "plait"
_KINDS: Final = {
    "bool": "bool", "int8": "int32", "int16": "int32", "int32": "int32", "int64": "int64", "float16": "float", "float32": "float",
    "float64": "double",
}  # fmt: skip
_FIELD: Final = {
    types_pb2.ROW_STATUS_PRESENT: pb.PRESENT,
    types_pb2.ROW_STATUS_NULL: pb.PRESENT,  # of the row: whether this cell is null is told per cell
    types_pb2.ROW_STATUS_STALE: pb.OUTSIDE_MAX_AGE,
    types_pb2.ROW_STATUS_DEFAULTED: pb.NOT_FOUND,  # Feast's clients expect no default
    types_pb2.ROW_STATUS_NOT_FOUND: pb.NOT_FOUND,
}
_US_PER_S: Final = 1_000_000

Flags = npt.NDArray[np.bool_]


class Serving(pb_grpc.ServingServiceServicer):
    """Answers Feast's clients. `retrieval` must be one without a near cache: the texts of strings are in stored rows only."""

    def __init__(self, retrieval: Retrieval, plans: Callable[[], Plans]) -> None:
        self._retrieval = retrieval
        self._plans = plans
        self._questions = Questions()

    async def GetFeastServingInfo(self, request: Any, context: Any) -> Any:  # noqa: N802  (the contract's name)
        """Say who answers."""
        return pb.GetFeastServingInfoResponse(version=_VERSION)

    async def GetOnlineFeatures(self, request: Any, context: Any) -> Any:  # noqa: N802  (the contract's name)
        """Answer a feature service or a list of features for columns of ids."""
        question = self._questions.get(request, self._plans())
        ours, rows = asked_rows(request, question)
        if rows * len(question.wanted) > MAX_CELLS:
            message = f"{rows} rows of {len(question.wanted)} features are more than {MAX_CELLS} cells: ask for fewer, or call GetFeatures"
            raise InvalidArgument(message)
        answer = await self._retrieval.answer(question.plan, ours, current())
        response = pb.GetOnlineFeaturesResponse(status=True)
        for name, column in request.entities.items():  # as Feast: what was asked comes first
            response.metadata.feature_names.val.append(name)
            vector = response.results.add(statuses=[pb.PRESENT] * rows)
            vector.values.extend(column.val)
            for _ in range(rows):
                vector.event_timestamps.add()
        for wanted in question.wanted:
            response.metadata.feature_names.val.append(wanted.name(full=request.full_feature_names))
            _fill(response.results.add(), wanted, question, answer)
        if request.include_feature_view_version_metadata:
            for view in {one.view.name: one.view for one in question.wanted}.values():
                response.metadata.feature_view_metadata.add(name=view.name, version=view.version)
        return response


def _fill(vector: Any, wanted: Wanted, question: Question, answer: Answer) -> None:
    """Put one feature's values, statuses and times into its vector. Raises Unavailable, DeadlineExceeded where a row is not known."""
    at = next(
        n for n, read in enumerate(answer.reads) if (read.view.view.name, read.view.view.version) == (wanted.view.name, wanted.view.version)
    )
    read, placed = answer.reads[at], answer.placed[at]
    statuses = np.full(len(placed.times), types_pb2.ROW_STATUS_PRESENT, np.uint8) if placed.statuses is None else placed.statuses
    if (statuses == types_pb2.ROW_STATUS_UNAVAILABLE).any():
        raise Unavailable(f"some rows of {wanted.view.name!r} could not be read: retry", reason="STORE_UNAVAILABLE", retry_after_s=0.25)
    if (statuses == types_pb2.ROW_STATUS_TIMED_OUT).any():
        raise DeadlineExceeded(f"some rows of {wanted.view.name!r} did not arrive in time")
    ids = answer.ids[wanted.view.entity.type]
    place = {entity_id: row for row, entity_id in enumerate(read.ids)}
    rows = np.fromiter(map(place.__getitem__, ids), np.intp, len(ids))  # where each of the caller's rows was read
    nulls, counts = _nulls(read, wanted, answer.now_us)
    values = _values(read, wanted, question, answer, counts, rows)
    for row, (status, time_us) in enumerate(zip(statuses.tolist(), placed.times.tolist(), strict=True)):
        told = _FIELD[status]
        if nulls[rows[row]]:
            vector.values.add()
            told = pb.NULL_VALUE if told == pb.PRESENT else told
        else:
            vector.values.append(values[row])
        vector.statuses.append(told)
        moment = vector.event_timestamps.add()
        if time_us:
            moment.FromMicroseconds(time_us)


def _nulls(read: ViewRead, wanted: Wanted, now_us: int) -> tuple[Flags, npt.NDArray[np.intp]]:
    """Return, per row that was read, whether the feature has no value there, and how long its list is."""
    nulls = np.ones(len(read.ids), np.bool_)
    counts = np.zeros(len(read.ids), np.intp)
    name = wanted.feature.name
    for picture, block, index in read.blocks():
        column = picture.codec.columns.get(name)
        if column is None:  # younger than these rows
            continue
        here = slice(None) if index is None else index
        nulls[here] = picture.codec.nulls(block)[:, column.index]
        if wanted.feature.max_length:
            counts[here] = picture.codec.counts(block, name)
        for computed in picture.computed:
            if computed.source == column.index:
                _, known = computed.computed.evaluate(block[:, computed.row_from : computed.row_to], now_us)
                if known is not None:
                    nulls[here] |= ~known
    return nulls, counts


def _values(
    read: ViewRead, wanted: Wanted, question: Question, answer: Answer, counts: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]
) -> Sequence[Any]:
    """Return one Value per row of the caller's; what it holds where there is none means nothing."""
    feature = wanted.feature
    if feature.dtype == "string":
        texts = _texts(read, feature.name)
        return [value_pb2.Value(string_val=texts[row]) for row in rows.tolist()]
    numbers = _numbers(read, feature.name, question, answer)
    if feature.dtype == "timestamp":
        return [value_pb2.Value(unix_timestamp_val=value // _US_PER_S) for value in numbers[:, 0].tolist()]
    kind = "float" if feature.scale else _KINDS[feature.dtype]
    if not (feature.width or feature.max_length):
        return [value_pb2.Value(**{f"{kind}_val": value}) for value in numbers[:, 0].tolist()]
    lengths = counts[rows].tolist() if feature.max_length else [feature.width] * len(rows)
    made = []
    for row, length in zip(numbers.tolist(), lengths, strict=True):
        value = value_pb2.Value()
        inner = getattr(value, f"{kind}_list_val")
        inner.SetInParent()  # an empty list is a value, too
        inner.val.extend(row[:length])
        made.append(value)
    return made


def _numbers(read: ViewRead, name: str, question: Question, answer: Answer) -> npt.NDArray[Any]:
    """Return [rows, columns] of a feature, from the tensor it was put into."""
    for tensor, names in read.view.names.items():
        at = [cell for cell, of in zip(read.view.cells[tensor].tolist(), names, strict=True) if of == name]
        if at:
            return answer.tensors[tensor][:, at]
    raise KeyError(name)


def _texts(read: ViewRead, name: str) -> list[str]:
    """Return the text of each row that was read, empty where there is none."""
    found = [""] * len(read.ids)
    for at, row in enumerate(read.rows):
        picture = read.view.pictures.get(int.from_bytes(row[2:4], "little")) if row else None
        if picture is not None and row is not None and picture.codec.is_current(row) and name in picture.codec.columns:
            found[at] = picture.codec.texts(row).get(name, b"").decode()
    return found
