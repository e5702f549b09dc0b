"""The real servers that tests run against: one PostgreSQL and one Redis per session, emptied for each test that asks."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import redis
from hypothesis import settings
from tests.fakes.object_store import ObjectStore

from plait.local.postgres import EmbeddedPostgres
from plait.local.redis import EmbeddedRedis

settings.register_profile("plait", deadline=None)  # how long an example takes says something of the machine, not of us
settings.load_profile("plait")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres_server() -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL server; what is in it is everybody's."""
    async with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def postgres_dsn(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of an empty database that only this test knows."""
    name = f"test_{secrets.token_hex(6)}"
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_server() -> AsyncIterator[EmbeddedRedis]:
    """A Redis server; what is in it is everybody's."""
    async with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of the Redis server, emptied for this test."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        client.script_flush()
    return redis_server.url


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store that s3:// and gs:// mean, for this test and the processes it starts."""
    with ObjectStore() as store:
        for name in os.environ:
            if name.startswith(("AWS_", "GOOGLE_")):
                monkeypatch.delenv(name)
        for name, value in store.environ.items():
            monkeypatch.setenv(name, value)
        yield store
