"""Events in, aggregated rows out: how soon an event is seen, how many a second, and whether each was counted once."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any, Final

import grpc
import numpy as np

from plait.api.events.v1 import events_pb2
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Internal, from_rpc_error
from plait_bench.features_data import ACTIVITY, ENTITY, Events, counted, entity_ids, set_name, spread_events, value_of
from plait_bench.features_world import OwnFeatures, World, read_request, stub_of, tensor_of
from plait_bench.measure import percentile_ms
from plait_bench.running import Say

_CALL: Final = 1000  # events of one call
_TIMEOUT_S: Final = 120.0
_PAUSE_S: Final = 0.02
_LOAD_EVENTS: Final = 20
_LOAD_PAUSE_S: Final = 0.01  # together 2 000 events/s beside what is probed
_READ_ROWS: Final = 5000
_PER_ENTITY: Final = 20
_LOADED: Final = "loaded-"  # entities that only the load writes


def event(event_id: str, entity: str, time_us: int, value: float) -> events_pb2.Event:
    """Return one event about an item."""
    made = events_pb2.Event(event_id=event_id, type=events_pb2.EVENT_TYPE_VIEW, value=value)
    made.event_time.FromMicroseconds(time_us)
    made.object.entity_type = ENTITY
    made.object.ids.string_ids.append(entity)
    return made


async def visibility(world: World, probes: int, say: Say) -> dict[str, Any]:
    """Publish one event through one process and read its entity through the other until it is counted; 2 000 others a second meanwhile."""
    seen: list[float] = []
    acked: list[float] = []
    async with world.plain.aio_channel() as writes, world.cached.aio_channel() as reads:
        writer, reader = stub_of(writes), stub_of(reads)
        load = asyncio.create_task(_load(writer, world), name="background events")
        for number in range(probes):
            entity = f"probe-{number}"
            request = read_request(set_name(ACTIVITY), [entity])
            await reader.GetFeatures(request, metadata=world.cached.metadata, timeout=_TIMEOUT_S)  # the near cache knows there is none
            one = event(f"probe-{number}", entity, int(time.time() * 1e6), 1.0)
            began = time.perf_counter()
            publish = asyncio.ensure_future(_publish(writer, world.plain, [one]))
            publish.add_done_callback(lambda _, began=began: acked.append(time.perf_counter() - began))  # type: ignore[misc]
            while True:
                answer = await reader.GetFeatures(request, metadata=world.cached.metadata, timeout=_TIMEOUT_S)
                if tensor_of(answer)[0, 0] == 1:
                    break
                if time.perf_counter() - began > _TIMEOUT_S:
                    raise Internal("an event was never counted", reason="BENCH_ANSWER_WRONG")
            seen.append(time.perf_counter() - began)
            await publish
        ended = load.done()
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
    if ended:
        raise Internal("the background events ended before the probes did", reason="BENCH_SERVER_FAILED")
    say(f"event → visible: p99 {percentile_ms(seen, 99):.1f} ms", sum(seen))
    return {
        "probes": probes,
        "p50_ms": percentile_ms(seen, 50),
        "p99_ms": percentile_ms(seen, 99),
        "highest_ms": max(seen) * 1e3,
        "acknowledged_p50_ms": percentile_ms(acked, 50),
    }


async def _load(stub: Any, world: World) -> None:
    """Publish other events, forever, at an even pace."""
    for number in itertools.count():
        now_us = int(time.time() * 1e6)
        await _publish(
            stub,
            world.plain,
            [event(f"load-{number}-{n}", f"{_LOADED}{(number * 7 + n) % 5000}", now_us, 1.0) for n in range(_LOAD_EVENTS)],
        )
        await asyncio.sleep(_LOAD_PAUSE_S)


async def counted_once(world: World, distinct: int, say: Say) -> dict[str, Any]:
    """Publish events out of order and some twice, through both processes at once, which also share the counting; count the wrong rows."""
    entities = max(distinct // _PER_ENTITY, 1)
    events = spread_events(distinct, entities, int(time.time() * 1e6))
    ids = entity_ids(entities)
    half = len(events) // 2
    server_s = world.plain.cpu_s() + world.cached.cpu_s()
    began = time.perf_counter()
    await asyncio.gather(
        _publish_all(world.plain, ids, events.at(slice(None, half))), _publish_all(world.cached, ids, events.at(slice(half, None)))
    )
    published_s = time.perf_counter() - began
    await _until_applied(world.plain)
    took_s = time.perf_counter() - began
    server_s = world.plain.cpu_s() + world.cached.cpu_s() - server_s
    expected = counted(events, entities)
    wrong = {server.name: await wrong_rows(server, ids, expected) for server in (world.plain, world.cached)}
    say(f"{len(events)} shuffled and repeated events: {sum(wrong.values())} wrong rows", took_s)
    return {
        "events": distinct,
        "published": len(events),
        "entities": entities,
        "published_per_s": len(events) / published_s,
        "applied_per_s": len(events) / took_s,
        "applied_per_cpu_s": len(events) / max(server_s, 1e-9),
        "wrong_rows": wrong,
    }


async def _publish_all(server: OwnFeatures, ids: list[str], events: Events) -> None:
    async with server.aio_channel() as channel:
        stub = stub_of(channel)
        for first in range(0, len(events), _CALL):
            part = events.at(slice(first, first + _CALL))
            columns = (part.number.tolist(), part.entity.tolist(), part.event_time_us.tolist(), value_of(part).tolist())
            await _publish(
                stub, server, [event(f"e{number}", ids[entity], at, value) for number, entity, at, value in zip(*columns, strict=True)]
            )


async def _publish(stub: Any, server: OwnFeatures, events: list[events_pb2.Event]) -> None:
    """Publish, again and again while too many wait."""
    while True:
        try:
            answer = await stub.PublishEvents(pb.PublishEventsRequest(events=events), metadata=server.metadata, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "EVENT_BACKLOG":
                raise
            await asyncio.sleep(_PAUSE_S)
            continue
        if answer.errors or answer.accepted != len(events):
            raise Internal(f"{len(events) - answer.accepted} events were refused", reason="BENCH_ANSWER_WRONG")
        return


async def _until_applied(server: OwnFeatures) -> None:
    """Return once nothing waits in the stream."""
    async with server.aio_channel() as channel:
        stub = stub_of(channel)
        give_up = time.monotonic() + _TIMEOUT_S
        while True:
            status = await stub.GetViewStatus(pb.GetViewStatusRequest(feature_view=ACTIVITY), metadata=server.metadata, timeout=_TIMEOUT_S)
            if status.dead_letters:
                raise Internal(f"{status.dead_letters} events were refused when they were applied", reason="BENCH_ANSWER_WRONG")
            if status.lag_events == 0:
                return
            if time.monotonic() > give_up:
                raise Internal(f"{status.lag_events} events were not applied in time", reason="BENCH_SERVER_FAILED")
            await asyncio.sleep(_PAUSE_S)


async def wrong_rows(server: OwnFeatures, ids: list[str], expected: np.ndarray[Any, Any]) -> int:
    """Read every entity twice (the second time from the near cache, where there is one); count rows that are not as expected."""
    wrong = 0
    async with server.aio_channel() as channel:
        stub = stub_of(channel)
        for first in [*range(0, len(ids), _READ_ROWS)] * 2:
            part = slice(first, first + _READ_ROWS)
            request = read_request(set_name(ACTIVITY), ids[part])
            answer = await stub.GetFeatures(request, metadata=server.metadata, timeout=_TIMEOUT_S)
            wrong += int((tensor_of(answer) != expected[part]).any(axis=1).sum())
    return wrong
