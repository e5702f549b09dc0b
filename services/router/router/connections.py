"""The open streams to the replicas of one service behind the router, and the one retry a call is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc

from plait.errors import PlaitError
from plait.rpc.channel import open_channel, service_metadata
from plait.rpc.deadline import Deadline
from plait.rpc.multiplex import Multiplexer
from plait.settings import ChannelSettings
from plait.telemetry.logging import get_logger
from plait.telemetry.tracing import Tracing
from router.balancer import Balancer, Replica

log = get_logger(__name__)

# Not an answer to the call but the end of the stream it was on: gone, or it does not take us for a plait service.
_NOT_LET_IN: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)


def lost(error: PlaitError) -> bool:
    """Whether the replica was not reached, as against having answered with an error."""
    return error.reason == "CONNECTION_LOST" or error.code in _NOT_LET_IN


class _Connection:
    """One replica with its channel and the calls on its stream."""

    __slots__ = ("address", "calls", "channel", "replica")

    def __init__(self, address: str, replica: Replica, channel: grpc.aio.Channel, calls: Multiplexer) -> None:
        self.address = address
        self.replica = replica
        self.channel = channel
        self.calls = calls


class Connections:
    """One multiplexed stream per replica (times `per_replica`), opened on first use and again after a break.

    `stream` is the full name of the service's stream, `response_type` its answers'. `name` is what spans and logs call it.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        stream: str,
        response_type: type[Any],
        settings: ChannelSettings,
        *,
        per_replica: int = 1,
        ejection_s: float = 0.5,
        max_ejection_s: float = 10.0,
        tracing: Tracing | None = None,
    ) -> None:
        self._name = name
        self._connections: dict[Replica, _Connection] = {}
        metadata = service_metadata(settings)
        for label, address in _labelled(addresses, per_replica):
            channel = open_channel(address, settings)
            calls = Multiplexer(channel, stream, response_type, name=name, metadata=metadata, tracing=tracing)
            replica = Replica(label)
            self._connections[replica] = _Connection(address, replica, channel, calls)
        self._balancer = Balancer(tuple(self._connections), ejection_s=ejection_s, max_ejection_s=max_ejection_s)

    def __repr__(self) -> str:
        return f"<Connections {self._name} {list(self._connections)}>"

    async def call(
        self, frame: Any, *, deadline: Deadline, tenant: str, request_id: str, elsewhere: Callable[[PlaitError], bool] = lambda _: False
    ) -> Any:
        """Send a filled frame, or a request that is serialized already, to the best replica and return the response as it was sent.

        Tried once more where the replica was lost (on another one, or on the same after a reconnect when it is the only one), and,
        where there is another one, for an error it answered with that `elsewhere` says may not hold there. Raises the last error.
        """
        first = self._balancer.pick()
        try:
            return await self._attempt(first, frame, deadline, tenant, request_id)
        except PlaitError as error:
            again = self._balancer.pick(avoid=first)
            if not (lost(error) or (again is not first and elsewhere(error))):
                raise
        return await self._attempt(again, frame, deadline, tenant, request_id)

    def channels(self) -> Sequence[grpc.aio.Channel]:
        """Return a channel to every address, the least loaded first."""
        first = {connection.address: connection.channel for connection in reversed(self._connections.values())}
        best = self._connections[self._balancer.pick()]
        return tuple(({best.address: best.channel} | first).values())

    async def close(self) -> None:
        """End every stream and channel; calls still waiting fail."""
        for connection in self._connections.values():
            await connection.calls.close()
            await connection.channel.close()

    async def _attempt(self, replica: Replica, frame: Any, deadline: Deadline, tenant: str, request_id: str) -> Any:
        replica.in_flight += 1
        try:
            calls = self._connections[replica].calls
            send = calls.call_raw if isinstance(frame, bytes) else calls.call
            response = await send(frame, deadline=deadline, tenant=tenant, request_id=request_id)
        except PlaitError as error:
            if lost(error):
                self._eject(replica, error)
            raise
        finally:
            replica.in_flight -= 1
        if replica.failures:
            self._balancer.succeeded(replica)
            log.info("a replica answers again", service=self._name, replica=replica.name)
        return response

    def _eject(self, replica: Replica, error: PlaitError) -> None:
        ejection_s = self._balancer.failed(replica)
        if ejection_s:
            log.warning("a replica is avoided", service=self._name, replica=replica.name, for_s=ejection_s, error=error.message)


def _labelled(addresses: Sequence[str], per_replica: int) -> Iterator[tuple[str, str]]:
    for address in addresses:
        for number in range(per_replica):
            yield (f"{address}#{number + 1}" if per_replica > 1 else address), address
