"""What was served, kept for a sample of entities, so that an offline recomputation can be compared with it (`plait features skew`).

Entities are sampled, not requests: an id whose hash falls below the share is logged in every answer of every replica. Requests only hand over
copies of the sampled rows; messages are built and written in a thread, and what comes faster than that is dropped and counted.

Files are called `served-<start in µs>-<process>-<number>.rows` and hold ServedRow messages, each behind its length as a varint.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.retrieval import Answer
from feature_retrieval.row_codec import Id, encode_id
from feature_retrieval.views import ViewPlan
from plait.api.feature_retrieval.v1 import served_row_pb2
from plait.api.types.v1 import types_pb2
from plait.rpc.call import Call
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_BATCH_S: Final = 0.2  # between two writes, so that one writes the rows of many requests
_REMEMBERED_IDS: Final = 200_000  # that are not sampled, so that a frequent id is hashed once
_PRESENT: Final = types_pb2.ROW_STATUS_PRESENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Some rows of one entity type of one answer. `tensors`: (name, DataType, [rows, columns]); `views`: statuses and times [rows]."""

    served_at_us: int
    tenant: str
    feature_set: str
    revision: int
    request_id: str
    entity_type: str
    ids: Sequence[Id]
    tensors: Sequence[tuple[str, int, npt.NDArray[Any]]]
    views: Sequence[tuple[ViewPlan, npt.NDArray[np.uint8] | None, npt.NDArray[np.int64]]]


class SkewLog:
    """Takes rows from requests and writes them from `run`, until `close`.

    `share` (0 to 1) of all entity ids are sampled; at most `queue_rows` rows wait to be written; a file is finished at `max_file_bytes` or
    after `max_file_s`. `outcomes` counts rows "written", "dropped" (the queue was full) and "failed" (the disk refused them).
    """

    def __init__(
        self, folder: Path, *, share: float, max_file_bytes: int, max_file_s: float, queue_rows: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._limit = int(share * (1 << 32))
        self._queue_rows = queue_rows
        self._max_file_s = max_file_s
        self._files = _Files(folder, max_file_bytes, max_file_s, clock)
        self._waiting: list[Sampled] = []
        self._waiting_rows = 0
        self._wake = asyncio.Event()
        self._passed: set[Id] = set()
        self.outcomes: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<SkewLog waiting={self._waiting_rows}/{self._queue_rows} {dict(self.outcomes)}>"

    def note(self, answer: Answer, revision: int, call: Call) -> None:
        """Take the sampled rows of an answer."""
        for entity in answer.plan.entities:
            ids = answer.ids[entity.entity_type]
            places = self._sampled(ids)
            if not places:
                continue
            if self._waiting_rows + len(places) > self._queue_rows:
                self.outcomes["dropped"] += len(places)
                continue
            tensors = answer.plan.tensors
            mine = [at for at in entity.tensors if at < answer.plan.answered]
            self._waiting.append(
                Sampled(
                    served_at_us=answer.now_us,
                    tenant=call.tenant,
                    feature_set=answer.plan.feature_set.name,
                    revision=revision,
                    request_id=call.request_id,
                    entity_type=entity.entity_type,
                    ids=[ids[at] for at in places],
                    tensors=[(tensors[at].name, tensors[at].number, answer.tensors[at][places]) for at in mine],
                    views=[
                        (read.view, None if placed.statuses is None else placed.statuses[places], placed.times[places])
                        for read, placed in zip(answer.reads, answer.placed, strict=True)
                        if read.view.view.entity.type == entity.entity_type
                    ],
                )
            )
            self._waiting_rows += len(places)
            self._wake.set()

    async def run(self) -> None:
        """Write what was taken, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._max_file_s):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(_BATCH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what was taken so far."""
        await asyncio.to_thread(self._write, self._take())

    def close(self) -> None:
        """Write what was taken, and finish the file."""
        self._write(self._take())
        self._files.close()

    def _sampled(self, ids: Sequence[Id]) -> list[int]:
        """Return the positions of sampled ids."""
        passed = self._passed
        places = []
        for at in [at for at, entity_id in enumerate(ids) if entity_id not in passed]:
            if zlib.crc32(encode_id(ids[at])) < self._limit:
                places.append(at)
            else:
                passed.add(ids[at])
        if len(passed) > _REMEMBERED_IDS:
            passed.clear()
        return places

    def _take(self) -> list[Sampled]:
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        return waiting

    def _write(self, waiting: Sequence[Sampled]) -> None:
        rows = sum(len(sampled.ids) for sampled in waiting)
        try:
            self._files.write(waiting)
        except OSError as error:
            self.outcomes["failed"] += rows
            log.warning("the skew log cannot be written", error=error.strerror)
        else:
            self.outcomes["written"] += rows


class _Files:
    """One file after the other. Used by one thread at a time."""

    def __init__(self, folder: Path, max_bytes: int, max_s: float, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_s = max_s
        self._clock = clock
        self._file: IO[bytes] | None = None
        self._began_s = 0.0
        self._number = 0
        self._lock = threading.Lock()

    def write(self, waiting: Sequence[Sampled]) -> None:
        """Append rows; finish files that are large or old. Raises OSError."""
        with self._lock:
            if self._file is not None and self._clock() - self._began_s >= self._max_s:
                self._finish()
            for sampled in waiting:
                file = self._file or self._begin()
                file.write(_delimited(sampled))
                if file.tell() >= self._max_bytes:
                    self._finish()
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        with self._lock, suppress(OSError):
            self._finish()

    def _begin(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._began_s = self._clock()
        self._number += 1
        path = self._folder / f"served-{int(self._began_s * 1e6)}-{os.getpid()}-{self._number}.rows"
        self._file = path.open("xb")
        return self._file

    def _finish(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())


def _delimited(sampled: Sampled) -> bytes:
    pieces: list[bytes] = []
    for at in range(len(sampled.ids)):
        data = _message(sampled, at).SerializeToString()
        pieces += [_varint(len(data)), data]
    return b"".join(pieces)


def _message(sampled: Sampled, at: int) -> Any:
    row = served_row_pb2.ServedRow(
        served_at_us=sampled.served_at_us,
        tenant=sampled.tenant,
        feature_set=sampled.feature_set,
        registry_revision=sampled.revision,
        request_id=sampled.request_id,
        entity_type=sampled.entity_type,
    )
    _put_id(row.id, sampled.ids[at])
    for name, number, rows in sampled.tensors:
        row.tensors.add(name=name, dtype=number, shape=[1, rows.shape[1]], data=rows[at].tobytes())
    for plan, statuses, times in sampled.views:
        row.views.add(
            feature_view=plan.view.name,
            view_version=plan.view.version,
            epoch=plan.epoch_of(sampled.tenant),
            status=_PRESENT if statuses is None else int(statuses[at]),
            event_time_us=int(times[at]),
        )
    return row


def _put_id(ids: Any, entity_id: Id) -> None:
    if isinstance(entity_id, str):
        ids.string_ids.append(entity_id)
    elif isinstance(entity_id, int):
        ids.int64_ids.append(entity_id)
    else:
        parts = ids.composite_ids.add().parts
        for part in entity_id:
            parts.add(**{"string_part" if isinstance(part, str) else "int64_part": part})


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
