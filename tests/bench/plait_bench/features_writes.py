"""The write side of the features benchmark: how fast rows go in, how soon they are seen elsewhere, and whether the newest always wins."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Internal
from plait_bench.features_data import COUNTED, SMALL, SMALL_COLUMNS, Events, entity_ids, newest, set_name, shuffled_events
from plait_bench.features_world import BATCH_ROWS, OwnFeatures, World, batch, batches, read_request, stub_of, tensor_of, times_of
from plait_bench.measure import percentile_ms
from plait_bench.running import Say

_SLICE_ROWS: Final = 20_000  # of one stream, one figure
_TIMEOUT_S: Final = 120.0
_LOAD_ROWS: Final = 20
_LOAD_PAUSE_S: Final = 0.01  # together 2 000 rows/s beside what is probed
_SAMPLE: Final = 200
_READ_ROWS: Final = 5000
_PER_ENTITY: Final = 20  # events, about


# --- ingestion ----------------------------------------------------------------------------------------------------------------------------


async def ingestion(world: World, rows: int, say: Say) -> dict[str, Any]:
    """Write that many entities of the small view through one stream after the other; rows/s by the clock and by the service's CPU."""
    generator = np.random.default_rng(3)
    ids, now_us = entity_ids(rows), int(time.time() * 1e6)
    per_s: list[float] = []
    server_s = world.plain.cpu_s()
    redis_s = world.redis_cpu_s()
    with world.plain.channel() as channel:
        stub = stub_of(channel)
        for first in range(0, rows, _SLICE_ROWS):
            part = ids[first : first + _SLICE_ROWS]
            requests = batches(SMALL, part, generator.random((len(part), SMALL_COLUMNS), np.float32), now_us)
            took_s = await asyncio.to_thread(_ingest, stub, world.plain, requests, len(part))
            per_s.append(len(part) / took_s)
            say(f"IngestFeatures: {per_s[-1]:.0f} rows/s", took_s)
    server_s, redis_s = world.plain.cpu_s() - server_s, world.redis_cpu_s() - redis_s
    return {
        "rows": rows,
        "columns": SMALL_COLUMNS,
        "rows_per_batch": BATCH_ROWS,
        "rows_per_s": statistics.median(per_s),
        "rows_per_s_rounds": per_s,
        "rows_per_cpu_s": rows / max(server_s, 1e-9),
        "redis_cpu_us_per_row": redis_s / rows * 1e6,
    }


def _ingest(stub: Any, server: OwnFeatures, requests: Sequence[pb.IngestFeaturesRequest], rows: int) -> float:
    began = time.perf_counter()
    applied = 0
    for ack in stub.IngestFeatures(iter(requests), metadata=server.metadata, timeout=_TIMEOUT_S):
        if ack.HasField("status"):
            raise Internal(f"a batch was refused: {ack.status.message}", reason="BENCH_ANSWER_WRONG")
        applied += ack.result.applied
    if applied != rows:
        raise Internal(f"{applied} of {rows} rows were written", reason="BENCH_ANSWER_WRONG")
    return time.perf_counter() - began


# --- how soon a write is seen -------------------------------------------------------------------------------------------------------------


async def visibility(world: World, probes: int, keys: int, say: Say) -> dict[str, Any]:
    """Write one row through one process and read it through the other, whose near cache held the row before, until it is there.

    Meanwhile 2 000 other rows a second are written. The small view must hold `keys` entities.
    """
    seen: list[float] = []
    acked: list[float] = []
    probed = entity_ids(min(_SAMPLE, keys - 1))  # which nobody else writes
    async with world.plain.aio_channel() as writes, world.cached.aio_channel() as reads:
        writer, reader = stub_of(writes), stub_of(reads)
        load = asyncio.create_task(_load(writer, world, keys), name="background writes")
        for number in range(probes):
            entity = probed[number % len(probed)]
            request = read_request(set_name(SMALL), [entity])
            await reader.GetFeatures(request, metadata=world.cached.metadata, timeout=_TIMEOUT_S)  # from now on it is in the near cache
            marker = np.full((1, SMALL_COLUMNS), number + 2, np.float32)
            write = pb.WriteFeaturesRequest(batch=batch(SMALL, [entity], marker, [int(time.time() * 1e6)]))
            began = time.perf_counter()
            await writer.WriteFeatures(write, metadata=world.plain.metadata, timeout=_TIMEOUT_S)
            acked.append(time.perf_counter() - began)
            while True:
                answer = await reader.GetFeatures(request, metadata=world.cached.metadata, timeout=_TIMEOUT_S)
                if tensor_of(answer)[0, 0] == marker[0, 0]:
                    break
                if time.perf_counter() - began > _TIMEOUT_S:
                    raise Internal("a written row was never seen by the other process", reason="BENCH_ANSWER_WRONG")
            seen.append(time.perf_counter() - began)
        written = load.done()
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    if written:
        raise Internal("the background writes ended before the probes did", reason="BENCH_SERVER_FAILED")
    say(f"written → visible: p99 {percentile_ms(seen, 99):.1f} ms", sum(seen))
    return {
        "probes": probes,
        "p50_ms": percentile_ms(seen, 50),
        "p99_ms": percentile_ms(seen, 99),
        "highest_ms": max(seen) * 1e3,
        "acknowledged_p50_ms": percentile_ms(acked, 50),
    }


async def _load(stub: Any, world: World, keys: int) -> None:
    """Write other rows, forever, at an even pace."""
    generator = np.random.default_rng(5)

    async def requests() -> AsyncIterator[pb.IngestFeaturesRequest]:
        while True:
            ids = [f"item-{n:07d}" for n in generator.integers(min(_SAMPLE, keys - 1), keys, _LOAD_ROWS).tolist()]
            values = generator.random((_LOAD_ROWS, SMALL_COLUMNS), np.float32)
            yield pb.IngestFeaturesRequest(batch=batch(SMALL, ids, values, [int(time.time() * 1e6)]))
            await asyncio.sleep(_LOAD_PAUSE_S)

    async for _ in stub.IngestFeatures(requests(), metadata=world.plain.metadata):
        pass


# --- the newest wins ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Watch:
    """What a reader of the service with the near cache sees while the events arrive: the event times it has seen may only grow."""

    seen_us: dict[int, int] = field(default_factory=dict)
    reads: int = 0
    backwards: int = 0

    def take(self, entities: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> None:
        """Compare an answer with the ones before."""
        self.reads += len(entities)
        for entity, time_us in zip(entities.tolist(), times.tolist(), strict=True):
            self.backwards += time_us < self.seen_us.get(entity, 0)
            self.seen_us[entity] = max(time_us, self.seen_us.get(entity, 0))


async def newest_wins(world: World, distinct: int, say: Say) -> dict[str, Any]:
    """Write events out of order and some twice, through both processes at once; count the rows that are not their newest event's."""
    entities = max(distinct // _PER_ENTITY, 1)
    events = shuffled_events(distinct, entities, int(time.time() * 1e6))
    ids = entity_ids(entities)
    half = len(events) // 2
    watch = _Watch()
    began = time.perf_counter()
    reader = asyncio.create_task(_watch(world, ids, watch), name="reader")
    applied = await asyncio.gather(
        _write_events(world.plain, ids, events.at(slice(None, half))), _write_events(world.cached, ids, events.at(slice(half, None)))
    )
    took_s = time.perf_counter() - began
    ended = reader.done()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    if ended:
        raise Internal("the reader beside the writes ended before they did", reason="BENCH_SERVER_FAILED")
    wrong = {server.name: await _wrong_rows(server, ids, events) for server in (world.plain, world.cached)}
    say(f"{len(events)} shuffled and repeated writes: {sum(wrong.values())} wrong rows", took_s)
    return {
        "events": distinct,
        "writes": len(events),
        "entities": entities,
        "applied": sum(applied),
        "rows_per_s": len(events) / took_s,
        "wrong_rows": wrong,
        "rows_read_meanwhile": watch.reads,
        "went_backwards": watch.backwards,
    }


async def _write_events(server: OwnFeatures, ids: list[str], events: Events) -> int:
    """Write events in their order of arrival; return how many rows were newer than what was there."""

    async def requests() -> AsyncIterator[pb.IngestFeaturesRequest]:
        for first in range(0, len(events), BATCH_ROWS):
            part = events.at(slice(first, first + BATCH_ROWS))
            names = [ids[n] for n in part.entity.tolist()]
            made = batch(COUNTED, names, part.values(), part.event_time_us.tolist(), part.sequence.tolist())
            yield pb.IngestFeaturesRequest(batch_id=first, batch=made)

    applied = 0
    async with server.aio_channel() as channel:
        async for ack in stub_of(channel).IngestFeatures(requests(), metadata=server.metadata):
            if ack.HasField("status") or ack.result.errors:
                raise Internal(f"a batch was refused: {ack.status.message}", reason="BENCH_ANSWER_WRONG")
            applied += ack.result.applied
    return applied


async def _watch(world: World, ids: list[str], watch: _Watch) -> None:
    generator = np.random.default_rng(11)
    async with world.cached.aio_channel() as channel:
        stub = stub_of(channel)
        while True:
            entities = np.unique(generator.integers(0, min(len(ids), 10 * _SAMPLE), _SAMPLE))
            request = read_request(set_name(COUNTED), [ids[n] for n in entities.tolist()], with_times=True)
            answer = await stub.GetFeatures(request, metadata=world.cached.metadata, timeout=_TIMEOUT_S)
            watch.take(entities, times_of(answer))


async def _wrong_rows(server: OwnFeatures, ids: list[str], events: Events) -> int:
    """Read every entity twice (the second time from the near cache, where there is one); count rows that are not the newest event's."""
    last, there = newest(events, len(ids))
    expected = Events(np.arange(len(ids)), last, last.astype(np.uint64), last).values()
    expected[~there] = 0  # nothing was ever written: the declared default
    wrong = 0
    async with server.aio_channel() as channel:
        stub = stub_of(channel)
        for first in [*range(0, len(ids), _READ_ROWS)] * 2:
            part = slice(first, first + _READ_ROWS)
            request = read_request(set_name(COUNTED), ids[part])
            answer = await stub.GetFeatures(request, metadata=server.metadata, timeout=_TIMEOUT_S)
            wrong += int((tensor_of(answer) != expected[part]).any(axis=1).sum())
    return wrong
