"""A gRPC server the way every plait service runs one: health, reflection, channelz, limits, TLS, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import grpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_channelz.v1._async import ChannelzServicer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from plait.rpc.certificates import Certificates, server_credentials
from plait.rpc.core_server import CoreServer
from plait.rpc.credentials import Authenticator
from plait.rpc.interceptor import CallInterceptor
from plait.settings import RpcSettings
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing, off

log = get_logger(__name__)

_TEND_S: Final = 1.0


class RpcServer:
    """Built by a service's `app`, run by `plait.rpc.process`. Add services, `start`, then `drain`."""

    def __init__(
        self,
        settings: RpcSettings,
        *,
        authenticator: Authenticator,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        loop_polls: bool = False,
        takes: Callable[[int], bool] | None = None,
    ) -> None:
        """`loop_polls` as `CoreServer` has it. `takes` says whether one more call is, where so many are under way; default: max_in_flight."""
        self._settings = settings
        self._authenticator = authenticator
        self._scopes: dict[str, str] = {}
        self._method_scopes: dict[str, str] = {}
        self.metrics = metrics or Metrics()
        self.tracing = tracing or off()
        self._interceptor = CallInterceptor(
            authenticator,
            self._scopes,
            self.metrics,
            max_in_flight=settings.max_in_flight,
            default_timeout_s=settings.default_timeout_s,
            method_scopes=self._method_scopes,
            takes=takes,
        )
        self._health = HealthServicer()
        self._waiting: set[str] = set()  # services that have said they are not ready
        self._listens = False
        interceptors = [*self.tracing.server_interceptors(), self._interceptor]
        options = [
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        self._server: Any = (
            CoreServer(interceptors=interceptors, options=options, refusal=self._interceptor.refusal(), loop_polls=loop_polls)
            if settings.server == "core"
            else grpc.aio.server(interceptors=interceptors, options=options)
        )
        self._certificates: Certificates | None = None
        if settings.tls_cert and settings.tls_key:
            self._certificates = certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            ends = self.metrics.gauge("plait_certificate_expiry_seconds", "when the certificate served ends, seconds since the epoch")
            ends.set_function(lambda: certificates.material.ends_s)
        self._stops = False
        self.address = ""

    def __repr__(self) -> str:
        return f"<RpcServer {self.address or 'not started'} services={sorted(self._scopes)} {self._interceptor!r}>"

    @property
    def draining(self) -> bool:
        """Whether it has begun to stop: calls are still answered, and better sent elsewhere."""
        return self._stops

    def add(
        self,
        register: Callable[[Any, Any], None],
        servicer: object,
        service_name: str,
        *,
        scope: str,
        scopes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Serve `servicer`, registered by its generated `add_…_to_server`; callers need `scope` (services have every scope).

        `scopes`: by name, the methods that ask for another.
        """
        register(servicer, self._server)
        self._scopes[service_name] = scope
        self._method_scopes.update({f"/{service_name}/{method}": asked for method, asked in scopes.items()})

    def reexamine(self, _: object = None) -> None:
        """End open streams whose callers would not be let in any more. Takes whatever a subscription hands over."""
        self._interceptor.reexamine()

    async def tend(self) -> None:
        """Do, every second and for ever, what time brings: certificates are replaced, keys and tokens expire while streams are open."""
        while True:
            self._authenticator.look()
            await asyncio.sleep(_TEND_S)
            self._interceptor.reexamine()
            if self._certificates is not None:
                await asyncio.to_thread(self._certificates.renew)  # a disk may be slow

    async def start(self) -> None:
        """Listen and answer, with health SERVING, but for services that have said they are not ready."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(ChannelzServicer(), self._server)
        names = [*self._scopes, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        names += [channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name, reflection.SERVICE_NAME]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), self._server)  # type: ignore[no-untyped-call]
        self.address = f"{self._settings.host}:{self._listen()}"
        await self._server.start()
        self._listens = True
        for name in ("", *self._scopes):
            await self._tell(name)

    async def set_ready(self, service_name: str, ready: bool) -> None:
        """Say whether one service can do its work yet, for health checks that name it. The process itself, "", is SERVING from its start."""
        (self._waiting.discard if ready else self._waiting.add)(service_name)
        if self._listens:
            await self._tell(service_name)

    async def drain(self) -> None:
        """Say NOT_SERVING, let balancers notice, then refuse new calls and finish what is held within the grace."""
        self._stops = True
        self._listens = False
        for name in ("", *self._scopes):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(self._settings.settle_s)
        self._interceptor.drain()
        await self._server.stop(self._settings.grace_s)
        await self._authenticator.close()

    def _listen(self) -> int:
        target = f"{self._settings.host}:{self._settings.port}"
        if self._certificates is not None:
            credentials = server_credentials(self._certificates, mutual=self._settings.tls_client_ca is not None)
            return int(self._server.add_secure_port(target, credentials))
        return int(self._server.add_insecure_port(target))

    async def _tell(self, name: str) -> None:
        health = health_pb2.HealthCheckResponse
        await self._health.set(name, health.NOT_SERVING if name in self._waiting else health.SERVING)
