"""A real PostgreSQL, embedded: started and ended with an `async with`, on 127.0.0.1 only, with a password of its own.

PostgreSQL refuses to run as root; there it runs as `nobody` on a data folder that is handed to that account. No account is added and
no folder of anybody else has its mode changed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from plait.errors import Internal
from plait.local import postgres_software, predecessor
from plait.local.accounts import Account, own, unprivileged
from plait.local.child import Child
from plait.local.data_home import DataHome
from plait.local.ports import Port
from plait.local.postgres_software import Software
from plait.local.readiness import start_failed, until_ready

USER: Final = "plait"
_MAINTENANCE_DATABASE: Final = "postgres"
_STOP_GRACE_S: Final = 20.0
_PROTOCOL: Final = 196608  # 3.0
_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "password_encryption": "scram-sha-256",
}
_FORGETFUL: Final = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """One server for the length of an `async with`; `dsn` names its maintenance database, `create_database` makes others.

    `data_dir` keeps the data over restarts; without it everything lies in a temporary folder and is removed at the end. `durable`
    (default: where there is a data_dir) waits for the disk on commit. Raises Unavailable (LOCAL_START_FAILED), FailedPrecondition
    (LOCAL_NOT_INSTALLED, LOCAL_IN_USE).
    """

    def __init__(
        self, data_dir: Path | None = None, *, durable: bool | None = None, log: Path | None = None, start_timeout_s: float = 60.0
    ) -> None:
        self._given = data_dir.absolute() if data_dir else None
        self._durable = durable if durable is not None else data_dir is not None
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._account: Account | None = None
        self._software: Software
        self._home: DataHome
        self._password = ""
        self._child: Child | None = None
        self._port: Port

    def __repr__(self) -> str:
        return f"<EmbeddedPostgres {self._child!r}>"

    @property
    def address(self) -> str:
        """host:port."""
        return self._port.address

    @property
    def dsn(self) -> str:
        """postgresql:// with the password; treat it as a secret."""
        return self.dsn_of(_MAINTENANCE_DATABASE)

    def dsn_of(self, database: str) -> str:
        """Return the DSN of one database."""
        return f"postgresql://{USER}:{self._password}@{self.address}/{database}"

    @property
    def child(self) -> Child:
        """The postmaster."""
        if self._child is None:
            raise RuntimeError("the embedded PostgreSQL is not started; use `async with`")
        return self._child

    async def __aenter__(self) -> Self:
        self._port = Port()
        try:
            self._account = unprivileged()
            self._home = DataHome(self._given, self._account, prefix="plait-postgres-")
            await self._predecessor_gone()
        except BaseException:
            self._port.close()
            raise
        try:
            self._home.move_in()
            self._software = postgres_software.for_account(postgres_software.locate(), self._account, self._home.path)
            self._password = self._read_password()
            if not (self._data / "PG_VERSION").exists():
                await self._initialize()
            await self.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()

    async def start(self) -> Child:
        """Start the server again after it has ended, at the same address; `async with` does so the first time."""
        await self._predecessor_gone()
        self._child = self._spawn()
        await until_ready(self._child, self._accepts, timeout_s=self._start_timeout_s)
        return self._child

    def create_database(self, name: str) -> str:
        """Create a database where it is not there yet; return its DSN."""
        exists = self.psql(f"select 1 from pg_database where datname = '{name}'")  # noqa: S608 - our own names
        if not exists:
            self.psql(f'create database "{name}"')
        return self.dsn_of(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and whoever is connected to it."""
        self.psql(f'drop database if exists "{name}" with (force)')

    def psql(self, sql: str, database: str = _MAINTENANCE_DATABASE) -> str:
        """Run one statement and return what it printed, bare. Raises Internal with the server's answer."""
        command = [
            str(self._software.psql),
            "-X",
            "-A",
            "-t",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-p",
            str(self._port.number),
        ]
        command += ["-U", USER, "-d", database, "-c", sql]
        environment = {**os.environ, "PGPASSWORD": self._password}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
        if done.returncode != 0:
            raise Internal(f"PostgreSQL refused a statement: {done.stderr.strip()}", reason="LOCAL_STATEMENT_FAILED")
        return done.stdout.strip()

    @property
    def _data(self) -> Path:
        return self._home.path / "pgdata"

    @property
    def _log_file(self) -> Path:
        return self._log or self._home.path / "postgres.log"

    async def _predecessor_gone(self) -> None:
        await predecessor.gone(self._data / "postmaster.pid", marker=str(self._data), timeout_s=_STOP_GRACE_S)

    def _read_password(self) -> str:
        """Return the password this data folder was made with, or a new one; the file is readable by its owner only."""
        file = self._home.path / "password"
        if not (self._data / "PG_VERSION").exists():
            file.unlink(missing_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as new:
                new.write(secrets.token_urlsafe(24))
            own(self._account, file)
        return file.read_text()

    async def _initialize(self) -> None:
        """Make the data folder. initdb removes what it made when it fails; what a killed one left is removed here."""
        shutil.rmtree(self._data, ignore_errors=True)
        argv: list[str | Path] = [self._software.initdb, "-D", self._data, "-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--no-locale"]
        argv += [f"--pwfile={self._home.path / 'password'}", "--no-instructions", *([] if self._durable else ["--no-sync"])]
        initdb = Child.start(argv, name="initdb", log=self._log_file, cwd=self._home.path, account=self._account)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                status = await initdb.wait()
        finally:
            await initdb.stop(signal.SIGKILL, grace_s=_STOP_GRACE_S)
        if status != 0:
            raise start_failed(initdb, f"ended with status {status}")

    def _spawn(self) -> Child:
        """Start the postmaster; should we be killed, it shuts down at once but in order."""
        settings = _SETTINGS | ({} if self._durable else _FORGETFUL)
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        argv: list[str | Path] = [self._software.postgres, "-D", self._data, "-p", str(self._port.number), *options]
        return Child.start(
            argv, name="postgres", log=self._log_file, cwd=self._home.path, account=self._account, death_signal=signal.SIGINT
        )

    async def _accepts(self) -> bool:
        """Say whether the server takes log-ins: it answers a start-up packet with a request to authenticate, not with an error."""
        parameters = b"user\0" + USER.encode() + b"\0database\0" + _MAINTENANCE_DATABASE.encode() + b"\0\0"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port.number)
        except OSError:
            return False
        try:
            writer.write(struct.pack("!II", 8 + len(parameters), _PROTOCOL) + parameters)
            return await reader.read(1) == b"R"
        except OSError:
            return False
        finally:
            writer.close()

    async def _close(self) -> None:
        """End the server (SIGINT: without waiting for clients) and remove what was temporary."""
        try:
            if self._child is not None:
                await self._child.stop(signal.SIGINT, grace_s=_STOP_GRACE_S)
        finally:
            self._port.close()
            self._home.move_out()
