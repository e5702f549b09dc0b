"""The ways to have the features of some entities as one float32 matrix that are compared: from a bare MGET to a call over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import hiredis
import numpy as np
import redis

from feature_retrieval.audience import Audience
from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import KeySpace, RowCodec, entity_prefix
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.rows import Read, Rows
from feature_retrieval.views import Plans, schemas_of
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Internal, Unavailable
from plait.registry.records import Snapshot
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait_bench.features_data import ENTITY, Values, set_name
from plait_bench.features_world import TENANT, OwnFeatures, World, read_request, stub_of, tensor_of
from plait_bench.peer_feast import FeastProcess

_RECEIVE_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 0.05
Asked = Sequence[list[str]]


class Way(Protocol):
    """One way to read a view of `rows` × features. `name` is unique in a comparison."""

    @property
    def name(self) -> str: ...

    async def read(self, ids: list[str]) -> Values:
        """Return [ids, features]."""
        ...

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Read one set of ids after the other for so long, at least once; return what each read took, in seconds."""
        ...


def timed(read: Callable[[list[str]], object], asked: Asked, seconds: float) -> list[float]:
    """Do a round of a blocking way."""
    taken: list[float] = []
    give_up = time.perf_counter() + seconds
    while not taken or time.perf_counter() < give_up:
        ids = asked[len(taken) % len(asked)]
        began = time.perf_counter()
        read(ids)
        taken.append(time.perf_counter() - began)
    return taken


async def timed_async(read: Callable[[list[str]], Any], asked: Asked, seconds: float) -> list[float]:
    """Do a round of a way that waits on the loop."""
    taken: list[float] = []
    give_up = time.perf_counter() + seconds
    while not taken or time.perf_counter() < give_up:
        ids = asked[len(taken) % len(asked)]
        began = time.perf_counter()
        await read(ids)
        taken.append(time.perf_counter() - began)
    return taken


class _Decoder:
    """The keys of a view and the columns of its rows. Keys are made once: a floor has nothing to do but read."""

    def __init__(self, snapshot: Snapshot, view: str, known: Sequence[str]) -> None:
        record = snapshot.feature_views[view]
        codec = RowCodec(schemas_of(record)[-1])
        self._row_bytes = codec.row_bytes
        self._offset = next(iter(codec.columns.values())).offset
        self.keys = dict(zip(known, KeySpace.of(TENANT, ENTITY, view, record.version).keys(known), strict=True))

    def matrix(self, rows: Sequence[bytes]) -> Values:
        """Return [rows, features] of rows of the view, copied out of them."""
        block = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), self._row_bytes)
        return np.ascontiguousarray(block[:, self._offset :]).view("<f4")


class RedisPyFloor:
    """MGET by redis-py with hiredis, and a decode of all rows at once: what everybody can write in five lines."""

    name = "raw MGET + decode"

    def __init__(self, world: World, view: str, known: Sequence[str]) -> None:
        self._decoder = _Decoder(world.snapshot, view, known)
        self._redis = redis.Redis.from_url(world.redis.url)

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def now(self, ids: list[str]) -> Values:
        """Read, blocking."""
        keys = self._decoder.keys
        rows: Any = self._redis.mget([keys[i] for i in ids])
        return self._decoder.matrix(rows)

    async def read(self, ids: list[str]) -> Values:
        """Read in a thread."""
        return await asyncio.to_thread(self.now, ids)

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Do a round in a thread."""
        return await asyncio.to_thread(timed, self.now, asked, seconds)


class PackedFloor:
    """The same with the command packed by hand, and no client in between: what Redis and the decode alone take."""

    name = "MGET packed by hand + decode"

    def __init__(self, world: World, view: str, known: Sequence[str]) -> None:
        self._decoder = _Decoder(world.snapshot, view, known)
        self._arguments = {i: b"$%d\r\n%b\r\n" % (len(key), key) for i, key in self._decoder.keys.items()}
        host, _, port = world.redis.address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        password = world.password.encode()
        self._ask(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n" % (len(password), password))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def now(self, ids: list[str]) -> Values:
        """Read, blocking."""
        arguments = self._arguments
        command = b"*%d\r\n$4\r\nMGET\r\n" % (len(ids) + 1) + b"".join([arguments[i] for i in ids])
        return self._decoder.matrix(self._ask(command))

    async def read(self, ids: list[str]) -> Values:
        """Read in a thread."""
        return await asyncio.to_thread(self.now, ids)

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Do a round in a thread."""
        return await asyncio.to_thread(timed, self.now, asked, seconds)

    def _ask(self, command: bytes) -> Any:
        self._socket.sendall(command)
        while (answer := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(_RECEIVE_BYTES))
        return answer


class CountingRows:
    """Stands before a store and counts the keys it is asked for."""

    def __init__(self, store: Rows) -> None:
        self._store = store
        self.keys = 0

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Pass it on."""
        self.keys += len(keys)
        return await self._store.read(keys, timeout_s)


class InProcess:
    """Our whole path but the wire: request in, response out, in this process. `store` counts what the near cache did not know."""

    def __init__(self, name: str, view: str, retrieval: Retrieval, store: CountingRows) -> None:
        self.name = name
        self.store = store
        self._set = set_name(view)
        self._retrieval = retrieval
        self._call = Call(method="bench", tenant=TENANT, deadline=Deadline.never(), is_service=True)

    async def read(self, ids: list[str]) -> Values:
        """Read."""
        response = pb.GetFeaturesResponse()
        await self._retrieval.get_features(read_request(self._set, ids), response, self._call)
        return tensor_of(response)

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Do a round on the loop."""
        return await timed_async(self.read, asked, seconds)


@asynccontextmanager
async def in_process(world: World, view: str, *, name: str, cache_bytes: int) -> AsyncIterator[InProcess]:
    """Put the parts together as the service's composition root does; with a near cache, it is on before this returns."""
    store = RedisStore(world.redis.url)
    counting = CountingRows(store)
    cache = NearCache(cache_bytes, 300.0)
    reads = CoalescedReads(counting)
    plans = Plans(world.snapshot)
    tracker = asyncio.create_task(_track(store, Audience(cache, reads)), name="near-cache") if cache_bytes else None
    try:
        while tracker is not None and not cache.on:
            await asyncio.sleep(_RETRY_S)
        yield InProcess(name, view, Retrieval(reads, cache, lambda: plans), counting)
    finally:
        if tracker is not None:
            tracker.cancel()
            await asyncio.gather(tracker, return_exceptions=True)
        await reads.close()
        await store.close()


async def _track(store: RedisStore, audience: Audience) -> None:
    while True:
        with contextlib.suppress(Unavailable):
            await store.watch(lambda: [entity_prefix(TENANT, ENTITY)], audience)
        await asyncio.sleep(_RETRY_S)


class OverGrpc:
    """A real process over gRPC, called with grpcio's blocking stub as a backend would."""

    def __init__(self, name: str, view: str, server: OwnFeatures) -> None:
        self.name = name
        self._set = set_name(view)
        self._metadata = server.metadata
        self._channel = server.channel()
        self._stub = stub_of(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def now(self, ids: list[str]) -> Values:
        """Read, blocking."""
        return tensor_of(self._stub.GetFeatures(read_request(self._set, ids), metadata=self._metadata, timeout=_TIMEOUT_S))

    async def read(self, ids: list[str]) -> Values:
        """Read in a thread."""
        return await asyncio.to_thread(self.now, ids)

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Do a round in a thread."""
        return await asyncio.to_thread(timed, self.now, asked, seconds)


class Feast:
    """Feast's `get_online_features` in its own process; `tensor`: the answer as a matrix, like everybody else's, and not as it comes."""

    def __init__(self, process: FeastProcess, view: str, world: World, *, tensor: bool) -> None:
        self.name = "Feast, as a matrix" if tensor else "Feast get_online_features"
        self._process = process
        self._view = view
        self._file = world.folder / "feast-answer.npy"
        self._tensor = tensor

    async def read(self, ids: list[str]) -> Values:
        """Read through a file."""
        await asyncio.to_thread(self._process.do, "answer", shape=self._view, ids=ids, file=str(self._file))
        answer: Values = np.load(self._file)
        return answer

    async def round(self, asked: Asked, seconds: float) -> list[float]:
        """Do a round over there."""
        return await asyncio.to_thread(self._process.round, self._view, asked, seconds, tensor=self._tensor)


async def check(ways: Sequence[Way], ids: list[str], expected: Values) -> None:
    """Have each way read the same entities. Raises Internal (BENCH_ANSWER_WRONG) where a value is not what was written."""
    for way in ways:
        found = await way.read(ids)
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise Internal(f"{way.name} answers other features than were written", reason="BENCH_ANSWER_WRONG")
