"""How the router has models run: which pool a model's workers are in, and what failures there mean to a caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PlaitError,
    Unavailable,
    Unimplemented,
)
from plait.registry.policies import KubernetesService, PoolEndpoint
from plait.registry.pool_rules import DEFAULT
from plait.registry.records import EMPTY, Pool, Snapshot
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from plait.telemetry.tracing import Tracing
from router.balancer import Balancer
from router.connections import CallPlan, Connections, framed, lost
from router.discovery.found import Found
from router.discovery.kubernetes import KubernetesDiscovery
from router.endpoints import OnLoad, Transport
from router.pool_metrics import PoolMetrics
from router.settings import WorkersSettings
from router.transports.foreign import ForeignTransport
from router.transports.plait import PlaitTransport

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

_METHOD: Final = "inference.GRPCInferenceService/ModelInfer"
_STREAM: Final = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"
_RETRY_S: Final = 0.25
_LOOK_S: Final = 1.0


class _OpenPool:
    """A pool in use: what the registry says of it, its connections, who looks for its endpoints, and when that last had an answer."""

    __slots__ = ("connections", "heard_s", "record", "search")

    def __init__(self, record: Pool, connections: Connections, search: asyncio.Task[None] | None) -> None:
        self.record = record
        self.connections = connections
        self.search = search
        self.heard_s = time.monotonic()

    def heard(self) -> None:
        self.heard_s = time.monotonic()


class Pools:
    """Calls models where they run. A model that names no pool runs on the workers of the router's own settings.

    `run` asks every endpoint, each second, which versions it holds; until then, and without it, all count as ready.
    """

    def __init__(
        self, settings: WorkersSettings, channel: ChannelSettings, *, tracing: Tracing | None = None, metrics: PoolMetrics | None = None
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._tracing = tracing
        self._metrics = metrics
        self._default = self._opened(_own(settings))
        self._pools: dict[str, _OpenPool] = {}
        self._of: Mapping[str, Connections] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self.adopt(EMPTY)

    def __repr__(self) -> str:
        return f"<Pools {[pool.connections for pool in self._all()]}>"

    def adopt(self, snapshot: Snapshot) -> None:
        """Serve by a new snapshot: pools that are new are opened, those that are gone are closed once they have answered."""
        for name in tuple(self._pools):
            if not _same(self._pools[name].record, snapshot.pools.get(name)):
                self._leave(self._pools.pop(name))
        for name, record in snapshot.pools.items():
            pool = self._pools.get(name)
            if pool is None:
                self._pools[name] = self._opened(record)
            elif pool.record is not record:
                pool.record = record
                if record.endpoints:
                    pool.connections.adopt(_listed(record))
        self._of = {m.name: self._pools[m.pool].connections for m in snapshot.models.values() if m.pool in self._pools}

    def ready(self, model: str, version: str) -> bool:
        """Whether some endpoint holds the version ready, as far as is known."""
        return self._connections(model).holds(model, version)

    async def infer(self, frame: pb.StreamInferRequest, call: CallPlan) -> inference_pb2.ModelInferResponse:
        """Return the answer to a filled frame.

        Raises Unavailable: WORKER_UNAVAILABLE when no worker can be reached, POOL_UNAVAILABLE when there is none, MODEL_NOT_READY when none
        has the model yet; FailedPrecondition: SIGNATURE_MISMATCH when the worker refuses the tensors, MODEL_FAILED when the model did not
        load. ResourceExhausted and DeadlineExceeded are the worker's own.
        """
        try:
            response: inference_pb2.ModelInferResponse = await self._connections(call.model).call(framed(frame, call), call, _not_here)
        except PlaitError as error:
            raise _to_caller(error) from error
        return response

    async def infer_raw(self, request: bytes, call: CallPlan) -> bytes:
        """Return the serialized answer to a serialized ModelInferRequest. Raises as `infer` does, but what the worker finds wrong with the
        tensors is InvalidArgument, as they are the caller's."""

        def send(transport: Transport) -> Any:
            return transport.raw(request, deadline=call.deadline, tenant=call.tenant, request_id=call.request_id, metadata=call.metadata)

        try:
            response: bytes = await self._connections(call.model).call(send, call, _not_here)
        except InvalidArgument:
            raise
        except PlaitError as error:
            raise _to_caller(error) from error
        return response

    async def ask(self, model: str, version: str, method: str, request: bytes, deadline: Deadline) -> bytes:
        """Return the first answer that an endpoint has to a question about a model, bytes for bytes. Raises as `infer`, and Unimplemented."""
        refused: PlaitError = Unavailable("the model's pool has no endpoint", reason="POOL_UNAVAILABLE", retry_after_s=_LOOK_S)
        for transport in self._connections(model).transports(model, version):
            try:
                return await transport.ask(method, request, deadline)
            except (InvalidArgument, Unimplemented, DeadlineExceeded):
                raise
            except PlaitError as error:
                refused = error
        raise _to_caller(refused)

    async def ask_all(self, method: str, request: bytes, deadline: Deadline) -> list[bytes]:
        """Return the answers of every endpoint of every pool that has one."""
        transports = [transport for pool in self._all() for transport in pool.connections.transports()]
        answers = await asyncio.gather(*(transport.ask(method, request, deadline) for transport in transports), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, PlaitError):
                raise answer
        return [answer for answer in answers if isinstance(answer, bytes)]

    async def run(self) -> None:
        """Look at all endpoints every second. Raises what went wrong where a search for endpoints ended, which it never should."""
        while True:
            for pool in self._all():
                if pool.search is not None:
                    self._look_after(pool, pool.search)
            await self.look()
            await asyncio.sleep(_LOOK_S)

    def _look_after(self, pool: _OpenPool, search: asyncio.Task[None]) -> None:
        if search.done():
            search.result()
            raise RuntimeError(f"the search for the endpoints of pool {pool.record.name!r} ended, which it never should")
        if self._metrics is not None:
            self._metrics.heard(pool.record.name, time.monotonic() - pool.heard_s)

    async def look(self) -> None:
        """Ask every endpoint which versions it holds."""
        await asyncio.gather(*(pool.connections.look() for pool in self._all()))

    async def close(self) -> None:
        """Close every connection."""
        for pool in self._all():
            if pool.search is not None:
                pool.search.cancel()
                await asyncio.gather(pool.search, return_exceptions=True)
            await pool.connections.close()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _all(self) -> tuple[_OpenPool, ...]:
        return (self._default, *self._pools.values())

    def _connections(self, model: str) -> Connections:
        return self._of.get(model, self._default.connections)

    def _opened(self, record: Pool) -> _OpenPool:
        settings = self._settings
        balancer = Balancer(
            ejection_s=settings.ejection_s, max_ejection_s=settings.max_ejection_s, slow_start_s=settings.slow_start_s, zone=settings.zone
        )
        connections = Connections(record.name, self._opener(record), balancer, stateful=record.stateful, metrics=self._metrics)
        if record.kubernetes is None:
            connections.adopt(_listed(record))
            return _OpenPool(record, connections, None)
        where = record.kubernetes
        pool = _OpenPool(record, connections, None)
        search = KubernetesDiscovery(where.namespace, where.service, where.port, on_news=pool.heard).run(connections.adopt)
        pool.search = asyncio.create_task(search, name=f"endpoints of pool {record.name}")
        return pool

    def _opener(self, record: Pool) -> Callable[[str, OnLoad], Transport]:
        channel = self._channel
        if record.name != DEFAULT:
            channel = channel.model_copy(update={"tls": record.tls})
        if record.protocol == "oip":
            strange = channel.model_copy(update={"service_token": ChannelSettings().service_token})
            return lambda address, _: ForeignTransport(address, strange)
        most, tracing = self._settings.connections, self._tracing
        return lambda address, on_load: PlaitTransport(
            address, _METHOD, _STREAM, pb.StreamInferResponse, channel, most=most, on_load=on_load, tracing=tracing
        )

    def _leave(self, pool: _OpenPool) -> None:
        if self._metrics is not None:
            self._metrics.gone(pool.record.name)
        task = asyncio.create_task(_left(pool), name=f"leave pool {pool.record.name}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


async def _left(pool: _OpenPool) -> None:
    if pool.search is not None:
        pool.search.cancel()
        await asyncio.gather(pool.search, return_exceptions=True)
    try:
        await pool.connections.drain()
    finally:
        await pool.connections.close()


def _own(settings: WorkersSettings) -> Pool:
    """Return the pool that the router's own settings describe."""
    where = settings.kubernetes
    if where.service:
        return Pool(name=DEFAULT, kubernetes=KubernetesService(namespace=where.namespace, service=where.service, port=where.port))
    return Pool(name=DEFAULT, endpoints=tuple(PoolEndpoint(address=address) for address in settings.addresses_listed))


def _listed(pool: Pool) -> frozenset[Found]:
    return frozenset(Found(address=endpoint.address, zone=endpoint.zone) for endpoint in pool.endpoints)


def _same(old: Pool, new: Pool | None) -> bool:
    """Whether the connections of one will do for the other; its endpoints may have changed."""
    return new is not None and _road(old) == _road(new)


def _road(pool: Pool) -> tuple[object, ...]:
    return pool.protocol, pool.tls, pool.stateful, pool.kubernetes


def _not_here(error: PlaitError) -> bool:
    """A worker that is loading the model, or has not heard of it yet, says nothing of the others."""
    return isinstance(error, Unavailable | NotFound)


def _to_caller(error: PlaitError) -> PlaitError:
    """Say what happened in terms of the router's caller, who chose neither model nor tensors."""
    if lost(error) or isinstance(error, Cancelled):
        return Unavailable("no model-worker can be reached: retry", reason="WORKER_UNAVAILABLE", retry_after_s=_RETRY_S)
    if isinstance(error, NotFound):
        return Unavailable(f"no model-worker has the model yet: {error.message}", reason="MODEL_NOT_READY", retry_after_s=_RETRY_S)
    if isinstance(error, Unavailable) and error.retry_after_s is None:
        return Unavailable(error.message, reason=error.reason, retry_after_s=_RETRY_S)
    if isinstance(error, InvalidArgument):  # what the caller sent was checked against the signature; the rest is ours
        message = f"the model does not take what its signature says: {error}; publish a version whose signature is true"
        return FailedPrecondition(message, reason="SIGNATURE_MISMATCH")
    return error
