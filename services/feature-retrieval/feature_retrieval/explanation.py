"""Explain: for one entity of each type, the very rows an answer was made from, where they were found, and how each column came about.

The page itself reads and computes, so what is explained is what GetFeatures would answer at that moment; only the time to live is asked besides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.placing import Placed, copy_runs
from feature_retrieval.retrieval import Answer, Retrieval, add_tensor, ages_us
from feature_retrieval.row_codec import FLAG_BACKFILL, FLAG_TOMBSTONE, HEADER_BYTES, Column, header
from feature_retrieval.transforming import operands_of
from feature_retrieval.transforms import settle
from feature_retrieval.view_read import ViewRead
from feature_retrieval.views import Picture, Plans, TransformPlan
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument, Unavailable, Violation
from plait.registry.records import Feature
from plait.registry.references import parse, width_of
from plait.rpc.call import Call

TimesToLive = Callable[[Sequence[bytes]], Awaitable[Sequence[int]]]  # ms by key, -1 = for ever, -2 = no such key
_FOR_EVER_OR_NONE: Final = -1
_NOT_THERE: Final = -2


class Explanation:
    """Answers ExplainFeatures."""

    def __init__(self, retrieval: Retrieval, plans: Callable[[], Plans], times_to_live: TimesToLive) -> None:
        self._retrieval = retrieval
        self._plans = plans
        self._times_to_live = times_to_live

    async def explain(self, request: Any, response: Any, call: Call) -> None:
        """Fill an ExplainFeaturesResponse; errors are those of GetFeatures, and InvalidArgument where a type has not exactly one id."""
        plans = self._plans()
        _check_one_each(request.entities)
        answer = await self._retrieval.answer(plans.get(request.feature_set, ()), request, call)
        rows = [_Row(read, placed, answer) for read, placed in zip(answer.reads, answer.placed, strict=True)]
        for row, left_ms in zip(rows, await self._left(rows), strict=True):
            row.fill(response.views.add(), call.tenant, left_ms)
        for tensor_plan, tensor in zip(answer.plan.tensors[: answer.plan.answered], answer.tensors, strict=False):
            add_tensor(response, tensor_plan.name, tensor_plan.number, tensor)
        _Columns(answer, rows).fill(response)
        response.registry_revision = plans.snapshot.revision

    async def _left(self, rows: Sequence[_Row]) -> Sequence[int]:
        """Return what is left of each row's time to live in the store, ms; unknown is told as for ever."""
        try:
            return await self._times_to_live([row.key for row in rows])
        except Unavailable:
            return [_FOR_EVER_OR_NONE] * len(rows)


def _check_one_each(entities: Any) -> None:
    problems = []
    for at, rows in enumerate(entities):
        count = len(rows.ids.string_ids) + len(rows.ids.int64_ids) + len(rows.ids.composite_ids)
        if count != 1:
            problems.append(Violation(f"entities[{at}].ids", f"exactly one id is explained, and {count} are given"))
    if problems:
        raise InvalidArgument("one entity of each type is explained", violations=problems)


class _Row:
    """One stored row, as it was found."""

    def __init__(self, read: ViewRead, placed: Placed, answer: Answer) -> None:
        self.read = read
        self.view = read.view.view
        self.key = read.space.keys(read.ids[:1])[0]
        self.status = types_pb2.ROW_STATUS_PRESENT if placed.statuses is None else int(placed.statuses[0])
        self.age_us = int(ages_us(placed.times, answer.now_us)[0])
        self.now_us = answer.now_us
        self.cached = read.found is not None and int(read.found.codes[0]) >= 0
        stored = read.found.rows[0].tobytes() if read.found is not None and self.cached else (read.rows[0] if read.rows else None)
        self.stored = stored or b""
        self.picture = self._picture()
        self._beyond = self._beyond_their_tensors(answer)

    def fill(self, told: Any, tenant: str, left_ms: int) -> None:
        """Fill a ViewExplanation."""
        told.feature_view = self.view.name
        told.view_version = self.view.version
        told.epoch = self.read.view.epoch_of(tenant)
        told.status = self.status
        told.key = self.key
        told.stored = self.stored
        told.age_us = self.age_us
        told.time_to_live_s = left_ms / 1000 if left_ms >= 0 else -1
        told.source = self._source(left_ms)
        if len(self.stored) >= HEADER_BYTES:
            head = header(np.frombuffer(self.stored, np.uint8)[None, :])[0]
            told.schema_id, told.event_time_us = int(head["schema"]), int(head["event_time_us"])
            told.expires_at_us, told.sequence = int(head["expires_us"]), int(head["sequence"])
            told.deleted, told.backfilled = bool(head["flags"] & FLAG_TOMBSTONE), bool(head["flags"] & FLAG_BACKFILL)

    def cell(self, feature: Feature, element: int) -> tuple[str, bool]:
        """Return one of a feature's values as text, and whether its place in the tensor holds a default."""
        if self.picture is None:
            return "", True
        codec = self.picture.codec
        block = np.frombuffer(self.stored[: codec.row_bytes], np.uint8)[None, :]
        column = codec.columns.get(feature.name)
        if column is None or codec.nulls(block)[0, column.index]:
            return "", True
        computed = next((c for c in self.picture.computed if c.source == column.index), None)
        if computed is not None:
            state = block[:, computed.row_from : computed.row_to]
            _, known = computed.computed.evaluate(state, self.now_us)
            return state.tobytes().hex(), known is not None and not known[0]
        return self._text(feature, column, block, element), column.index in self._beyond

    def _beyond_their_tensors(self, answer: Answer) -> frozenset[int]:
        """Return the codec's columns that hold a number too large for a tensor they go to."""
        if self.picture is None:
            return frozenset()
        block = np.frombuffer(self.stored[: self.picture.codec.row_bytes], np.uint8)[None, :]
        tensors = [np.empty((1, tensor.width), tensor.dtype) for tensor in answer.plan.tensors]
        return frozenset(source for source, _ in copy_runs(self.read.view, self.picture, block, slice(None), tensors))

    def _source(self, left_ms: int) -> int:
        if not self.stored:
            return pb.ROW_SOURCE_NONE
        if self.view.feast is not None:
            return pb.ROW_SOURCE_FEAST
        if left_ms == _NOT_THERE and not self.cached and self.view.durable != "off":
            return pb.ROW_SOURCE_DURABLE
        return pb.ROW_SOURCE_NEAR_CACHE if self.cached else pb.ROW_SOURCE_REDIS

    def _picture(self) -> Picture | None:
        """Return how the row is read; None where there is none, nobody can read it, or it is a tombstone."""
        if len(self.stored) < HEADER_BYTES:
            return None
        head = header(np.frombuffer(self.stored[:HEADER_BYTES], np.uint8)[None, :])[0]
        picture = self.read.view.pictures.get(int(head["schema"]))
        if picture is None or head["flags"] & FLAG_TOMBSTONE:
            return None
        return picture if self.cached or picture.codec.is_current(self.stored) else None  # a cached row has no tail

    def _text(self, feature: Feature, column: Column, block: npt.NDArray[np.uint8], element: int) -> str:
        begin = column.offset + element * column.dtype.itemsize
        value = block[0, begin : begin + column.dtype.itemsize].view(column.dtype)[0]
        if column.kind != "code":
            return str(value)
        if self.picture is not None and not self.cached:
            return self.picture.codec.texts(self.stored)[feature.name].decode(errors="replace")
        known = feature.vocabulary and 0 < value <= len(feature.vocabulary)
        return feature.vocabulary[value - 1] if known else f"code {value}"


class _Columns:
    """How each column of the answered tensors came about."""

    def __init__(self, answer: Answer, rows: Sequence[_Row]) -> None:
        self._answer = answer
        self._rows = {(row.view.name, row.view.version): row for row in rows}
        self._transforms = {planned.transform.name: planned for planned in answer.plan.transforms}

    def fill(self, response: Any) -> None:
        """Add a ColumnExplanation per column."""
        for at, item in enumerate(self._answer.plan.inputs):
            column = 0
            for text in item.features:
                for stored, defaulted in self._parts(at, text, item.entity):
                    response.columns.add(
                        input=item.name,
                        column=column,
                        reference=text,
                        stored_value=stored,
                        value=float(self._answer.tensors[at][0, column]),
                        defaulted=defaulted,
                    )
                    column += 1

    def _parts(self, at: int, text: str, entity_type: str) -> list[tuple[str, bool]]:
        """Return what is stored and whether a default stands in, for each column of one reference."""
        reference = parse(text)
        assert reference is not None  # noqa: S101  (it was compiled)
        if reference.kind == "request":
            return [("", reference.feature in self._answer.sent.defaulted)]
        if reference.kind == "transform":
            return [("", defaulted) for defaulted in self._computed(at, self._transforms[reference.feature])]
        row = self._row(reference.view, reference.version, entity_type)
        feature = next(f for f in row.view.features if f.name == reference.feature)
        return [row.cell(feature, element) for element in range(width_of(feature))]

    def _row(self, view: str, version: int | None, entity_type: str) -> _Row:
        """Return the row of a view's version; of the current one, the newest that is read, where none is pinned."""
        if version is not None:
            return self._rows[view, version]
        current = max(v for name, v in self._rows if name == view and self._rows[name, v].view.entity.type == entity_type)
        return self._rows[view, current]

    def _computed(self, at: int, planned: TransformPlan) -> list[bool]:
        values = planned.compiled(operands_of(planned, self._answer.sent, self._answer.tensors), self._answer.now_us)
        out = np.empty((1, 1), self._answer.tensors[at].dtype)
        return [settle(values[:1, n : n + 1], planned.transform.default, out) > 0 for n in range(planned.width)]
