"""A channel whose certificates are renewed: calls that begin after the files have changed go over a new connection, made with the new ones.

gRPC's own channels keep the credentials they were made with for ever, and would fail their next handshake once those have expired.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from plait.rpc.certificates import Certificates, Material

_LOOK_S: Final = 1.0  # the files are looked at this often at most


class _Connection:
    """One channel of gRPC's, the methods called over it, and how many calls are under way."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.methods: dict[tuple[str, str], Any] = {}
        self.under_way = 0


class RenewedChannel(grpc.aio.Channel):
    """Does what a channel of gRPC's does. `make` opens one with the material given."""

    def __init__(
        self, certificates: Certificates, make: Callable[[Material], grpc.aio.Channel], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._certificates = certificates
        self._make = make
        self._clock = clock
        self._look_at = clock() + _LOOK_S
        self._newest = _Connection(make(certificates.material))
        self._old: set[_Connection] = set()

    def __repr__(self) -> str:
        return f"<RenewedChannel under_way={self._newest.under_way} old={len(self._old)} {self._certificates!r}>"

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        await self.close()

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return what makes calls of a method, as gRPC's channels do; each call goes over the newest connection."""
        return self._calls("unary_unary", method, arguments, options)

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As `unary_unary`."""
        return self._calls("unary_stream", method, arguments, options)

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As `unary_unary`."""
        return self._calls("stream_unary", method, arguments, options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """As `unary_unary`."""
        return self._calls("stream_stream", method, arguments, options)

    async def close(self, grace: float | None = None) -> None:
        """End every connection; calls under way have `grace` seconds."""
        for connection in (self._newest, *self._old):
            await connection.channel.close(grace)
        self._old.clear()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the newest connection."""
        return self._current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the newest connection's state is another."""
        await self._newest.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the newest connection is there."""
        await self._current().channel.channel_ready()

    def _calls(self, kind: str, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        def begin(*call_arguments: Any, **call_options: Any) -> Any:
            connection = self._current()
            made = connection.methods.get((kind, method))
            if made is None:
                made = connection.methods[kind, method] = getattr(connection.channel, kind)(method, *arguments, **options)
            call = made(*call_arguments, **call_options)
            connection.under_way += 1
            call.add_done_callback(lambda _: self._ended(connection))
            return call

        return begin

    def _current(self) -> _Connection:
        now_s = self._clock()
        if now_s >= self._look_at:
            self._look_at = now_s + _LOOK_S
            if self._certificates.renew():
                before, self._newest = self._newest, _Connection(self._make(self._certificates.material))
                self._old.add(before)
                self._dismiss(before)
        return self._newest

    def _ended(self, connection: _Connection) -> None:
        connection.under_way -= 1
        self._dismiss(connection)

    def _dismiss(self, connection: _Connection) -> None:
        """Let go of an old connection that nothing is under way on any more, which closes it."""
        if connection.under_way == 0:
            self._old.discard(connection)
