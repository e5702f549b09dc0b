"""One service of the mesh as a process of its own: started on a port that stays its own, watched until SERVING, drained at the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from plait.local.child import Child
from plait.local.ports import Port
from plait.local.readiness import until_ready
from plait.local.services import Service
from plait.local.state import StateFolder

GRACE_S: Final = 5.0  # what held calls have to finish when the mesh ends
_KILL_AFTER_S: Final = 2.0  # beyond the grace, for closing
_HEALTH_TIMEOUT_S: Final = 2.0


class ServiceProcess:
    """One service; `address` and `metrics_address` ("host:port") hold from construction to `close`, across restarts."""

    def __init__(self, service: Service, state: StateFolder, *, start_timeout_s: float = 60.0) -> None:
        self._service = service
        self._state = state
        self._start_timeout_s = start_timeout_s
        self._rpc = Port()
        self._metrics = Port()
        self._settings: dict[str, str] = {}
        self._child: Child | None = None

    def __repr__(self) -> str:
        return f"<ServiceProcess {self.name} {self.address} {self._child!r}>"

    @property
    def name(self) -> str:
        return self._service.name

    @property
    def address(self) -> str:
        return self._rpc.address

    @property
    def metrics_address(self) -> str:
        return self._metrics.address

    @property
    def child(self) -> Child:
        """The process."""
        if self._child is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._child

    def configure(self, settings: Mapping[str, str]) -> None:
        """Set what is added to our own environment at every start."""
        self._settings = dict(settings)

    async def start(self) -> Child:
        """Start it (again) and return once it is SERVING. Raises Unavailable (LOCAL_START_FAILED)."""
        self._port_file.unlink(missing_ok=True)
        self._child = Child.start(
            [sys.executable, "-m", self._service.module],
            name=self.name,
            log=self._state.log(self.name),
            env={**os.environ, **self._own_settings(), **self._settings},
        )
        await until_ready(self._child, self._is_serving, timeout_s=self._start_timeout_s)
        return self._child

    async def stop(self) -> None:
        """Drain and end it."""
        if self._child is not None:
            await self._child.stop(signal.SIGTERM, grace_s=GRACE_S + _KILL_AFTER_S)

    def close(self) -> None:
        """Give its ports back, once it is stopped for good."""
        self._port_file.unlink(missing_ok=True)
        self._rpc.close()
        self._metrics.close()

    @property
    def _port_file(self) -> Path:
        return self._state.port_file(self.name)

    def _own_settings(self) -> dict[str, str]:
        values = {
            "RPC__HOST": "127.0.0.1",
            "RPC__PORT": str(self._rpc.number),
            "RPC__PORT_FILE": str(self._port_file),
            "RPC__GRACE_S": str(GRACE_S),
            "TELEMETRY__METRICS_HOST": "127.0.0.1",
            "TELEMETRY__METRICS_PORT": str(self._metrics.number),
            "REGISTRY__LAST_KNOWN_GOOD": str(self._state.last_known_good(self.name)),
        }
        return {self._service.prefix + name: value for name, value in values.items()}

    async def _is_serving(self) -> bool:
        """Say whether it answers SERVING; not asked before its port file is there, so that starting it costs no connections."""
        if not self._port_file.exists():
            return False
        return await is_serving(self.address)


async def is_serving(address: str) -> bool:
    """Ask a gRPC server's health service."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
