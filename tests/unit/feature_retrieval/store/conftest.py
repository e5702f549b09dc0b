"""The store on every topology there is, each on real servers; TLS through a door, because the embedded server has none."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis
import trustme
from tests.fakes.redis_cluster import RedisCluster
from tests.fakes.redis_places import Place
from tests.fakes.redis_sentinel import SENTINEL_PASSWORD, SERVICE, RedisSentinel
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.settings import RowStoreSettings
from feature_retrieval.store.redis import RedisStore
from plait.local.redis import EmbeddedRedis


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_cluster() -> AsyncIterator[RedisCluster]:
    """A cluster of three; tests leave it whole."""
    async with RedisCluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_sentinel() -> AsyncIterator[RedisSentinel]:
    """A primary, a replica and a Sentinel; tests leave them whole."""
    async with RedisSentinel() as sentinel:
        yield sentinel


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A folder with ca.pem, cert.pem and key.pem for a client, and the context of a server that wants to see them."""
    folder: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    client = authority.issue_cert("client.invalid")
    client.private_key_pem.write_to_path(folder / "key.pem")
    client.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return folder, context


@pytest_asyncio.fixture
async def redis_behind_tls(redis_server: EmbeddedRedis, tls_files: tuple[Path, ssl.SSLContext]) -> AsyncIterator[RowStoreSettings]:
    """The session's server through a door that speaks TLS; the settings that open it."""
    folder, context = tls_files
    host, port = redis_server.address.split(":")
    async with TcpProxy((host, int(port)), tls=context) as door:
        url = redis_server.url.replace("redis://", "rediss://").replace(f":{port}/", f":{door.port}/")
        files = {f"tls_{name}": folder / f"{name}.pem" for name in ("ca", "cert", "key")}
        yield RowStoreSettings.model_validate({"url": url, **files})


@pytest.fixture(params=["single", "cluster", "sentinel", "tls"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each deployment in turn, emptied for this test."""
    found = _place(request, request.param)
    found.flush()
    return found


def _place(request: pytest.FixtureRequest, kind: str) -> Place:
    if kind == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        return Place(RowStoreSettings.model_validate({"mode": "cluster", "url": cluster.url}), cluster.flush)
    if kind == "sentinel":
        sentinel: RedisSentinel = request.getfixturevalue("redis_sentinel")
        options = {"mode": "sentinel", "url": sentinel.url, "nodes": sentinel.address, "sentinel_service": SERVICE}
        return Place(RowStoreSettings.model_validate(options | {"sentinel_password": SENTINEL_PASSWORD}), sentinel.flush)
    server: EmbeddedRedis = request.getfixturevalue("redis_server")

    def flush() -> None:
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
            client.script_flush()

    return Place(
        request.getfixturevalue("redis_behind_tls") if kind == "tls" else RowStoreSettings.model_validate({"url": server.url}), flush
    )


@pytest_asyncio.fixture
async def placed(place: Place) -> AsyncIterator[RedisStore]:
    """A store on each deployment in turn."""
    store = place.open()
    yield store
    await store.close()
