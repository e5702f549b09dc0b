"""From settings to servers: who is asked, and with which credentials."""

from __future__ import annotations

from typing import Any

import pytest

from plait.redis.connections import Node
from plait.redis.opening import address_of, topology_of
from plait.redis.settings import RedisSettings
from plait.redis.topologies import Cluster, Sentinel, Single


def topology(**settings: Any) -> Any:
    return topology_of(RedisSettings.model_validate(settings))


def login(node: Node) -> tuple[Any, ...]:
    return tuple(node._arguments.get(name) for name in ("username", "password", "db"))


def test_one_server() -> None:
    found = topology(url="redis://me:s%40cret@host:1234/5", connections=7)
    assert isinstance(found, Single)
    [node] = found.primaries()
    assert (node.address, node.connections, login(node)) == (("host", 1234), 7, ("me", "s@cret", 5))
    assert repr(node) == "<Node host:1234 up connections=0+0>"


def test_a_cluster_s_servers_share_the_url_s_credentials() -> None:
    found = topology(mode="cluster", url="redis://:pw@first:1", nodes="second:2, third:3")
    assert isinstance(found, Cluster)
    assert [seed.address for seed in found._seeds] == [("first", 1), ("second", 2), ("third", 3)]
    assert {login(seed) for seed in found._seeds} == {(None, "pw", None)}
    assert not found.primaries()


@pytest.mark.parametrize("password", ["", "plain", "p@ss/w:rd#?%41"])
def test_sentinels_have_a_password_of_their_own_and_no_database(password: str) -> None:
    found = topology(
        mode="sentinel", url="rediss://me:pw@any/3", nodes="s1:26379,[::1]:26380", sentinel_service="shop", sentinel_password=password
    )
    assert isinstance(found, Sentinel)
    assert [node.address for node in found._sentinels] == [("s1", 26379), ("::1", 26380)]
    assert {login(node) for node in found._sentinels} == {(None, password or None, None)}
    assert {node._kind.__name__ for node in found._sentinels} == {"SSLConnection"}
    assert login(found._access.node(("primary", 1))) == ("me", "pw", 3)


def test_addresses() -> None:
    assert [address_of(text) for text in ("a:1", "[::1]:2", "b")] == [("a", 1), ("::1", 2), ("b", 6379)]
