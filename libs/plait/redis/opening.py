"""From settings to a topology: which servers, how they are found, which TLS files."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from plait.redis.connections import Access, Address
from plait.redis.settings import RedisSettings
from plait.redis.topologies import Cluster, Sentinel, Single, Topology


def topology_of(redis: RedisSettings) -> Topology:
    """Return how the servers of these settings are found."""
    url = redis.url.get_secret_value()
    access = _access(redis, url)
    if redis.mode == "single":
        return Single(access)
    nodes = [address_of(node) for node in redis.node_list]
    if redis.mode == "cluster":
        return Cluster(access, [access.node().address, *nodes])
    # A Sentinel has a password of its own, or none, and no databases.
    scheme, password = urlsplit(url).scheme, redis.sentinel_password.get_secret_value()
    credentials = f":{quote(password, safe='')}@" if password else ""
    sentinels = [_access(redis, f"{scheme}://{credentials}{node}").node() for node in redis.node_list]
    return Sentinel(access, sentinels, redis.sentinel_service)


def address_of(node: str) -> Address:
    """Return "host:port" taken apart."""
    parts = urlsplit(f"//{node}")
    return parts.hostname or "", parts.port or 6379


def _access(redis: RedisSettings, url: str) -> Access:
    def text(path: object) -> str | None:
        return None if path is None else str(path)

    return Access(
        url=url,
        connections=redis.connections,
        connect_timeout_s=redis.connect_timeout_s,
        tls_ca=text(redis.tls_ca),
        tls_cert=text(redis.tls_cert),
        tls_key=text(redis.tls_key),
    )
