"""THE PAGE of feature-retrieval: ids in, tensors and the truth about them out.

plan (compiled) → ids (each once) → near cache → one round trip to Redis for what is left → runs of columns into tensors → statuses → policy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.near_cache import UNKNOWN, Found, NearCache, Places, Reading
from feature_retrieval.row_codec import FLAG_TOMBSTONE, HEADER_BYTES, LAYOUT, Bytes2D, Id, KeySpace, header, join
from feature_retrieval.store.rows import NONE, Positions, Read, Rows
from feature_retrieval.views import EntityPlan, Picture, Plan, Plans, ViewPlan
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable, Violation
from plait.rpc.call import Call

MAX_ROWS: Final = 10_000  # of one entity type
# Part of what is left of the deadline that a read may take: an answer that says TIMED_OUT must still reach the caller in time.
_READ_SHARE: Final = 0.9

_PRESENT: Final = types_pb2.ROW_STATUS_PRESENT
_PRESENT_BYTE: Final = bytes([_PRESENT])
_NULL: Final = types_pb2.ROW_STATUS_NULL
_DEFAULTED: Final = types_pb2.ROW_STATUS_DEFAULTED
_NOT_FOUND: Final = types_pb2.ROW_STATUS_NOT_FOUND
_STALE: Final = types_pb2.ROW_STATUS_STALE
_TIMED_OUT: Final = types_pb2.ROW_STATUS_TIMED_OUT
_UNAVAILABLE: Final = types_pb2.ROW_STATUS_UNAVAILABLE
_STATUSES: Final = len(types_pb2.RowStatus.keys())
_LAYOUT_BYTES: Final = LAYOUT.to_bytes(2, "little")

Tensor = npt.NDArray[np.generic]
Index = npt.NDArray[np.intp]
_Placed = tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.int64]]  # [rows] statuses (None = all PRESENT), [rows] event times


@dataclass(slots=True)
class _Read:
    """One view of one request while it is read: which ids are still wanted from Redis, and what is known of the others."""

    view: ViewPlan
    ids: Sequence[Id]
    space: KeySpace
    found: Found | None  # in the near cache
    wanted: Index | None = None  # positions asked from Redis; None = all
    keys: Sequence[bytes] = ()
    reading: Reading | None = None
    rows: Sequence[bytes | None] = ()  # parallel to keys
    late: Positions = field(default_factory=lambda: NONE)  # of keys
    failed: Positions = field(default_factory=lambda: NONE)

    def wanted_ids(self) -> Sequence[Id]:
        return self.ids if self.wanted is None else [self.ids[at] for at in self.wanted.tolist()]

    def answered(self) -> tuple[Sequence[Id], Sequence[bytes | None]]:
        """Return the ids whose keys were answered, and their rows."""
        ids = self.wanted_ids()
        if not (self.late.size or self.failed.size):
            return ids, self.rows
        known = np.delete(np.arange(len(self.rows)), np.concatenate((self.late, self.failed))).tolist()
        return [ids[at] for at in known], [self.rows[at] for at in known]


class Retrieval:
    """Answers GetFeatures. `plans` gives the compiled feature sets of the newest snapshot."""

    def __init__(self, store: Rows, cache: NearCache, plans: Callable[[], Plans], clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._cache = cache
        self._plans = plans
        self._clock = clock

    async def get_features(self, request: Any, response: Any, call: Call) -> None:
        """Fill a GetFeaturesResponse for a GetFeaturesRequest; errors as the contract says."""
        plans = self._plans()
        plan = plans.get(request.feature_set, request.inputs)
        ids = _ids_by_type(plan, request.entities)
        if call.deadline.expired:
            raise DeadlineExceeded("the deadline had passed before the read began: allow the call more time")
        tensors: list[Tensor | None] = [None] * len(plan.tensors)
        reads: list[_Read] = []
        inverses: dict[str, Index | None] = {}
        now_us = int(self._clock() * 1e6)
        for entity in plan.entities:
            looked_up, inverse = self._look_up(entity, ids[entity.entity_type], call.tenant, now_us)
            reads += looked_up
            inverses[entity.entity_type] = inverse
            for at in entity.tensors:
                tensors[at] = np.empty((len(looked_up[0].ids), plan.tensors[at].width), plan.tensors[at].dtype)
        response.store_us = await self._fetch(reads, call.deadline.remaining_s() * _READ_SHARE)

        now_us = int(self._clock() * 1e6)
        counts = [0] * _STATUSES
        for read in reads:
            placed = _place_clean(read, tensors, now_us) or _place(read, tensors, now_us)
            inverse = inverses[read.view.view.entity.type]
            for status, count in enumerate(_report(response, read.view, placed, inverse, with_times=request.include_event_times)):
                counts[status] += count
        _enforce(request, counts)
        for at, tensor_plan in enumerate(plan.tensors):
            tensor, inverse = tensors[at], inverses[tensor_plan.entity_type]
            assert tensor is not None  # noqa: S101  (every tensor belongs to an entity of the plan)
            _answer(response, tensor_plan.name, tensor_plan.number, tensor if inverse is None else tensor[inverse])
        response.registry_revision = plans.snapshot.revision

    def _look_up(self, entity: EntityPlan, ids: Sequence[Id], tenant: str, now_us: int) -> tuple[list[_Read], Index | None]:
        """Find what the near cache knows of an entity type's rows, and which keys to ask Redis for; where each caller's row is, if repeated."""
        reads = self._find(entity, ids, tenant, now_us)
        if all(read.found is not None and read.found.clean for read in reads):
            return reads, None
        unique, inverse = _unique(ids)
        if inverse is not None:
            reads = self._find(entity, unique, tenant, now_us)
        for read in reads:
            read.wanted = None if read.found is None else np.flatnonzero(read.found.codes == UNKNOWN)
            if read.wanted is None or read.wanted.size:
                read.keys = read.space.keys(read.wanted_ids())
        return reads, inverse

    def _find(self, entity: EntityPlan, ids: Sequence[Id], tenant: str, now_us: int) -> list[_Read]:
        reads: list[_Read] = []
        places: Places | None = None
        for view in entity.views:
            space = view.key_space(tenant)
            if not reads:
                places = self._cache.places(space.prefix, ids)
            found = None if places is None else self._cache.find(space, view.current.codec, places, now_us)
            reads.append(_Read(view, ids, space, found))
        return reads

    async def _fetch(self, reads: list[_Read], timeout_s: float) -> int:
        """Read every wanted key of every view in one round trip; return the microseconds waited. Failures become statuses."""
        keys = [key for read in reads for key in read.keys]
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
            for read in reads:
                if not read.keys:
                    continue
                until = at + len(read.keys)
                if answer is not None:
                    read.rows = answer.rows[at:until]
                    read.late, read.failed = _within(answer.late, at, until), _within(answer.failed, at, until)
                if read.reading is not None:
                    self._cache.end(read.reading, *(((), ()) if answer is None else read.answered()))
                at = until
        return int((time.perf_counter() - began) * 1e6)


def _within(positions: Positions, at: int, until: int) -> Positions:
    """Return which of some ascending positions lie in [at, until), counted from `at`."""
    if not positions.size:
        return NONE
    first, last = np.searchsorted(positions, (at, until))
    return positions[first:last] - at


def _ids_by_type(plan: Plan, entities: Any) -> dict[str, Sequence[Id]]:
    """Check the request's entities against the plan; return the ids by entity type. Raises InvalidArgument with every violation."""
    problems: list[Violation] = []
    needed = {entity.entity_type: entity for entity in plan.entities}
    found: dict[str, Sequence[Id]] = {}
    for at, rows in enumerate(entities):
        entity = needed.get(rows.entity_type)
        if entity is None or rows.entity_type in found:
            wrong = (
                "is given twice"
                if entity is not None
                else f"is not used by feature set {plan.feature_set.name!r}: it needs {sorted(needed)}"
            )
            problems.append(Violation(f"entities[{at}].entity_type", wrong))
            continue
        ids, problem = ids_of(rows.ids, entity.key)
        if problem:
            problems.append(Violation(f"entities[{at}].ids", problem))
        elif len(ids) > MAX_ROWS:
            problems.append(Violation(f"entities[{at}].ids", f"{len(ids)} rows are asked for, at most {MAX_ROWS} of a type are allowed"))
        found[rows.entity_type] = ids
    problems += [Violation("entities", f"ids of entity type {missing!r} are missing") for missing in needed.keys() - found.keys()]
    if problems:
        raise InvalidArgument("the entities do not fit the feature set", violations=problems)
    return found


def ids_of(ids: Any, key: str) -> tuple[Sequence[Id], str]:
    """Return the ids of an EntityIds message as a sequence, and what is wrong with them (empty = nothing)."""
    strings, ints, composites = ids.string_ids, ids.int64_ids, ids.composite_ids
    given = [name for name, values in (("string_ids", strings), ("int64_ids", ints), ("composite_ids", composites)) if values]
    if len(given) > 1:
        return (), f"only one of {given} may be set"
    if not given:
        return (), "at least one id is needed"
    if given[0] != f"{key}_ids":
        return (), f"{given[0]} are given, but the entity type's key is {key}: set {key}_ids"
    values: list[Id] = list(strings or ints)
    if key == "string" and "" in values:
        return values, "an id is empty"
    return values, ""


def _unique(ids: Sequence[Id]) -> tuple[Sequence[Id], Index | None]:
    """Return each id once, and where each caller's row is among them (None = nothing was repeated)."""
    if len(set(ids)) == len(ids):
        return ids, None
    order = {entity_id: at for at, entity_id in enumerate(dict.fromkeys(ids))}
    return list(order), np.fromiter(map(order.__getitem__, ids), np.intp, len(ids))


def _place_clean(read: _Read, tensors: Sequence[Tensor | None], now_us: int) -> _Placed | None:
    """The common case: every row came from the near cache and is simply good. Copy them; None where it is not so."""
    found, view = read.found, read.view
    if found is None or not found.clean or now_us >= found.until_us:
        return None
    times = header(found.rows)["event_time_us"]
    if view.view.max_age_s > 0 and times.min(initial=now_us) < now_us - int(view.view.max_age_s * 1e6):
        return None
    _copy_runs(view.current, found.rows, slice(None), tensors)
    return None, times


def _place(read: _Read, tensors: Sequence[Tensor | None], now_us: int) -> _Placed:
    """Copy one view's rows into the tensors, defaults where there are none; return what is true of each."""
    count = len(read.ids)
    statuses = np.zeros(count, np.uint8)
    event_times = np.zeros(count, np.int64)
    for picture, block, index in _blocks(read):
        _place_block(read.view, picture, block, index, tensors, statuses, event_times, now_us)
    for unknown, status in ((read.late, _TIMED_OUT), (read.failed, _UNAVAILABLE)):
        if unknown.size:
            statuses[unknown if read.wanted is None else read.wanted[unknown]] = status
    absent = np.flatnonzero(statuses == 0)
    if absent.size:
        statuses[absent] = _DEFAULTED if read.view.has_all_defaults else _NOT_FOUND
    empty = np.flatnonzero((statuses >= _DEFAULTED) & (statuses != _STALE))
    if empty.size:
        for at, cells in read.view.cells.items():
            tensor = tensors[at]
            assert tensor is not None  # noqa: S101
            tensor[np.ix_(empty, cells)] = read.view.defaults[at]
    return statuses, event_times


def _blocks(read: _Read) -> list[tuple[Picture, Bytes2D, Index | None]]:
    """Return the rows that exist as blocks of one schema each, with their positions (None = all, in order)."""
    blocks: list[tuple[Picture, Bytes2D, Index | None]] = []
    if read.found is not None:
        hits = np.flatnonzero(read.found.codes >= 0)
        if hits.size == len(read.ids):
            return [(read.view.current, read.found.rows, None)]
        if hits.size:
            blocks.append((read.view.current, read.found.rows, hits))
    fetched = read.rows
    if not fetched:
        return blocks
    whole = None if None in fetched else join(fetched, read.view.current.codec.row_bytes)  # type: ignore[arg-type]
    if whole is not None and read.view.current.codec.fits(whole):
        blocks.append((read.view.current, whole, read.wanted))
        return blocks
    return blocks + _by_schema(read)


def _by_schema(read: _Read) -> list[tuple[Picture, Bytes2D, Index | None]]:
    """The uncommon case: some rows are missing, or were written under an older schema. Rows nobody can read count as missing."""
    positions = np.arange(len(read.rows)) if read.wanted is None else read.wanted
    groups: dict[int, list[int]] = {}
    for at, row in enumerate(read.rows):
        if row is not None and len(row) >= HEADER_BYTES and row.startswith(_LAYOUT_BYTES):
            groups.setdefault(int.from_bytes(row[2:4], "little"), []).append(at)
    blocks: list[tuple[Picture, Bytes2D, Index | None]] = []
    for schema_id, members in groups.items():
        picture = read.view.pictures.get(schema_id)
        if picture is None:
            continue
        fitting = [at for at in members if len(read.rows[at] or b"") == picture.codec.row_bytes]
        block = join([row for at in fitting if (row := read.rows[at]) is not None], picture.codec.row_bytes)
        if block is not None and fitting:
            blocks.append((picture, block, positions[fitting]))
    return blocks


def _place_block(
    view: ViewPlan,
    picture: Picture,
    block: Bytes2D,
    index: Index | None,
    tensors: Sequence[Tensor | None],
    statuses: npt.NDArray[np.uint8],
    event_times: npt.NDArray[np.int64],
    now_us: int,
) -> None:
    """Copy one block of rows of one schema: runs of columns, then defaults over nulls, then what is true of each row."""
    rows: Index | slice = slice(None) if index is None else index
    _copy_runs(picture, block, rows, tensors)
    head = header(block)
    status = np.full(len(block), _PRESENT, np.uint8)
    nulls = picture.codec.has_null(block, picture.null_mask)
    if picture.absent or nulls.any():
        where = np.arange(len(block)) if picture.absent else np.flatnonzero(nulls)
        status[where] = _NULL
        _default_nulls(view, picture, block[where], where if index is None else index[where], tensors)
    times = head["event_time_us"]
    if view.view.max_age_s > 0:
        status[times < now_us - int(view.view.max_age_s * 1e6)] = _STALE
    expires = head["expires_us"]
    status[(expires > 0) & (expires < now_us)] = _STALE
    status[(head["flags"] & FLAG_TOMBSTONE) != 0] = 0
    statuses[rows] = status
    event_times[rows] = np.where(status == 0, 0, times)


def _copy_runs(picture: Picture, block: Bytes2D, rows: Index | slice, tensors: Sequence[Tensor | None]) -> None:
    for run in picture.runs:
        tensor = tensors[run.tensor]
        assert tensor is not None  # noqa: S101
        tensor[rows, run.column_from : run.column_to] = block[:, run.row_from : run.row_to].view(run.dtype)


def _default_nulls(view: ViewPlan, picture: Picture, block: Bytes2D, index: Index, tensors: Sequence[Tensor | None]) -> None:
    """Put each feature's default where its cell is null or its column is younger than the row. `block`, `index`: rows with a null only."""
    nulls = picture.codec.nulls(block)
    for at, cells in view.cells.items():
        tensor = tensors[at]
        assert tensor is not None  # noqa: S101
        unknown = np.ones((len(block), len(cells)), np.bool_)
        for position, name in enumerate(view.names[at]):
            column = picture.codec.columns.get(name)
            if column is not None:
                unknown[:, position] = nulls[:, column.index]
        here = np.ix_(index, cells)
        tensor[here] = np.where(unknown, view.defaults[at], tensor[here])


def _report(response: Any, view: ViewPlan, placed: _Placed, inverse: Index | None, *, with_times: bool) -> list[int]:
    """Add the view's report to the answer; return its counts by status."""
    statuses, times = placed
    if inverse is not None:
        statuses, times = (None if statuses is None else statuses[inverse]), times[inverse]
    if statuses is None:
        counts = [0] * _STATUSES
        counts[_PRESENT] = len(times)
        told = _PRESENT_BYTE * len(times)
    else:
        counts = np.bincount(statuses, minlength=_STATUSES).tolist()
        told = statuses.tobytes()
    report = response.views.add(feature_view=view.view.name, entity_type=view.view.entity.type, statuses=told)
    report.status_counts.extend(counts)
    if with_times:
        report.event_times_us = times.astype("<i8").tobytes()
    return counts


def _enforce(request: Any, counts: Sequence[int]) -> None:
    """Apply the request's policy and its largest share of defaulted (row, view) pairs to what was found."""
    good = counts[_PRESENT] + counts[_NULL]
    if request.policy == types_pb2.MISSING_POLICY_STALE_OK:
        good += counts[_STALE]
    total = sum(counts)
    bad = total - good
    share = request.max_defaulted_share * (1 + 1e-6)  # a float32: 0.29 of 100 rows are 29 rows
    if bad == 0 or (request.policy != types_pb2.MISSING_POLICY_FAIL and (share <= 0 or bad <= share * total)):
        return
    found = {types_pb2.RowStatus.keys()[at].removeprefix("ROW_STATUS_").lower(): n for at, n in enumerate(counts) if n}
    message = f"{bad} of {total} (row, view) pairs are not present, which the call's policy refuses: {found}"
    if counts[_UNAVAILABLE]:
        raise Unavailable(message, reason="STORE_UNAVAILABLE", retry_after_s=0.25)
    if counts[_TIMED_OUT]:
        raise DeadlineExceeded(message)
    raise FailedPrecondition(message, reason="FEATURES_MISSING")


def _answer(response: Any, name: str, number: int, tensor: Tensor) -> None:
    added = response.tensors.add(name=name, dtype=number)
    added.shape.extend(tensor.shape)
    added.data = tensor.tobytes()
