"""THE PAGE of feature-retrieval: ids in, tensors and the truth about them out.

plan (compiled) → ids (each once) → near cache → one round trip to the store for what is left → runs of columns into tensors →
what was sent along → transforms → statuses → policy
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval import policies, request_features, transforming
from feature_retrieval.entity_ids import ids_by_type, unique
from feature_retrieval.near_cache import UNKNOWN, NearCache, Places
from feature_retrieval.permissions import check_readable
from feature_retrieval.placing import Index, Placed, Tensor, place
from feature_retrieval.read_metrics import ReadCounts
from feature_retrieval.row_codec import Id, KeySpace
from feature_retrieval.store.rows import NONE, Positions, Read, Rows
from feature_retrieval.view_read import ViewRead
from feature_retrieval.views import EntityPlan, Plan, Plans, ViewPlan
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, Unavailable
from plait.rpc.call import Call

# Part of what is left of the deadline that a read may take: an answer that says TIMED_OUT must still reach the caller in time.
_READ_SHARE: Final = 0.9
_PRESENT_BYTE: Final = bytes([types_pb2.ROW_STATUS_PRESENT])


@dataclass(slots=True, kw_only=True)
class Answer:
    """All that is known of one request before it is put on the wire.

    `tensors` are the plan's, [rows as the caller gave them, columns]; `reads` and `placed` are parallel, one per view, the latter by the
    caller's rows. `now_us`: when statuses and ages are true, µs since the epoch.
    """

    plan: Plan
    ids: dict[str, Sequence[Id]]
    reads: list[ViewRead]
    placed: list[Placed]
    tensors: list[Tensor]
    sent: request_features.Sent
    defaulted_cells: int  # of all answered cells
    now_us: int
    store_us: int


Note = Callable[[Answer, int, Call], None]


class Retrieval:
    """Answers GetFeatures. `plans` gives the compiled feature sets of the newest snapshot; `note` is told every answer, and its revision."""

    def __init__(
        self,
        store: Rows,
        cache: NearCache,
        plans: Callable[[], Plans],
        clock: Callable[[], float] = time.time,
        *,
        counts: ReadCounts | None = None,
        note: Note | None = None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._plans = plans
        self._clock = clock
        self._counts = counts or ReadCounts()
        self._note = note

    async def get_features(self, request: Any, response: Any, call: Call) -> None:
        """Fill a GetFeaturesResponse for a GetFeaturesRequest; errors as the contract says."""
        policies.check(request)
        plans = self._plans()
        answer = await self.answer(plans.get(request.feature_set, request.inputs), request, call)
        counts = [0] * policies.STATUSES
        for read, placed in zip(answer.reads, answer.placed, strict=True):
            by_status, defaulted_cells = _report(response, read.view, placed, request, answer.now_us)
            self._counts.add(read.view.view.name, by_status, defaulted_cells)
            for status, count in enumerate(by_status):
                counts[status] += count
        policies.enforce(request, counts, answer.defaulted_cells, sum(tensor.size for tensor in answer.tensors[: answer.plan.answered]))
        for tensor_plan, tensor in zip(answer.plan.tensors[: answer.plan.answered], answer.tensors, strict=False):
            add_tensor(response, tensor_plan.name, tensor_plan.number, tensor)
        response.store_us = answer.store_us
        response.registry_revision = plans.snapshot.revision
        if self._note is not None:
            self._note(answer, plans.snapshot.revision, call)

    async def answer(self, plan: Plan, request: Any, call: Call) -> Answer:
        """Read all a plan needs for a request's `entities` and `request_features`. Raises PermissionDenied, InvalidArgument, DeadlineExceeded."""
        for view in plan.restricted:
            check_readable(view, call)
        ids = ids_by_type(plan, request.entities)
        rows = {entity_type: len(of) for entity_type, of in ids.items()}
        transforming.check_rows(plan, rows)
        sent = request_features.take(plan, request.request_features, rows)
        if call.deadline.expired:
            raise DeadlineExceeded("the deadline had passed before the read began: allow the call more time")
        tensors: list[Tensor] = [_NO_TENSOR] * len(plan.tensors)
        reads: list[ViewRead] = []
        inverses: dict[str, Index | None] = {}
        now_us = int(self._clock() * 1e6)
        for entity in plan.entities:
            looked_up, inverses[entity.entity_type] = self._look_up(entity, ids[entity.entity_type], call.tenant, now_us)
            reads += looked_up
            count = len(looked_up[0].ids) if looked_up else rows[entity.entity_type]
            for at in entity.tensors:
                tensors[at] = np.empty((count, plan.tensors[at].width), plan.tensors[at].dtype)
        store_us = await self._fetch(reads, call.deadline.remaining_s() * _READ_SHARE)

        now_us = int(self._clock() * 1e6)
        placed = [place(read, tensors, now_us).expanded(inverses[read.view.view.entity.type]) for read in reads]
        tensors = [_expanded(tensor, inverses[of.entity_type]) for tensor, of in zip(tensors, plan.tensors, strict=True)]
        defaulted = request_features.place(plan, sent, tensors)  # by the caller's rows: one id given twice may have two values
        defaulted += transforming.compute(plan, sent, tensors, now_us)
        defaulted += sum(int(p.defaulted.sum()) for p in placed if p.defaulted is not None)
        return Answer(
            plan=plan, ids=ids, reads=reads, placed=placed, tensors=tensors, sent=sent, defaulted_cells=defaulted, now_us=now_us,
            store_us=store_us,
        )  # fmt: skip

    def _look_up(self, entity: EntityPlan, ids: Sequence[Id], tenant: str, now_us: int) -> tuple[list[ViewRead], Index | None]:
        """Find what the near cache knows of an entity type's rows, and which keys to ask for; where each caller's row is, if repeated."""
        spaces = [view.key_space(tenant) for view in entity.views]
        places = self._cache.places(spaces[0].prefix, ids) if spaces else None
        inverse: Index | None = None
        reads = self._find(entity, spaces, ids, places, now_us, clean=True) if places is not None and places.complete else []
        if len(reads) < len(spaces):
            once, inverse = unique(ids)
            if inverse is not None and places is not None:
                places = places.once(inverse)
            reads = self._find(entity, spaces, once, places, now_us)
            for read in reads:
                read.wanted = None if read.found is None else np.flatnonzero(read.found.codes == UNKNOWN)
                if read.wanted is None or read.wanted.size:
                    read.keys = read.space.keys(read.wanted_ids())
        for read in reads:
            self._cache.count(read.found, len(read.ids))
        return reads, inverse

    def _find(
        self, entity: EntityPlan, spaces: Sequence[KeySpace], ids: Sequence[Id], places: Places | None, now_us: int, *, clean: bool = False
    ) -> list[ViewRead]:
        """Return a read per view, with what the near cache holds of it; with `clean` up to the first view whose rows must be looked at."""
        reads: list[ViewRead] = []
        for view, space in zip(entity.views, spaces, strict=True):
            found = None if places is None else self._cache.find(space, view.current.codec, places, now_us, clean=clean)
            if clean and found is None:
                break
            reads.append(ViewRead(view, ids, space, found))
        return reads

    async def _fetch(self, reads: list[ViewRead], timeout_s: float) -> int:
        """Read every wanted key of every view in one round trip; return the microseconds waited. Failures become statuses."""
        keys = reads[0].keys if len(reads) == 1 else [key for read in reads for key in read.keys]
        if not keys:
            return 0
        for read in reads:
            if read.keys:
                read.reading = self._cache.begin(read.space, read.view.current.codec)
        began = time.perf_counter()
        answer: Read | None = None
        try:
            answer = await self._store.read(keys, timeout_s)
        except Unavailable:
            answer = Read([None] * len(keys), failed=np.arange(len(keys)))
        finally:  # a cancelled read must end in the near cache, too
            at = 0
            asyncio.get_running_loop().call_soon(self._cache.settle)  # nobody should wait for that
            for read in reads:
                if not read.keys:
                    continue
                until = at + len(read.keys)
                if answer is not None:
                    read.take(answer.rows[at:until], _within(answer.late, at, until), _within(answer.failed, at, until))
                if read.reading is not None:
                    self._cache.end(read.reading, *(((), ()) if answer is None else read.answered()), read.block)
                at = until
        return int((time.perf_counter() - began) * 1e6)


_NO_TENSOR: Final[Tensor] = np.empty((0, 0))


def _within(positions: Positions, at: int, until: int) -> Positions:
    """Return which of some ascending positions lie in [at, until), counted from `at`."""
    if not positions.size:
        return NONE
    first, last = np.searchsorted(positions, (at, until))
    return positions[first:last] - at


def _expanded(tensor: Tensor, inverse: Index | None) -> Tensor:
    return tensor if inverse is None else tensor[inverse]


def _report(response: Any, view: ViewPlan, placed: Placed, request: Any, now_us: int) -> tuple[list[int], int]:
    """Add the view's report to the answer; return its counts by status, and its defaulted cells."""
    times = placed.times
    if placed.statuses is None:
        counts = [0] * policies.STATUSES
        counts[types_pb2.ROW_STATUS_PRESENT] = len(times)
        told = _PRESENT_BYTE * len(times)
    else:
        counts = np.bincount(placed.statuses, minlength=policies.STATUSES).tolist()
        told = placed.statuses.tobytes()
    report = response.views.add(feature_view=view.view.name, entity_type=view.view.entity.type, statuses=told)
    report.status_counts.extend(counts)
    if placed.defaulted is not None:
        report.defaulted_cells = int(placed.defaulted.sum())
    if request.include_event_times:
        report.event_times_us = times.astype("<i8").tobytes()
    if request.include_ages:
        report.ages_us = ages_us(times, now_us).astype("<i8").tobytes()
    return counts, report.defaulted_cells


def ages_us(times: npt.NDArray[np.int64], now_us: int) -> npt.NDArray[np.int64]:
    """Return the ages of rows by their event times, µs: -1 where there is no row, 0 for a time that is still to come."""
    return np.where(times == 0, -1, np.maximum(now_us - times, 0))


def add_tensor(response: Any, name: str, number: int, tensor: Tensor) -> None:
    """Add a tensor to an answer; `number`: its DataType."""
    added = response.tensors.add(name=name, dtype=number)
    added.shape.extend(tensor.shape)
    added.data = tensor.tobytes()
