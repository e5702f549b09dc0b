"""How the driver's errors become ours; what the pool does is tested against a real PostgreSQL in tests/integration."""

from __future__ import annotations

import asyncpg
import pytest

from plait.errors import Aborted, FailedPrecondition, Internal, InvalidArgument, NotFound, PlaitError, Unavailable
from plait.registry.database import mapped


@pytest.mark.parametrize(
    ("foreign", "ours", "reason"),
    [
        (ConnectionRefusedError(111, "refused"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (TimeoutError(), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.InterfaceError("connection is closed"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.ConnectionDoesNotExistError("gone"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.CannotConnectNowError("starting up"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.exceptions.AdminShutdownError("bye"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.TooManyConnectionsError("full"), Unavailable, "REGISTRY_UNAVAILABLE"),
        (asyncpg.InvalidPasswordError("secret"), FailedPrecondition, "REGISTRY_REFUSED"),
        (asyncpg.InvalidCatalogNameError("secret"), FailedPrecondition, "REGISTRY_REFUSED"),
        (asyncpg.UndefinedTableError("secret"), FailedPrecondition, "REGISTRY_NOT_MIGRATED"),
        (asyncpg.LockNotAvailableError("secret"), Aborted, "REGISTRY_BUSY"),
        (asyncpg.SerializationError("secret"), Aborted, "REGISTRY_BUSY"),
        (asyncpg.DeadlockDetectedError("secret"), Aborted, "REGISTRY_BUSY"),
        (asyncpg.exceptions.ClientConfigurationError("secret"), InvalidArgument, "REGISTRY_DSN"),
        (asyncpg.UniqueViolationError("Key (sha256)=(secret) exists"), Internal, "REGISTRY_FAULT"),
    ],
)
def test_foreign_errors_are_mapped_where_they_enter(foreign: Exception, ours: type[PlaitError], reason: str) -> None:
    with pytest.raises(ours) as caught, mapped():
        raise foreign
    assert caught.value.reason == reason
    assert caught.value.__cause__ is foreign
    assert "secret" not in str(caught.value)


def test_our_own_errors_and_bugs_pass_as_they_are() -> None:
    with pytest.raises(NotFound), mapped():
        raise NotFound("nothing there")
    with pytest.raises(ZeroDivisionError), mapped():
        raise ZeroDivisionError
