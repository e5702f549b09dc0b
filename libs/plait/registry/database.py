"""The driver of Postgres, in the one module that imports it: connections, pools, and its errors as ours.

The registry (`store`), and whoever keeps something else in the same database, build on this and know nothing of the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import asyncpg

from plait.errors import Aborted, FailedPrecondition, Internal, InvalidArgument, PlaitError, Unavailable
from plait.registry.queries import Connection

_CONNECT_TIMEOUT_S: Final = 5.0
_COMMAND_TIMEOUT_S: Final = 30.0
_RETRY_AFTER_S: Final = 1.0
_DSN_HELP: Final = "expected postgresql://user:password@host:port/database"


class Pool:
    """Connections to one database. Make it with `open_pool`, then close it.

    Everything raises Unavailable (REGISTRY_UNAVAILABLE) while Postgres is away, and FailedPrecondition (REGISTRY_NOT_MIGRATED) before
    `plait migrate` has run.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __repr__(self) -> str:
        return f"<Pool connections={self._pool.get_size()} idle={self._pool.get_idle_size()}>"

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection; statements on their own commit at once."""
        with mapped():
            async with self._pool.acquire(timeout=_CONNECT_TIMEOUT_S) as connection:
                yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """Lend a connection with one unchanging view of everything."""
        async with self.connection() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            yield connection

    async def close(self) -> None:
        """Give every connection back; one that does not answer any more is cut."""
        try:
            await asyncio.wait_for(self._pool.close(), _CONNECT_TIMEOUT_S)
        except TimeoutError:
            self._pool.terminate()


async def open_pool(dsn: str, *, name: str, min_connections: int = 1, max_connections: int = 4) -> Pool:
    """Connect as `name`, with `min_connections` at once: with 0 the database may still be away, and is met when first asked.

    Raises InvalidArgument (REGISTRY_DSN), FailedPrecondition (REGISTRY_REFUSED), Unavailable.
    """
    with connecting(dsn):
        pool = await asyncpg.create_pool(
            dsn,
            min_size=min_connections,
            max_size=max_connections,
            timeout=_CONNECT_TIMEOUT_S,
            command_timeout=_COMMAND_TIMEOUT_S,
            server_settings={"application_name": name},
        )
    return Pool(pool)


async def connect(dsn: str, *, name: str, command_timeout_s: float = _COMMAND_TIMEOUT_S) -> Any:
    """Open one connection of the driver's, for who listens. Raises as `open_pool` does."""
    with connecting(dsn):
        return await asyncpg.connect(
            dsn, timeout=_CONNECT_TIMEOUT_S, command_timeout=command_timeout_s, server_settings={"application_name": name}
        )


@contextmanager
def mapped() -> Iterator[None]:
    """Turn the driver's errors into ours, where they enter. Messages hold no DSN, no password and no values."""
    try:
        yield
    except PlaitError:
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError) as error:
        raise _ours(error) from error


@contextmanager
def connecting(dsn: str) -> Iterator[None]:
    """Like `mapped`, while the DSN is being read."""
    if not dsn:
        raise InvalidArgument(f"no DSN is set for the registry: {_DSN_HELP}", reason="REGISTRY_DSN")
    try:
        with mapped():
            yield
    except ValueError as error:
        raise InvalidArgument(f"the registry's DSN cannot be read: {_DSN_HELP}", reason="REGISTRY_DSN") from error


def _ours(error: Exception) -> PlaitError:
    match error:
        case asyncpg.exceptions.ClientConfigurationError():
            return InvalidArgument(f"the registry's DSN cannot be read: {_DSN_HELP}", reason="REGISTRY_DSN")
        case asyncpg.InvalidAuthorizationSpecificationError() | asyncpg.InvalidCatalogNameError() | asyncpg.InsufficientPrivilegeError():
            message = f"Postgres refuses the registry's user or database ({type(error).__name__}); check the DSN and the grants"
            return FailedPrecondition(message, reason="REGISTRY_REFUSED")
        case asyncpg.UndefinedTableError() | asyncpg.InvalidSchemaNameError():
            return FailedPrecondition("the registry's tables are not there yet; run: plait migrate", reason="REGISTRY_NOT_MIGRATED")
        case asyncpg.LockNotAvailableError() | asyncpg.exceptions.TransactionRollbackError():
            return Aborted("another change of the registry was in the way; try again", reason="REGISTRY_BUSY", retry_after_s=_RETRY_AFTER_S)
        case asyncpg.PostgresError() if not _away(error):
            return Internal(f"Postgres answered with SQLSTATE {error.sqlstate} ({type(error).__name__})", reason="REGISTRY_FAULT")
        case _:
            message = f"Postgres cannot be reached ({type(error).__name__}); the registry cannot be read or changed until it is back"
            return Unavailable(message, reason="REGISTRY_UNAVAILABLE", retry_after_s=_RETRY_AFTER_S)


def _away(error: Exception) -> bool:
    """Say whether the server, and not the statement, is the reason: broken connection, shutting down or starting, out of connections."""
    classes = asyncpg.PostgresConnectionError, asyncpg.exceptions.OperatorInterventionError, asyncpg.exceptions.InsufficientResourcesError
    return isinstance(error, classes)
